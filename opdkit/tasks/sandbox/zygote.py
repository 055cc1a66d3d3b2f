"""The fork server: a clean interpreter that imports everything once, shuts itself in, and forks one process per test.

    trainer -- one SOCK_SEQPACKET socket: JSON and descriptors --> zygote -- fork --> processes that confine themselves

It never reads a program or an output: those travel in memfds that it only hands on. It watches its processes (time,
memory, threads), kills what goes over, and reports how each ended. A process can write to its own descriptors 1 and 2
and, of a pair, to the other one; nothing it writes comes here. When the trainer ends, all this ends.

Runs in its own interpreter and single-threaded; never imported by the trainer.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from opdkit.tasks.sandbox import child, confine, tiers
from opdkit.tasks.sandbox.confine import MAX_THREADS, MIB, Size, Walls
from opdkit.tasks.sandbox.jobs import TIERS, UNSAFE
from opdkit.tasks.sandbox.preload import preload

_TICK_S = 0.02  # between two looks at the running processes
_MAX_MESSAGE_BYTES = 1 << 16
_MAX_DESCRIPTORS = 10  # two processes of four, and the two ends between them
_STARVED_FACTOR = 5  # a process that wants to run and may not gets so many times its wall time
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()


def serve(control_descriptor: int, configuration: Mapping[str, Any]) -> NoReturn:
    """configuration: parent (pid of the trainer), preload, num_slots, tiers, allow_unsafe."""
    control = socket.socket(fileno=control_descriptor)
    try:
        try:
            parent = os.pidfd_open(configuration["parent"])
        except OSError as error:
            refused = dict.fromkeys(TIERS, f"pidfd_open: {error.strerror} (Linux 5.3 has it)")
            _say(control, {"error": None, "tier": None, "refused": refused})
            os._exit(0)
        if os.getppid() != configuration["parent"]:
            os._exit(1)  # it died while we were starting
        hello, walls = _shut_in(parent, configuration)
    except BaseException:
        _say(control, {"error": traceback.format_exc()})
        os._exit(1)
    _say(control, hello)
    if walls is not None:
        _Zygote(control, parent, walls).serve()
    os._exit(0)


def _shut_in(parent: int, configuration: Mapping[str, Any]) -> tuple[dict[str, Any], Walls | None]:
    """Imports everything and enters the strongest tier; may return in a new process."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # when memory runs out, we and our processes go before the trainer
    os.environ.clear()
    absent = preload(configuration["preload"])
    atexit._clear()  # what the libraries registered is not for programs that end
    num_tasks = len(os.listdir("/proc/self/task"))
    if num_tasks != 1:
        raise RuntimeError(f"an import started {num_tasks - 1} threads; a process that forks must have none")
    first_uid = tiers.draw_user_ids(2 * configuration["num_slots"])
    walls: Walls | None
    refused: dict[str, str] = {}
    if configuration["allow_unsafe"]:
        walls = tiers.enter(UNSAFE, parent, first_uid)
    else:
        walls, refused = tiers.strongest(configuration["tiers"], parent, first_uid)
    hello: dict[str, Any] = {"error": None, "tier": walls and walls.tier, "refused": refused, "absent": absent}
    if walls is not None:
        hello |= {"landlock_abi": walls.landlock_abi, "user_per_process": walls.first_uid is not None}
    return hello, walls


@dataclass(slots=True, kw_only=True)
class _Process:
    pid: int
    pidfd: int
    ready: int  # a pipe that holds one byte once the process stood behind all walls
    job: _Job
    index: int  # in its job
    started_s: float
    reason: str | None = None  # why we killed it


@dataclass(slots=True, kw_only=True)
class _Job:
    id: int
    limits: dict[str, Any]
    processes: list[_Process] = field(default_factory=list)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None  # why it could not be started


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """What a process uses now, or its threads share."""

    state: bytes  # R: it runs, or would if a core were free. Z: its main thread is gone
    cpu_s: float
    num_threads: int
    resident_bytes: int


class _Zygote:
    def __init__(self, control: socket.socket, parent: int, walls: Walls) -> None:
        self.control = control
        self.parent = parent
        self.walls = walls
        self.pid = os.getpid()
        self.running: dict[int, _Process] = {}  # by pidfd
        gc.collect()
        gc.freeze()  # the collector then leaves the shared pages alone, and forks stay cheap
        self.size = Size.measure(walls.proc)

    def serve(self) -> None:
        """Returns when the trainer is gone."""
        poll = select.poll()
        for descriptor in (self.control.fileno(), self.parent):
            poll.register(descriptor, select.POLLIN)
        self.poll = poll
        next_look_s = 0.0
        while True:
            wait_s = max(0.0, next_look_s - time.monotonic()) if self.running else None
            for descriptor, _ in poll.poll(None if wait_s is None else wait_s * 1000 + 1):
                if descriptor in self.running:
                    self._bury(self.running.pop(descriptor))
                elif descriptor == self.parent or not self._take_job():
                    for process in self.running.values():
                        os.kill(process.pid, signal.SIGKILL)
                    return
            if self.running and time.monotonic() >= next_look_s:
                for job in {process.job.id: process.job for process in self.running.values()}.values():
                    self._look_at(job)
                next_look_s = time.monotonic() + _TICK_S

    def _take_job(self) -> bool:
        """Starts the processes of the next job; False when the trainer has closed the socket."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self.control, _MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS)
        except ConnectionResetError:
            return False
        if not message:
            return False
        request = json.loads(message)
        if "stop" in request:
            for process in [process for process in self.running.values() if process.job.id == request["stop"]]:
                self._kill(process, "stopped")
            return True
        job = _Job(id=request["id"], limits=request["limits"])
        each = len(descriptors) // request["num_processes"]
        try:
            for index in range(request["num_processes"]):
                own = descriptors[index * each : (index + 1) * each]
                job.processes.append(self._start(job, index, 2 * request["slot"] + index, own))
        except OSError as error:  # no more processes or descriptors on this machine
            job.error = f"cannot start a process: {error}"
            for process in job.processes:
                self._kill(process, "stopped")
            self._report_if_over(job)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _start(self, job: _Job, index: int, number: int, descriptors: list[int]) -> _Process:
        ready, writing = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(ready)
            os.close(writing)
            raise
        if pid == 0:
            self._become(job, number, descriptors, writing)
        os.close(writing)
        process = _Process(
            pid=pid, pidfd=os.pidfd_open(pid), ready=ready, job=job, index=index, started_s=time.monotonic()
        )
        self.running[process.pidfd] = process
        self.poll.register(process.pidfd, select.POLLIN)
        return process

    def _become(self, job: _Job, number: int, descriptors: list[int], ready: int) -> NoReturn:
        """In the new process. descriptors: task, stdin, stdout, stderr, and of a pair the socket to the other."""
        try:
            os.setsid()
            task_file, *kept = descriptors
            with os.fdopen(task_file, "rb") as file:
                task = json.loads(file.read())
            ready, ruleset = confine.arrange_descriptors(kept, ready, self.walls.landlock_ruleset)
            confine.confine(self.walls, self.size, job.limits, number=number, ruleset=ruleset, zygote=self.pid)
            os.write(ready, b"!")
            os.close(ready)
        except BaseException:
            with contextlib.suppress(BaseException):
                os.write(2, traceback.format_exc().encode())
            os._exit(1)
        child.run(task)

    def _look_at(self, job: _Job) -> None:
        """Kills what is over a limit. CPU time and memory are the job's: the process that uses most of it goes."""
        found = [(process, self._use(process)) for process in job.processes if process.index not in job.ends]
        uses = [(process, use) for process, use in found if use is not None]
        if not uses:
            return  # their ends are in the next poll
        cpu_s = sum(use.cpu_s for _, use in uses) + sum(end["cpu_s"] for end in job.ends.values())
        memory_bytes = sum(max(0, use.resident_bytes - self.size.resident_bytes) for _, use in uses)
        if cpu_s >= job.limits["cpu_s"]:
            self._kill(max(uses, key=lambda item: item[1].cpu_s)[0], "cpu")
        elif memory_bytes > int(job.limits["memory_mb"]) * MIB:
            self._kill(max(uses, key=lambda item: item[1].resident_bytes)[0], "memory")
        for process, use in uses:
            wall_s = time.monotonic() - process.started_s
            starved = use.state == b"R" and wall_s < _STARVED_FACTOR * job.limits["wall_s"]
            if use.num_threads > MAX_THREADS:
                self._kill(process, "threads")
            elif wall_s >= job.limits["wall_s"] and not starved:
                self._kill(process, "wall")

    def _use(self, process: _Process) -> _Use | None:
        """None: it has ended."""
        use = self._read_use(f"{process.pid}/stat")
        if use is None or use.state != b"Z":
            return use
        # Its main thread left by a system call of its own; for /proc the memory went along, but the others hold it.
        threads: list[_Use | None] = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            folder = os.open(f"{process.pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.walls.proc)
            try:
                threads = [self._read_use(f"{process.pid}/task/{thread}/stat") for thread in os.listdir(folder)]
            finally:
                os.close(folder)
        return replace(use, resident_bytes=max((one.resident_bytes for one in threads if one is not None), default=0))

    def _read_use(self, path: str) -> _Use | None:
        """path: below /proc; of a process or a thread. None: it has ended."""
        try:
            stat = os.open(path, os.O_RDONLY, dir_fd=self.walls.proc)
        except FileNotFoundError:
            return None
        try:
            fields = os.read(stat, 4096).rpartition(b")")[2].split()
        except ProcessLookupError:
            return None
        finally:
            os.close(stat)
        return _Use(
            state=fields[0],
            cpu_s=(int(fields[11]) + int(fields[12])) / _CLOCK_TICKS,
            num_threads=int(fields[17]),
            resident_bytes=int(fields[21]) * _PAGE,
        )

    def _kill(self, process: _Process, reason: str) -> None:
        process.reason = process.reason or reason
        os.kill(process.pid, signal.SIGKILL)  # our unreaped child, so the number cannot belong to anyone else

    def _bury(self, process: _Process) -> None:
        self.poll.unregister(process.pidfd)
        os.close(process.pidfd)
        _, status, usage = os.wait4(process.pid, 0)
        was_ready = os.read(process.ready, 1) == b"!"  # it held the only other end, so this cannot block
        os.close(process.ready)
        job, reason, code = process.job, process.reason, os.waitstatus_to_exitcode(status)
        if reason == "stopped" and code != -signal.SIGKILL:
            reason = None  # it had ended by itself, but after the other one
        cpu_s = usage.ru_utime + usage.ru_stime
        if not was_ready and reason is None:
            reason = "setup"
        elif reason is None and cpu_s + sum(end["cpu_s"] for end in job.ends.values()) >= job.limits["cpu_s"]:
            reason = "cpu"
        elif reason is None and usage.ru_maxrss * 1024 > self._max_resident_bytes(job):
            reason = "memory"
        job.ends[process.index] = {
            "reason": reason or "exit",
            "code": code,
            "cpu_s": cpu_s,
            "wall_s": time.monotonic() - process.started_s,
            "peak_mb": max(0.0, (usage.ru_maxrss * 1024 - self.size.resident_bytes) / MIB),
        }
        if process.index == 0:
            for other in job.processes[1:]:
                if other.index not in job.ends:
                    self._kill(other, "stopped")
        self._report_if_over(job)

    def _report_if_over(self, job: _Job) -> None:
        if len(job.ends) == len(job.processes):
            ends = [job.ends[index] for index in range(len(job.processes))]
            _say(self.control, {"id": job.id, "error": job.error, "ends": ends})
            job.processes.clear()  # a cycle less: whatever piles up here, every process forked later pays for

    def _max_resident_bytes(self, job: _Job) -> int:
        return self.size.resident_bytes + int(job.limits["memory_mb"]) * MIB


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the trainer is gone: the poll says so next
        control.send(json.dumps(message).encode())
