"""How a process becomes a rank: by the environment that `opdkit train --ranks` or torchrun gives it.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT   as torchrun sets them
OPDKIT_LISTENS_AT                                                          a launcher of ours; see `launch.py`
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import opdkit
from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks

NUM_RANKS = "WORLD_SIZE"
LISTENS_AT = "OPDKIT_LISTENS_AT"  # the descriptor of the rendezvous' socket (rank 0), or "" (the others)
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", LISTENS_AT)
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """By `--ranks`: then the launcher says what became of all ranks."""
    return LISTENS_AT in os.environ


def is_rank() -> bool:
    return os.environ.get(NUM_RANKS, "1") != "1" or is_launched()


def join(*, device: str, timeout_minutes: float, key: str = "model.device") -> Ranks:
    """All ranks, once all are there; `ALONE` in a process that nobody made a rank. key: what `device` is called.

    Raises UserError: the environment is not a rank's, a device that is not there for every rank, a port that is taken,
    ranks that did not come in time.
    """
    if not is_rank():
        return ALONE
    if missing := [name for name in _NEEDED if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE = {os.environ.get(NUM_RANKS)} says that there are several ranks, but {', '.join(missing)} "
            "is not set; start them with torchrun, or with opdkit train --ranks N"
        )
    if is_launched():
        _end_with_parent()
    import torch
    import torch.distributed as dist

    from opdkit.ranks.group import Group

    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    backend = "gloo"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        if device not in ("auto", "cuda"):
            raise UserError(f'{key} = "{device}" is one device, and there are {size} ranks; set it to "cuda"')
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} is number {local + 1} of its machine, which has {torch.cuda.device_count()} GPUs; start "
                f'at most one rank a GPU, or set {key} = "cpu"'
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        if not is_launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            at = {"master_listen_fd": int(os.environ[LISTENS_AT])} if rank == 0 else {}
            store = dist.TCPStore(place, port, size, is_master=rank == 0, timeout=timeout, **at)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"rank {rank} of {size} could not meet the others at {where} within {timeout_minutes:g} minutes ({why}); "
            "if the port is taken, set another MASTER_PORT, and see that every rank was started"
        ) from None
    return Group()


def check_alike(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raises UserError on all ranks where one of them runs another recipe, code or version, or reads other data."""
    if ranks.size == 1:
        return
    first, *others = ranks.gather(dict(facts))
    for rank, theirs in enumerate(others, start=1):
        if differ := [what for what in first if theirs.get(what) != first[what]]:
            raise UserError(
                f"rank {rank} does not have the {' and the '.join(differ)} of rank 0; start all ranks with the same "
                "command, on the same files and in the same environment"
            )


def code_digest() -> str:
    """Of this package's own files."""
    digest = hashlib.sha256()
    folder = Path(opdkit.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def leave(status: int) -> None:
    """End this process, with its output written. Not `sys.exit`: torch's threads may end it with an abort instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """When the launcher is killed, so is this process: nobody would hear of it any more."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
