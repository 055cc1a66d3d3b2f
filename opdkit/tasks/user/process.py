"""The trainer's end of a process that runs a user's code (a task, an environment), asked over a channel, always with a
limit."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks._worker import send_frame, take_frame
from opdkit.tasks.base import GraderDown

_LOOK_S = 0.2  # a process that has ended may have left the channel open in one it forked
_MAX_REPLY_BYTES = 1 << 28
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "import importlib; importlib.import_module(sys.argv[3]).serve(int(sys.argv[2]))"
)


class Failed(Exception):
    """No answer to a request; one sentence says why."""


class Lost(Failed):
    """And the process is gone."""


class TooLong(Lost):
    pass


class UserProcess:
    """One process and the channel to it. module: whose `serve(descriptor)` runs there."""

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        paths = json.dumps([os.path.abspath(path) for path in sys.path])  # "" is the folder we are in
        # No preexec_fn: that would run Python between fork and exec, in a copy of a multi-threaded trainer.
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-c", _BOOT, paths, str(theirs.fileno()), module],
            stdin=subprocess.DEVNULL,
            stdout=2,  # the trainer's own standard output may be read by a program
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the trainer; and all that the task starts can be ended with it
        )
        theirs.close()
        ours.setblocking(False)
        self.channel, self._owner_pid, self._num_asked = ours, os.getpid(), 0
        self.end = weakref.finalize(self, _end, self.process, ours, self._owner_pid)

    @property
    def is_ours(self) -> bool:
        """Not in a process forked from the owner, which shares the channel and must not use it."""
        return self._owner_pid == os.getpid()

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """The reply. Raises Failed, UserError or GraderDown, whichever the other side says; Lost if it is gone, or
        was ended after `limit_s`."""
        until_s = time.monotonic() + limit_s
        self._num_asked += 1
        try:
            payload = json.dumps({**request, "number": self._num_asked}).encode()
        except (TypeError, ValueError) as error:
            raise Failed(f"the problem cannot be handed to its process: {error}") from None
        try:
            self.channel.settimeout(limit_s)
            send_frame(self.channel, payload)
            reply = json.loads(self._frame(until_s))
            fault, said = reply.get("fault"), str(reply.get("said"))
            if reply.get("number") != self._num_asked:
                raise ValueError("an answer to another request")
        except TimeoutError:
            self.end()
            raise TooLong(f"there was no answer within {limit_s:g} s, so its process was ended") from None
        except (EOFError, OSError):
            raise Lost(self.how_it_ended()) from None
        except (ValueError, AttributeError, RecursionError):
            self.end()
            raise Lost("its process sent something else than an answer, and was ended") from None
        if fault is not None:
            raise {"user": UserError, "down": GraderDown}.get(fault, Failed)(said)
        return dict(reply)

    def _frame(self, until_s: float) -> bytes:
        received = bytearray()
        while (frame := take_frame(received)) is None:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            if len(received) > _MAX_REPLY_BYTES:
                raise ValueError("an endless reply")
            poll = select.poll()
            poll.register(self.channel, select.POLLIN)
            if poll.poll(min(left_s, _LOOK_S) * 1000):
                data = self.channel.recv(1 << 20)
                if not data:
                    raise EOFError
                received += data
            elif self.process.poll() is not None:
                raise EOFError
        return frame

    def how_it_ended(self) -> str:
        """Of a process that is gone, or is now ended: one line."""
        self.end()
        code = self.process.returncode
        if code >= 0:
            return f"its process ended with status {code}, as by os._exit"
        name = signal.Signals(-code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner_pid: int) -> None:
    channel.close()
    if owner_pid != os.getpid():
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: with all that the task has started
    process.wait()
