"""Your own task: a file, or a module that can be imported, that a recipe names.

    task = "my_task.py"            what the file calls `grade` or `Task`
    task = "my_task.py:Strict"     another name in it
    task = "my_pkg.my_task"        the same with a module; from the current folder, too
    task = "my_pkg.my_task:Strict"

The name stands for a function `grade(problem, text, *, options...)` that returns a `Grade` or a number, or for a class
made with its options whose objects have `grade(items) -> list[Grade]`. It runs in a process of its own
(`_user_worker.py`), with your rights and environment, since it is your code. But it may loop, exit or crash: so it has a
time limit, is killed with everything it started, and only JSON comes back from it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks._worker import send_frame, take_frame
from opdkit.tasks.arguments import OptionArgument, argument_from_json, value_as_json
from opdkit.tasks.base import Crash, Grade, GraderDown, Task
from opdkit.types import Problem

START_LIMIT_S = 60.0  # of importing what the recipe names
_MAX_BATCH_TIMES = 10  # a class gets a batch at once, and for it so many times the limit of one answer, or fewer
_MAX_LOST_IN_A_ROW = 10  # answers on which the process was lost; then it grades nothing, and waiting costs hours
_CLOSE_LIMIT_S = 5.0
_LOOK_S = 0.2  # a process that has ended may have left the channel open in one it forked
_MAX_REPLY_BYTES = 1 << 28
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from opdkit.tasks._user_worker import serve; serve(int(sys.argv[2]))"
)


class _Failed(Exception):
    """No answer to a request; one sentence says why."""


class _Lost(_Failed):
    """And the process is gone."""


class _TooLong(_Lost):
    pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UserTask:
    """What a recipe's reference names, as its own process describes it. Called with options, it makes the task."""

    reference: str
    path: Path | None  # of the file; None: a module
    content: bytes | None  # of the file, when it was first read: this is what runs, also if it is edited during a run
    arguments: tuple[OptionArgument, ...]
    needs_gold: bool
    takes_batches: bool
    time_limit_s: float
    files: Mapping[str, tuple[str, str]]  # "", or " imports NAME" -> path, sha256

    @property
    def digests(self) -> dict[str, str]:
        return {part: digest for part, (_, digest) in self.files.items()}

    def __call__(self, **options: Any) -> Task:
        return WorkerTask(self, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGrade(Grade):
    """A grade from another process, with what it said besides."""

    said_accuracy: float | None
    said_numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        return self.said_accuracy

    @property
    def numbers(self) -> Mapping[str, float]:
        return self.said_numbers


_known: dict[tuple[str, Path], UserTask] = {}


def load_user_task(reference: str, known: Sequence[str]) -> UserTask:
    """Raises ValueError with one sentence: not there, broken, without end, or not a task. The same object as long as
    no file of it has changed."""
    module_name = reference.partition(":")[0]
    path = Path(module_name).expanduser() if module_name.endswith(".py") else None
    if path is None and "." not in module_name and ":" not in reference:
        raise ValueError(
            f'is not a task; known are {", ".join(known)}, or write your own: "file.py" or "package.module:name"'
        )
    if path is not None and not path.is_file():
        raise ValueError(f"there is no file {path} (looked up from {Path.cwd()})")
    found = _known.get((reference, Path.cwd()))
    if found is None or any(_sha256(Path(file)) != digest for file, digest in found.files.values()):
        path = None if path is None else path.resolve()
        found = _describe(reference, path, None if path is None else path.read_bytes())
        _known[reference, Path.cwd()] = found
    return found


def _describe(reference: str, path: Path | None, content: bytes | None) -> UserTask:
    process = _Process()
    try:
        said = process.ask(_import_request(reference, path, content), START_LIMIT_S)
        return UserTask(
            reference=reference,
            path=path,
            content=content,
            arguments=tuple(argument_from_json(argument) for argument in said["arguments"]),
            needs_gold=bool(said["needs_gold"]),
            takes_batches=bool(said["takes_batches"]),
            time_limit_s=float(said["time_limit_s"]),
            files={
                str(part): (
                    str(file),
                    hashlib.sha256(content).hexdigest() if content is not None and not part else str(digest),
                )
                for part, (file, digest) in said["files"].items()
            },
        )
    except _Lost as error:
        raise ValueError(
            f"{path or reference} cannot be imported: {error}; what is slow or may not return belongs into a function"
        ) from None
    except (_Failed, GraderDown, UserError) as error:
        raise ValueError(str(error)) from None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path or reference} was imported by a process that answers nonsense: {error!r}") from None
    finally:
        process.end()


class WorkerTask:
    """A user's task, graded in its own process: made at once, and again where it was lost.

    What it keeps in memory (models, caches, counts) lasts as long as the process does.
    """

    def __init__(self, user_task: UserTask, options: Mapping[str, Any]) -> None:
        """Raises UserError for options that its class refuses, or a class that cannot be made."""
        self.name = user_task.reference
        self._user_task, self._options = user_task, value_as_json(options)
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._num_lost_in_a_row = 0
        self._stats: dict[str, float] = {}  # of the process that is there
        self._stats_before: dict[str, float] = {}  # of those that are gone
        self._has: Mapping[str, Any] | None = None  # what else the task can do; None: it was not made yet
        with self._lock:
            self._start()

    @property
    def stats(self) -> Mapping[str, float]:
        names = self._stats.keys() | self._stats_before.keys()
        return {name: self._stats.get(name, 0.0) + self._stats_before.get(name, 0.0) for name in names}

    @property
    def describe(self) -> Any:
        return self._said("describe")

    @property
    def main(self) -> Any:
        return self._said("main")

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return self._grade(items, main=False)

    def close(self) -> None:
        """Lets the task close itself, and ends its process. Safe to call twice."""
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(_Failed, GraderDown, UserError):
                    self._process.ask({"do": "close"}, _CLOSE_LIMIT_S)
                self._forget()

    def _said(self, name: str) -> Any:
        """AttributeError where the user's task has none, as for any object."""
        if not (self._has or {}).get(name):
            raise AttributeError(f"the task {self.name} has no {name}")
        return self._describe if name == "describe" else _Main(self)

    def _describe(self) -> Any:
        try:
            with self._lock:
                return self._ask({"do": "describe"}, self._user_task.time_limit_s)["said"]
        except (_Failed, KeyError) as error:
            raise UserError(f"the task {self.name} cannot describe itself: {error}") from None

    def _grade(self, items: Sequence[tuple[Problem, str]], *, main: bool) -> list[Grade]:
        with self._lock:
            if self._user_task.takes_batches and len(items) > 1:
                with contextlib.suppress(_Failed):
                    return self._grades(items, main)
            return [self._alone(item, main) for item in items]  # so that a failure costs one answer

    def _alone(self, item: tuple[Problem, str], main: bool) -> Grade:
        try:
            return self._grades([item], main)[0]
        except _Failed as error:
            return Crash.because(str(error))

    def _grades(self, items: Sequence[tuple[Problem, str]], main: bool) -> list[Grade]:
        problems = {id(problem): problem for problem, _ in items}
        places = {key: place for place, key in enumerate(problems)}
        request = {
            "do": "grade",
            "problems": [_problem_as_json(problem) for problem in problems.values()],
            "items": [(places[id(problem)], text) for problem, text in items],
            "main": main,
        }
        reply = self._ask(request, self._user_task.time_limit_s * min(len(items), _MAX_BATCH_TIMES))
        try:
            grades: list[Grade] = [WorkerGrade(**said) for said in reply["grades"]]
            self._stats = {str(name): float(number) for name, number in reply["stats"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _Failed(f"its process answers nonsense: {error!r}") from None
        return grades

    def _ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Raises _Failed; GraderDown where the task says so, or its process is lost again and again."""
        process = self._start()
        try:
            reply = process.ask(request, limit_s)
        except _Lost as error:
            self._forget()
            self._num_lost_in_a_row += 1
            if self._num_lost_in_a_row >= _MAX_LOST_IN_A_ROW:
                times = f"{self._num_lost_in_a_row} times in a row"
                raise GraderDown(f"the task {self.name} graded nothing {times}; the last time {error}") from None
            hint = "; if it needs longer, give what grades a time_limit_s" if isinstance(error, _TooLong) else ""
            raise _Lost(f"{error}, and another started, without what it kept in memory{hint}") from None
        except (_Failed, UserError) as error:
            self._num_lost_in_a_row = 0
            raise _Failed(str(error)) from None
        except GraderDown:
            raise
        except BaseException:
            self._forget()  # e.g. Ctrl-C: what it is asked now must not answer the next request
            raise
        self._num_lost_in_a_row = 0
        return reply

    def _start(self) -> _Process:
        """The process, with the task in it. Raises UserError if the first cannot be made, GraderDown if a later one."""
        if self._process is not None and self._process.is_ours:
            return self._process
        task, process = self._user_task, _Process()
        try:
            said = process.ask(_import_request(task.reference, task.path, task.content), START_LIMIT_S)
            for part, (file, digest) in task.files.items():
                if said["files"].get(part) != [file, digest] and not (part == "" and task.content is not None):
                    raise UserError(
                        f"{file} has changed since it was first read; start again, for one grader throughout"
                    )
            limit_s = max(START_LIMIT_S, task.time_limit_s)
            self._has = process.ask({"do": "make", "options": self._options}, limit_s)
        except (_Failed, UserError) as error:
            process.end()
            sentence = f"the task {self.name} cannot be made: {error}"
            raise (GraderDown(sentence) if self._has is not None else UserError(sentence)) from None
        except BaseException:
            process.end()
            raise
        self._process = process
        return process

    def _forget(self) -> None:
        self._stats_before, self._stats = dict(self.stats), {}
        if self._process is not None:
            self._process.end()
        self._process = None


class _Main:
    """The task whose accuracy an evaluation measures, where the user's task has another one than itself."""

    def __init__(self, task: WorkerTask) -> None:
        self.name, self._task = task.name, task

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return self._task._grade(items, main=True)

    def close(self) -> None:
        self._task.close()


class _Process:
    """One process of `_user_worker.py` and the channel to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = json.dumps([os.path.abspath(path) for path in sys.path])  # "" is the folder we are in
        # No preexec_fn: that would run Python between fork and exec, in a copy of a multi-threaded trainer.
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-c", _BOOT, paths, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # the trainer's own standard output may be read by a program
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the trainer; and all that the task starts can be ended with it
        )
        theirs.close()
        ours.setblocking(False)
        self._channel, self._owner_pid = ours, os.getpid()
        self.end = weakref.finalize(self, _end, self._process, ours, self._owner_pid)

    @property
    def is_ours(self) -> bool:
        """Not in a process forked from the owner, which shares the channel and must not use it."""
        return self._owner_pid == os.getpid()

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """The reply. Raises _Failed, UserError or GraderDown, whichever the other side says; _Lost if it is gone, or was
        ended after `limit_s`."""
        until_s = time.monotonic() + limit_s
        try:
            payload = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise _Failed(f"the problem cannot be handed to its process: {error}") from None
        try:
            self._channel.settimeout(limit_s)
            send_frame(self._channel, payload)
            reply = json.loads(self._frame(until_s))
            fault, said = reply.get("fault"), str(reply.get("said"))
        except TimeoutError:
            self.end()
            raise _TooLong(f"there was no answer within {limit_s:g} s, so its process was ended") from None
        except (EOFError, OSError):
            raise _Lost(self._how_it_ended()) from None
        except (ValueError, AttributeError, RecursionError):
            self.end()
            raise _Lost("its process sent something else than an answer, and was ended") from None
        if fault is not None:
            raise {"user": UserError, "down": GraderDown}.get(fault, _Failed)(said)
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
            poll.register(self._channel, select.POLLIN)
            if poll.poll(min(left_s, _LOOK_S) * 1000):
                data = self._channel.recv(1 << 20)
                if not data:
                    raise EOFError
                received += data
            elif self._process.poll() is not None:
                raise EOFError
        return frame

    def _how_it_ended(self) -> str:
        self.end()
        code = self._process.returncode
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


def _import_request(reference: str, path: Path | None, content: bytes | None) -> dict[str, Any]:
    encoded = None if content is None else base64.b64encode(content).decode()
    return {"do": "import", "reference": reference, "path": None if path is None else str(path), "content": encoded}


def _problem_as_json(problem: Problem) -> dict[str, Any]:
    return {
        "id": problem.id,
        "task": problem.task,
        "messages": [dict(turn) for turn in problem.messages],
        "gold": problem.gold,
        "solution": problem.solution,
        "meta": dict(problem.meta),
    }


def _sha256(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return None
