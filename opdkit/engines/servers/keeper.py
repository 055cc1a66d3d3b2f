"""Stands between a trainer and the engine it has started, so that neither outlives the other by more than seconds.

    python -I -S keeper.py FOLDER COMMAND ...

The trainer holds the other end of standard input. When that closes (the trainer stopped the engine, or was killed),
the engine's whole process group is ended, and FOLDER, where weights were handed over, is removed (unless the trainer
wrote something first: it will start another engine). When the engine's first process ends, the rest of its group is
ended too: after `kill -9` of the server vLLM leaves processes of gigabytes behind. Standard library alone; it runs as a
script.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE_S = 10.0
PR_SET_PDEATHSIG = 1


def _end_with_me() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(group: int, number: int) -> bool:
    """Whether anybody of the group was there."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main(folder: str, command: list[str]) -> int:
    # Ctrl-C is the trainer's to hear: it ends its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_me)
    ended = os.pidfd_open(engine.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
    if ended not in ready and _signal(engine.pid, signal.SIGTERM):
        select.select([ended], [], [], PATIENCE_S)
        time.sleep(0.5)  # its children are being told
    _signal(engine.pid, signal.SIGKILL)
    code = engine.wait()
    if ended not in ready and not os.read(sys.stdin.fileno(), 16):
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
