"""The trainer's end of one zygote: starts it, hands it jobs as descriptors, reads what they wrote after their end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from opdkit.tasks.base import GraderDown
from opdkit.tasks.sandbox.jobs import Done, End, Job, Process, Reason

# Nothing else is handed down: the trainer's environment holds credentials. Libraries must not start threads in a
# process that forks, and sets must have one order for a verdict to be reproducible.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
_BOOT = Path(__file__).with_name("boot.py")
_START_TIMEOUT_S = 120.0
_LATE_S = 60.0  # beyond every limit the zygote enforces; then it is the zygote that hangs
_MAX_REPLY_BYTES = 1 << 16
_MAX_ERROR_BYTES = 8192
_STARVED_FACTOR = 5  # as in zygote.py


class ZygoteDied(Exception):
    """With the last words of its standard error."""


class Flight:
    """One job under way."""

    def __init__(self, job: Job, slot: int, num_tries: int) -> None:
        self.job = job
        self.slot = slot
        self.num_tries = num_tries  # this one included
        self.outputs: list[tuple[int, int]] = []  # (stdout, stderr) of each process
        self.link: socket.socket | None = None  # to a process that is linked with us; whoever asked for it closes it
        wall_s = job.limits.as_message()["wall_s"]
        self.late_at_s = time.monotonic() + _STARVED_FACTOR * wall_s + _LATE_S


class ZygoteClient:
    """One zygote. ZygoteDied if it dies while it starts, GraderDown if it cannot. `hello`: tier, landlock_abi, ..."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.num_slots: int = configuration["num_slots"]
        self.flights: dict[int, Flight] = {}
        self._free_slots = list(range(self.num_slots))
        self._next_id = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = os.memfd_create("zygote-stderr")
        paths = [os.path.abspath(path) for path in sys.path]  # "" is the folder we are in
        settings = json.dumps({**configuration, "parent": os.getpid()})
        environment = _ENVIRONMENT | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        # No preexec_fn: that would run Python between fork and exec, in a copy of a multi-threaded trainer.
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_BOOT), json.dumps(paths), str(theirs.fileno()), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            cwd="/",
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the trainer, which then finishes its step
        )
        theirs.close()
        self.control = ours
        self._log = log
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _end, process, ours, log)
        ours.settimeout(_START_TIMEOUT_S)
        try:
            self.hello = self._receive()
            if self.hello["error"] is not None:
                raise GraderDown(f"the sandbox's fork server failed to start:\n{self.hello['error']}")
        except BaseException:
            self.close()
            raise

    @property
    def is_free(self) -> bool:
        return bool(self._free_slots)

    @property
    def is_late(self) -> bool:
        now_s = time.monotonic()
        return any(flight.late_at_s < now_s for flight in self.flights.values())

    def send(self, job: Job, num_tries: int = 1) -> int:
        """Starts a job; its number. `is_free` must be true. If the zygote is gone, `receive` will say so."""
        flight = Flight(job, self._free_slots.pop(), num_tries)
        message = {"slot": flight.slot, "num_processes": len(job.processes), "limits": job.limits.as_message()}
        ends: list[int] = []
        if len(job.processes) == 2:
            ends = [end.detach() for end in socket.socketpair()]
        elif job.processes[0].is_linked:
            flight.link, theirs = socket.socketpair()
            ends = [theirs.detach()]
        descriptors, lent = [], list(ends)
        for index, process in enumerate(job.processes):
            task, stdin = _sealed(json.dumps(dict(process.task)).encode()), _sealed(process.stdin)
            outputs = os.memfd_create("stdout"), os.memfd_create("stderr")
            flight.outputs.append(outputs)
            lent += [task, stdin]
            descriptors += [task, stdin, *outputs, *ends[index : index + 1]]
        number = self._next_id
        self.flights[number] = flight
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.control, [json.dumps({"id": number, **message}).encode()], descriptors)
        self._next_id += 1
        for descriptor in lent:
            os.close(descriptor)
        return number

    def stop(self, number: int) -> None:
        """Kills a job; `receive` will say that it ended."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.send(json.dumps({"stop": number}).encode())

    def receive(self) -> Done:
        """The next job that is over; blocks. ZygoteDied if there will be none."""
        reply = self._receive()
        flight = self.flights.pop(reply["id"])
        self._free_slots.append(flight.slot)
        ends = []
        for outputs, process, end in zip(flight.outputs, flight.job.processes, reply["ends"], strict=False):
            ends.append(_read_end(end, outputs, flight.job, process))
        _close_outputs(flight)
        setup_failures = [end.stderr for end, raw in zip(ends, reply["ends"], strict=True) if raw["reason"] == "setup"]
        error = reply["error"] or (
            f"a process could not shut itself in: {setup_failures[0]}" if setup_failures else None
        )
        return Done(job=flight.job, error=error, ends=() if error else tuple(ends))

    def close(self) -> None:
        """Ends all its processes. Safe to call twice, and in a process forked from the owner, where it only lets go."""
        for flight in self.flights.values():
            _close_outputs(flight)
        self.flights.clear()
        if self._owner_pid == os.getpid():
            self._finalizer()
        else:
            self._finalizer.detach()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self.control.recv(_MAX_REPLY_BYTES)
        except (ConnectionResetError, TimeoutError) as error:
            raise ZygoteDied(f"{error!r} {self._last_words()}") from error
        if not message:
            raise ZygoteDied(self._last_words())
        return cast(dict[str, Any], json.loads(message))

    def _last_words(self) -> str:
        return _tail(self._log).strip() or "it said nothing"


def wait_for_answers(zygotes: Sequence[ZygoteClient], timeout_s: float) -> list[ZygoteClient]:
    """Those whose `receive` will not block."""
    poll = select.poll()  # a trainer may have more descriptors than select.select takes
    for zygote in zygotes:
        poll.register(zygote.control, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(timeout_s * 1000)}
    return [zygote for zygote in zygotes if zygote.control.fileno() in ready]


def _read_end(end: Mapping[str, Any], outputs: tuple[int, int], job: Job, process: Process) -> End:
    stdout, stderr = outputs
    size = min(os.fstat(stdout).st_size, job.limits.output_bytes)
    return End(
        reason=cast(Reason, end["reason"]),
        code=end["code"],
        cpu_s=end["cpu_s"],
        wall_s=end["wall_s"],
        peak_mb=end["peak_mb"],
        stdout=os.pread(stdout, size, 0),
        stderr=_tail(stderr),
        is_output_full=size == job.limits.output_bytes,
    )


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _MAX_ERROR_BYTES, max(0, size - _MAX_ERROR_BYTES)).decode(errors="replace")


def _sealed(data: bytes) -> int:
    """A read-only file in memory."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _close_outputs(flight: Flight) -> None:
    for outputs in flight.outputs:
        for descriptor in outputs:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes], control: socket.socket, log: int) -> None:
    control.close()  # the zygote sees the end of its socket, kills its processes and exits
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    os.close(log)
