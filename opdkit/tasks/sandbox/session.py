"""Interpreters that stay: one runs a piece of a program, keeps what it defined, and waits for the next piece.

Behind the same walls as every program (README.md), in a process of its own, under the limits of one job: its CPU time
is that of all its pieces together, its memory what it holds. What it says of itself over its link is that a piece is
done, which it may say when it likes: only what it has written is ever shown, and to nobody but its model.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opdkit.tasks._worker import send_frame, take_frame
from opdkit.tasks.base import GraderDown
from opdkit.tasks.sandbox.jobs import TIERS, Done, Job, Limits, cells
from opdkit.tasks.sandbox.start import start_zygote
from opdkit.tasks.sandbox.zygote_client import Flight, ZygoteClient, ZygoteDied, wait_for_answers

_MAX_REPLY_BYTES = 64  # {"done": true}
_LOOK_S = 0.2
_END_LIMIT_S = 10.0
_GRACE_S = 1.0  # for one that has closed its link and is about to end


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a piece."""

    output: bytes  # what it wrote; at most as many bytes as were asked for
    num_bytes: int  # that it wrote
    over: str | None = None  # why there is no interpreter any more
    ended: Done | None = None  # with `over`


class Interpreters:
    """Interpreters of one fork server, which starts with the first. Threads may share it; each interpreter is one
    thread's at a time.

    Raises SandboxUnavailable where no wall holds, and GraderDown where the fork server cannot be kept alive.
    """

    def __init__(
        self, *, limits: Limits, preload: Sequence[str], tiers: Sequence[str] = TIERS, max_interpreters: int = 512
    ) -> None:
        self.limits, self.max_interpreters = limits, max_interpreters
        self._preload, self._tiers = tuple(preload), tuple(tiers)
        self._lock = threading.Lock()
        self._zygote: ZygoteClient | None = None
        self._ended: dict[int, Done] = {}  # by number, until somebody asks

    def open(self, limits: Limits | None = None) -> Interpreter:
        with self._lock:
            if self._zygote is None:
                self._zygote = start_zygote(tiers=self._tiers, num_slots=self.max_interpreters, preload=self._preload)
            self._collect(self._zygote)
            if not self._zygote.is_free:
                raise GraderDown(f"{self.max_interpreters} interpreters run at once, and no more may")
            number = self._zygote.send(Job(processes=cells(), limits=limits or self.limits))
            return Interpreter(self, self._zygote, number, self._zygote.flights[number])

    def describe(self) -> dict[str, object]:
        """tier, landlock_abi, ..., as `Sandbox.describe` has them."""
        self.open().close()
        assert self._zygote is not None
        return {key: value for key, value in self._zygote.hello.items() if key != "error"}

    def close(self) -> None:
        """Ends all. Safe to call twice."""
        with self._lock:
            self._forget()

    def end_of(self, zygote: ZygoteClient, number: int, *, is_ending: bool) -> Done | None:
        """How an interpreter ended, which is ended where it has not. None: its fork server is gone, and it too."""
        until_s = time.monotonic() + _END_LIMIT_S
        stop_s = time.monotonic() + (_GRACE_S if is_ending else 0.0)
        while True:
            with self._lock:
                if zygote is not self._zygote:
                    return None
                self._collect(zygote)
                if number in self._ended:
                    return self._ended.pop(number)
                if time.monotonic() >= stop_s:
                    zygote.stop(number)
                if time.monotonic() > until_s:
                    self._forget()
                    return None
                wait_for_answers([zygote], _LOOK_S)

    def _collect(self, zygote: ZygoteClient) -> None:
        try:
            while zygote.flights and wait_for_answers([zygote], 0):
                numbers = set(zygote.flights)
                done = zygote.receive()
                (number,) = numbers - set(zygote.flights)
                self._ended[number] = done
        except ZygoteDied:
            self._forget()

    def _forget(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
        self._zygote = None
        self._ended.clear()


class Interpreter:
    """One process. It is there until `Ran.over`, or `close`."""

    def __init__(self, owner: Interpreters, zygote: ZygoteClient, number: int, flight: Flight) -> None:
        assert flight.link is not None
        self._owner, self._zygote, self._number, self._link = owner, zygote, number, flight.link
        self._stdout = os.dup(flight.outputs[0][0])  # the flight closes its own when the process is buried
        self._limits = flight.job.limits
        self.is_over = False

    def run(self, source: str, *, limit_s: float, max_bytes: int) -> Ran:
        """limit_s: of wall time; whoever needs longer is ended, with all that it knew."""
        until_s = time.monotonic() + limit_s
        why = f"it ran longer than {limit_s:g} s"
        try:
            self._link.settimeout(limit_s)
            send_frame(self._link, json.dumps({"source": source}).encode())
            if self._is_done(until_s):
                return Ran(*self._written(max_bytes))
        except TimeoutError:
            pass
        except (OSError, EOFError, ValueError):
            why = ""
        written = self._written(max_bytes)
        return Ran(*written, *self._over(why))

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        self.end()

    def end(self, *, is_ending: bool = False) -> Done | None:
        """Ends it, and says how it ended. is_ending: by itself, it seems."""
        if self.is_over:
            return None
        self.is_over = True
        self._link.close()
        os.close(self._stdout)
        return self._owner.end_of(self._zygote, self._number, is_ending=is_ending)

    def _is_done(self, until_s: float) -> bool:
        """False: not in time. Raises EOFError, OSError or ValueError where it will not be."""
        received = bytearray()
        while take_frame(received) is None:
            if len(received) > _MAX_REPLY_BYTES:
                raise ValueError("no word that an interpreter has")
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return False
            poll = select.poll()
            poll.register(self._link, select.POLLIN)
            if poll.poll(left_s * 1000):
                data = self._link.recv(_MAX_REPLY_BYTES, socket.MSG_DONTWAIT)
                if not data:
                    raise EOFError
                received += data
        return True

    def _written(self, max_bytes: int) -> tuple[bytes, int]:
        """The beginning and the end of what is too long."""
        size = min(os.fstat(self._stdout).st_size, self._limits.output_bytes)
        if size <= max_bytes:
            return os.pread(self._stdout, size, 0), size
        half = max_bytes // 2
        head, tail = os.pread(self._stdout, half, 0), os.pread(self._stdout, half, size - half)
        return head + b"\n...\n" + tail, size

    def _over(self, why: str) -> tuple[str, Done | None]:
        done = self.end(is_ending=not why)
        if done is None or not done.ends:
            return why or "the sandbox lost it", done
        end = done.ends[0]
        reasons = {"cpu": "it was over its CPU time", "memory": "it was over its memory", "threads": "too many threads"}
        ended = f"it ended by signal {-end.code}" if end.code < 0 else f"it ended with status {end.code}"
        return reasons.get(end.reason) or why or ended, done
