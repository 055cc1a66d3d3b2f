"""A warm pool of killable worker processes, for graders that run library code on hostile text.

    trainer --- control socket ---> server (clean interpreter, imports the grader once, never sees an answer)
       |                               |  fork, a few milliseconds each
       +------ one socket each ------> workers (rlimits, then one request at a time)

The trainer is multi-threaded and may hold CUDA, so it never forks: the server is a fresh `sys.executable` with a fixed
environment, and only the server forks. Requests and replies are length-prefixed JSON; nothing is unpickled.

What is contained today: an answer that runs, allocates or recurses without end costs its own worker and nothing else.
CPU time per request is limited by the kernel (ITIMER_PROF, so a busy machine does not change verdicts), wall time by
SIGKILL from outside, address space, file size, descriptors and processes by rlimits; workers are replaced after
`recycle_after` requests and die with the trainer. What is NOT contained: a worker keeps the user's rights to read files
and to open sockets, so a handler must not execute text. A seccomp filter belongs in `_worker.confine`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from opdkit.tasks import _worker
from opdkit.tasks.base import GraderDown

Status = Literal["ok", "timeout", "memory", "crash"]

# Graders must give the same verdict in every worker, so hashing is fixed; maths libraries must not start threads in a
# process that forks. Of the trainer's environment, which holds credentials, only what Python may need to start.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
_INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME")
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from opdkit.tasks._worker import serve; serve(sys.argv)"
)
_START_TIMEOUT_S = 120.0  # importing sympy from a cold network file system is slow
_MAX_SERVER_DEATHS = 3  # in one batch; more is the machine's fault and must be seen
_MAX_ATTEMPTS = 2  # a request whose worker died for an unknown reason is tried once more


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request. `value`: the handler's answer if "ok"; if "crash", the exception or None."""

    status: Status
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """Counts since the pool was made."""

    num_requests: int = 0
    num_timeouts: int = 0
    num_memory: int = 0
    num_crashes: int = 0
    num_workers_started: int = 0
    num_servers_started: int = 0


class _ServerDied(Exception):
    """The fork server went away; every worker went with it."""


@dataclass(slots=True)
class _Worker:
    pid: int
    connection: socket.socket
    received: bytearray
    num_served: int = 0
    request: int | None = None  # index of the request in flight
    killed_at_s: float = 0.0  # wall deadline of that request


class WorkerPool:
    """Runs `handle(request)` of the module `handler` in killable processes. Starts at the first `map`.

    handler: a module with `handle(request: JSON) -> JSON` and `warm_up() -> None`; imported in the server, never here.
    cpu_s: CPU seconds one request may take. wall_s: wall seconds after which its worker is killed all the same.
    memory_mb: address space beyond what the warm server uses.
    """

    def __init__(
        self,
        handler: str,
        *,
        num_workers: int | None = None,
        cpu_s: float = 2.0,
        wall_s: float = 20.0,
        memory_mb: int = 1024,
        recycle_after: int = 1000,
    ) -> None:
        self.handler = handler
        self.num_workers = num_workers or min(8, usable_cores())
        self.wall_s = wall_s
        self.recycle_after = recycle_after
        self._limits = {"cpu_s": cpu_s, "memory_mb": memory_mb, "recycle_after": recycle_after}
        self._lock = threading.Lock()
        self._stats = PoolStats()
        self._workers: list[_Worker] = []
        self._control: socket.socket | None = None
        self._owner_pid = 0
        self._finalizer: weakref.finalize[..., WorkerPool] | None = None

    @property
    def stats(self) -> PoolStats:
        return self._stats

    def map(self, requests: Sequence[Any]) -> list[Outcome]:
        """One outcome per request, in order; workers take the next request as soon as they are free.

        Raises GraderDown if the server cannot be started (with its traceback) or kept alive; never for a request. A
        server that dies is started again, also if it dies while it starts.
        """
        with self._lock:
            return _Batch(self, requests).run()

    def close(self) -> None:
        """Ends all processes. Safe to call twice; a later `map` starts afresh."""
        with self._lock:
            self._forget()

    def _count(self, **increments: int) -> None:
        names = {field.name for field in fields(self._stats)}
        assert set(increments) <= names
        self._stats = replace(self._stats, **{k: getattr(self._stats, k) + n for k, n in increments.items()})

    def _ready_workers(self) -> list[_Worker]:
        """`num_workers` live, idle workers; starts what is missing. Raises _ServerDied."""
        if self._control is not None and self._owner_pid != os.getpid():
            # This process was forked from the owner: the sockets are shared with it and must not be used here.
            self._forget()
        if self._control is None:
            self._start_server()
        while len(self._workers) < self.num_workers:
            self._workers.append(self._spawn())
        return self._workers

    def _discard(self, worker: _Worker) -> int:
        """Kills and reaps one worker; its wait status. Raises _ServerDied."""
        worker.connection.close()
        self._workers.remove(worker)
        return self._command(_worker.KILL, worker.pid)[1]

    def _start_server(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [os.path.abspath(path) for path in sys.path]  # "" is the folder we are in
        limits = json.dumps(self._limits)
        # No preexec_fn: that would run Python between fork and exec, in a copy of a multi-threaded trainer.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(paths), str(theirs.fileno()), self.handler, limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **{name: os.environ[name] for name in _INHERITED if name in os.environ}},
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the trainer, which then finishes its step
        )
        theirs.close()
        self._control, self._owner_pid = ours, os.getpid()
        self._finalizer = weakref.finalize(self, _end_server, process, ours)
        ours.settimeout(_START_TIMEOUT_S)
        try:
            hello = json.loads(_worker.receive_frame(ours))
        except TimeoutError as error:
            self._forget()
            raise GraderDown(
                f"the worker server for {self.handler} did not start within {_START_TIMEOUT_S:g} s; is the disk that "
                "Python is installed on too slow, or the machine overloaded?"
            ) from error
        except (EOFError, OSError) as error:
            self._forget()
            raise _ServerDied("while it started") from error
        if hello["error"] is not None:
            self._forget()
            raise GraderDown(f"the worker server for {self.handler} did not start:\n{hello['error']}")
        self._count(num_servers_started=1)

    def _spawn(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            pid, _ = self._command(_worker.SPAWN, 0, theirs.fileno())
        self._count(num_workers_started=1)
        return _Worker(pid=pid, connection=ours, received=bytearray())

    def _command(self, code: bytes, pid: int, *descriptors: int) -> tuple[int, int]:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [_worker.COMMAND.pack(code, pid)], list(descriptors))
            reply = _worker.receive_exactly(self._control, _worker.REPLY.size)
        except (EOFError, OSError) as error:
            raise _ServerDied from error
        return cast(tuple[int, int], _worker.REPLY.unpack(reply))

    def _forget(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        self._workers = []
        self._control = None
        if self._finalizer is not None:
            if self._owner_pid == os.getpid():
                self._finalizer()
            else:
                self._finalizer.detach()
        self._finalizer = None


class _Batch:
    """One call of `map`: who works on what, and what came back."""

    def __init__(self, pool: WorkerPool, requests: Sequence[Any]) -> None:
        self.pool = pool
        self.requests = requests
        self.waiting = deque(range(len(requests)))
        self.num_attempts = [0] * len(requests)
        self.outcomes: list[Outcome | None] = [None] * len(requests)
        self.num_unfinished = len(requests)

    def run(self) -> list[Outcome]:
        num_deaths = 0
        while self.num_unfinished:
            try:
                self._run_until_done()
            except _ServerDied as error:
                num_deaths += 1
                if num_deaths > _MAX_SERVER_DEATHS:
                    self.pool._forget()
                    when = f" ({error}, the last time)" if str(error) else ""
                    raise GraderDown(
                        f"the worker server for {self.pool.handler} died {num_deaths} times{when}; is the machine out "
                        "of memory?"
                    ) from error
                in_flight = [worker.request for worker in self.pool._workers if worker.request is not None]
                self.pool._forget()
                for index in in_flight:
                    self._retry_or_give_up(index)
            except BaseException:
                self.pool._forget()  # e.g. Ctrl-C: the answers now in flight must not answer the next batch
                raise
        self.pool._count(num_requests=len(self.requests))
        return cast(list[Outcome], self.outcomes)

    def _run_until_done(self) -> None:
        with selectors.DefaultSelector() as selector:
            while self.num_unfinished:
                for worker in self.pool._ready_workers():
                    if worker.connection not in selector.get_map():
                        selector.register(worker.connection, selectors.EVENT_READ, worker)
                    if worker.request is None and self.waiting:
                        self._send(worker, self.waiting.popleft())
                busy = [worker for worker in self.pool._ready_workers() if worker.request is not None]
                now_s = time.monotonic()
                next_deadline_s = min((worker.killed_at_s for worker in busy), default=now_s)
                for key, _ in selector.select(max(0.0, next_deadline_s - now_s)):
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        self._bury(key.data, overdue=False)
                now_s = time.monotonic()
                for worker in [w for w in busy if w.request is not None and w.killed_at_s <= now_s]:
                    if worker in self.pool._workers:
                        selector.unregister(worker.connection)
                        self._bury(worker, overdue=True)
                for worker in [w for w in self.pool._workers if w.request is None]:
                    if worker.num_served >= self.pool.recycle_after:
                        selector.unregister(worker.connection)
                        self.pool._discard(worker)

    def _send(self, worker: _Worker, index: int) -> None:
        worker.request = index
        worker.killed_at_s = time.monotonic() + self.pool.wall_s
        self.num_attempts[index] += 1
        try:
            _worker.send_frame(worker.connection, json.dumps(self.requests[index]).encode())
        except OSError:
            return  # it died while idle: the selector reports the end of its socket next

    def _receive(self, worker: _Worker) -> bool:
        """Takes what has arrived; False if the worker is gone or talks nonsense."""
        try:
            data = worker.connection.recv(65536)
        except OSError:
            return False
        worker.received += data
        frame = _worker.take_frame(worker.received)
        if frame is None:
            return bool(data) and len(worker.received) <= _worker.MAX_FRAME_BYTES
        if worker.request is None:
            return False  # nothing was asked
        try:
            reply = json.loads(frame)
            outcome = Outcome(status=reply["status"], value=reply["value"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if outcome.status not in ("ok", "memory", "crash"):
            return False
        self._finish(worker.request, outcome)
        worker.request = None
        worker.num_served += 1
        return outcome.status == "ok"  # else the next request gets a fresh worker

    def _bury(self, worker: _Worker, *, overdue: bool) -> None:
        index, worker.request = worker.request, None
        try:
            status = self.pool._discard(worker)
        except _ServerDied:
            worker.request = index
            self.pool._workers.append(worker)  # so that `run` sees what was in flight
            raise
        if index is None:
            return
        out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
        if overdue or out_of_time:
            self._finish(index, Outcome(status="timeout"))
        else:
            self._retry_or_give_up(index)

    def _retry_or_give_up(self, index: int) -> None:
        if self.num_attempts[index] < _MAX_ATTEMPTS:
            self.waiting.appendleft(index)
        else:
            self._finish(index, Outcome(status="crash"))

    def _finish(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.num_unfinished -= 1
        if outcome.status == "timeout":
            self.pool._count(num_timeouts=1)
        elif outcome.status == "memory":
            self.pool._count(num_memory=1)
        elif outcome.status == "crash":
            self.pool._count(num_crashes=1)


def usable_cores() -> int:
    """Cores this process may run on (a container's share where the platform tells it), shared with the other ranks of
    its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // int(ranks) if ranks.isdigit() and ranks != "0" else cores)


def _end_server(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()  # the server sees the end of its socket, kills its workers and exits
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
