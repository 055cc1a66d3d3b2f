"""One process writes a result at a time: a lock on a folder, or on a file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from opdkit.data.files.write import SHOWN, what_is_at
from opdkit.errors import UserError

NAME_BYTES = 60  # of a file's name that go into the names of its lock and of its unfinished self


class Lock:
    """An flock, so that two processes do not write one result: on `<folder>/.lock`, or beside a file on
    `.<name>.lock`. It makes the folder; what it made and what is still empty at `release` goes again.

    The kernel drops it when its process dies, however it dies: a stale lock cannot exist, and no process id is guessed
    about. The text inside only serves the refusal.
    """

    def __init__(self, path: Path, *, file: Path | None = None) -> None:
        """path: of the lock; it locks the folder it is in, or a `file` of it. See `on_folder`, `on_file`.

        Raises UserError: another process holds it, or it cannot be made there.
        """
        if file is None and _is_there(path.parent) and not path.parent.is_dir():
            raise UserError(f"{path.parent} is {what_is_at(path.parent)}, not a folder; choose another")
        self._path, self._is_file, self._what = path, file is not None, file or path.parent
        self._descriptor: int | None = None
        self._is_new = not _is_there(path)
        self._made = [folder for folder in (self._path.parent, *self._path.parents[1:]) if not _is_there(folder)]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._locked()
        except OSError as error:
            self._remove_made()
            raise UserError(
                f"cannot write to {str(self._path.parent)[:SHOWN]} ({error.strerror}); choose another place"
            ) from error
        self._remove_unfinished()
        with suppress(OSError):  # who holds it is only said; a full disk is met, and told, by what is written next
            self._write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        # A forked child shares the lock; it must not keep the run locked after we are gone.
        os.register_at_fork(after_in_child=self._close)

    @classmethod
    def on_folder(cls, folder: Path) -> Self:
        return cls(folder / ".lock")

    @classmethod
    def on_file(cls, file: Path) -> Self:
        return cls(file.with_name(f".{file.name[:NAME_BYTES]}.lock"), file=file)

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise UserError(f"{self._path} is {what_is_at(self._path)}, not a lock of ours: remove it")
                # Its holder may have removed it between our two calls: then we hold a file nobody else will find.
                if _is_there(self._path) and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
                os.close(descriptor)
            except OSError as error:
                owner = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(
                        f"{self._what} is being written by {owner}: wait for it, stop it, or give this one another name"
                    ) from None
                raise UserError(
                    f"the file system of {self._path.parent} cannot lock files ({error.strerror}): keep runs on one "
                    "that can"
                ) from error
            except UserError:
                os.close(descriptor)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.release(refused=kind is not None)

    def release(self, *, refused: bool = False) -> None:
        """Safe to call twice. refused: a lock that was made for nothing goes, whatever else is in its folder."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # a disk that failed, which is said already: the lock ends with the descriptor
            self._write("")
            if (
                self._is_file
                or (refused and self._is_new)
                or [entry.name for entry in self._what.glob("*")] == [self._path.name]
            ):
                self._path.unlink(missing_ok=True)
        self._remove_made()
        self._close()

    def _remove_unfinished(self) -> None:
        """Temporary files (`folder.atomic_path`) of a holder that was killed: nobody else writes here."""
        of = f".{self._what.name[:NAME_BYTES]}" if self._is_file else "."
        for entry in list(self._path.parent.iterdir()):
            if entry.name.startswith(of) and is_unfinished(entry) and entry.is_file():
                entry.unlink()

    def _remove_made(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return  # something is in it, and in those around it

    def _write(self, text: str) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_unfinished(path: Path) -> bool:
    """Whether it is the temporary file of a write (`folder.atomic_path`)."""
    return path.name.startswith(".") and path.name.endswith(".unfinished")


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)
