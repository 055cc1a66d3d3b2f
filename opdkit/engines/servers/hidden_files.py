"""Hidden states that a server wrote into a folder which it shares with us: read once, checked, deleted.

The server names the file in its answer. Only the last part of that name is used, below the folder that the recipe
names, and only for a plain file of the size it must have: no link is followed.

Letters: T tokens of a prompt, H hidden width.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from opdkit.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,200}\.safetensors")
_HEADER_BYTES = 1 << 16  # beside the numbers
WITHOUT_LOCK_S = 20.0
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name keeps nobody waiting
_ITEM_BYTES = 8  # the widest a number can be
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SharedFolder:
    """`teacher.spool`, as this machine sees it. Raises UserError where it is none."""

    def __init__(self, path: str, where: str = "teacher.spool") -> None:
        self.path, self.is_stopped = Path(path).expanduser(), False
        if self.path.is_symlink() or not self.path.is_dir():
            raise UserError(
                f"{where} = {path} is no folder of this machine; make it, and have the server write there (its "
                'shared_storage_path), or use payload = "topk", which needs none'
            )

    def take(self, said: Any, ids: Sequence[int], width: int, timeout_s: float) -> Tensor:
        """[T, H] the states of the tokens `ids`, from the file that the server named. It is deleted, whatever it holds.

        Raises ValueError for an answer that names no such file, OSError where there is none in time.
        """
        name = PurePosixPath(said).name if isinstance(said, str) else ""
        if not _NAME.fullmatch(name):
            raise ValueError(f"it named the file {said!r:.120}, not one of the shared folder")
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._wait_for(folder, name, timeout_s)
            most = len(ids) * (width * _ITEM_BYTES + _ITEM_BYTES) + _HEADER_BYTES
            data = _read(folder, name, most)
        finally:
            for part in (name, f"{name}.lock"):
                with contextlib.suppress(OSError):
                    os.unlink(part, dir_fd=folder)
            os.close(folder)
        return _states(data, ids, width)

    def drop(self, said: Any, timeout_s: float) -> None:
        """Delete a file that nobody wants, once it is written."""
        with contextlib.suppress(ValueError, OSError):
            self.take(said, (), 0, timeout_s)

    def _wait_for(self, folder: int, name: str, timeout_s: float) -> None:
        """The server holds the lock from before its answer until the file is whole: a lock that nobody holds, and no
        file, is all that a server leaves that died. A server without locks is given a moment."""
        until = {True: time.monotonic() + timeout_s, False: time.monotonic() + min(timeout_s, WITHOUT_LOCK_S)}
        while not self.is_stopped:
            has_lock = is_held = False
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(f"{name}.lock", _OPEN, dir_fd=folder)
                has_lock = True
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    is_held = True
                finally:
                    os.close(lock)
            if not is_held:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(name, dir_fd=folder, follow_symlinks=False)
                    return
                if has_lock:
                    break
            if time.monotonic() > until[has_lock]:
                break
            time.sleep(0.002)
        raise FileNotFoundError(f"no file {name} in the shared folder")


def _read(folder: int, name: str, most: int) -> bytes:
    file = os.open(name, _OPEN, dir_fd=folder)
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{name} is no plain file")
        if about.st_size > most:
            raise ValueError(f"{name} has {about.st_size:,} bytes, more than such states can have ({most:,})")
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read(most + 1)
    finally:
        os.close(file)


def _states(data: bytes, ids: Sequence[int], width: int) -> Tensor:
    try:
        found = load(data)
        states, tokens = found["hidden_states"], found["token_ids"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"the file holds no hidden states ({error})") from None
    num = len(ids)
    if states.dtype not in DTYPES or states.dim() != 3 or states.shape[1:] != (1, width) or len(states) < num:
        raise ValueError(f"states of {[*states.shape]} {states.dtype}, not of [{num}, 1, {width}]")
    if tokens.dim() != 1 or tokens[:num].tolist() != list(ids):
        raise ValueError("states of other tokens than were asked")
    states_TH = states[:num, 0]
    if not bool(states_TH.isfinite().all()):
        raise ValueError("states that are not finite numbers")
    return states_TH
