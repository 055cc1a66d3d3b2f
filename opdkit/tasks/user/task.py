"""Your own task: a file, or a module that can be imported, that a recipe names.

    task = "my_task.py"            what the file calls `grade` or `Task`
    task = "my_task.py:Strict"     another name in it
    task = "my_pkg.my_task"        the same with a module; from the current folder, too
    task = "my_pkg.my_task:Strict"

The name stands for a function `grade(problem, text, *, options...)` that returns a `Grade` or a number, for a reward
function of TRL's form (`rewards.py`), or for a class made with its options whose objects have `grade(items) ->
list[Grade]`. It runs in a process of its own
(`_user_worker.py`), with your rights and environment, since it is your code. It may loop, exit or crash, so it has a
time limit, is killed with everything it started, and only JSON comes back from it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks.arguments import value_as_json
from opdkit.tasks.base import Crash, Grade, GraderDown, Task, checked
from opdkit.tasks.user import imports
from opdkit.tasks.user.process import Failed, Lost, TooLong, UserProcess
from opdkit.types import Problem

WORKER = "opdkit.tasks.user._worker"
_MAX_BATCH_TIMES = 10  # a class gets a batch at once, and for it so many times the limit of one answer, or fewer
_MAX_LOST_IN_A_ROW = 10  # answers on which the process was lost; then it grades nothing, and waiting costs hours
_CLOSE_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UserTask(imports.UserCode):
    """A task as its own process describes it. Called with options, it makes the task. columns: those that a reward
    function asks for (`rewards.py`)."""

    needs_gold: bool
    takes_batches: bool
    time_limit_s: float

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


def load_user_task(reference: str, known: Sequence[str]) -> UserTask:
    """Raises ValueError as `imports.find`."""
    return imports.find(
        UserTask,
        reference,
        worker=WORKER,
        make=_described,
        slow="a function",
        unknown=f'is not a task; known are {", ".join(known)}, or write your own: "file.py" or "package.module:name"',
    )


def _described(said: Mapping[str, Any]) -> UserTask:
    return UserTask(
        **imports.fields_of(said),
        needs_gold=bool(said["needs_gold"]),
        takes_batches=bool(said["takes_batches"]),
        time_limit_s=float(said["time_limit_s"]),
    )


class WorkerTask:
    """A user's task, graded in its own process: made at once, and again where it was lost.

    What it keeps in memory (models, caches, counts) lasts as long as the process does.
    """

    def __init__(self, user_task: UserTask, options: Mapping[str, Any]) -> None:
        """Raises UserError for options that its class refuses, or a class that cannot be made."""
        self.name = user_task.reference
        self._user_task, self._options = user_task, value_as_json(options)
        self._lock = threading.Lock()
        self._process: UserProcess | None = None
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
                with contextlib.suppress(Failed, GraderDown, UserError):
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
        except (Failed, KeyError) as error:
            raise UserError(f"the task {self.name} cannot describe itself: {error}") from None

    def _grade(self, items: Sequence[tuple[Problem, str]], *, main: bool) -> list[Grade]:
        with self._lock:
            if self._user_task.takes_batches and len(items) > 1:
                with contextlib.suppress(Failed):
                    return self._grades(items, main)
            return [self._alone(item, main) for item in items]  # so that a failure costs one answer

    def _alone(self, item: tuple[Problem, str], main: bool) -> Grade:
        try:
            return self._grades([item], main)[0]
        except Failed as error:
            return Crash.because(str(error))

    def _grades(self, items: Sequence[tuple[Problem, str]], main: bool) -> list[Grade]:
        problems = {id(problem): problem for problem, _ in items}
        places = {key: place for place, key in enumerate(problems)}
        request = {
            "do": "grade",
            "problems": [problem_as_json(problem) for problem in problems.values()],
            "items": [(places[id(problem)], text) for problem, text in items],
            "main": main,
        }
        reply = self._ask(request, self._user_task.time_limit_s * min(len(items), _MAX_BATCH_TIMES))
        try:
            grades = [grade_from_json(said) for said in reply["grades"]]
            self._stats = {str(name): float(number) for name, number in reply["stats"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            self._forget()
            raise Failed(f"its process answered nonsense, and was ended: {error!r}") from None
        return grades

    def _ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Raises Failed; GraderDown where the task says so, or its process is lost again and again."""
        process = self._start()
        try:
            reply = process.ask(request, limit_s)
        except Lost as error:
            self._forget()
            self._num_lost_in_a_row += 1
            if self._num_lost_in_a_row >= _MAX_LOST_IN_A_ROW:
                times = f"{self._num_lost_in_a_row} times in a row"
                raise GraderDown(f"the task {self.name} graded nothing {times}; the last time {error}") from None
            hint = "; if it needs longer, give what grades a time_limit_s" if isinstance(error, TooLong) else ""
            raise Lost(f"{error}, and another started, without what it kept in memory{hint}") from None
        except GraderDown:
            raise
        except (Failed, UserError) as error:
            self._num_lost_in_a_row = 0
            raise Failed(str(error)) from None
        except BaseException:
            self._forget()  # e.g. Ctrl-C: what it is asked now must not answer the next request
            raise
        self._num_lost_in_a_row = 0
        return reply

    def _start(self) -> UserProcess:
        """The process, with the task in it. Raises UserError if the first cannot be made, GraderDown if a later one."""
        if self._process is not None and self._process.is_ours:
            return self._process
        task, process = self._user_task, UserProcess(WORKER)
        try:
            task.import_in(process)
            limit_s = max(imports.START_LIMIT_S, task.time_limit_s)
            self._has = process.ask({"do": "make", "options": self._options}, limit_s)
        except (Failed, UserError) as error:
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


def grade_from_json(said: Mapping[str, Any]) -> Grade:
    """A grade as another process sent it. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    accuracy, numbers = said["said_accuracy"], said["said_numbers"]
    return checked(
        WorkerGrade(
            score=said["score"],
            verdict=said["verdict"],
            parsed=said["parsed"],
            feedback=said["feedback"],
            said_accuracy=None if accuracy is None else float(accuracy),
            said_numbers={str(name): float(number) for name, number in numbers.items()},
        )
    )


def problem_as_json(problem: Problem) -> dict[str, Any]:
    """`Problem(**said)` with a tuple of messages is the problem again."""
    return {
        "id": problem.id,
        "task": problem.task,
        "messages": [dict(turn) for turn in problem.messages],
        "gold": problem.gold,
        "solution": problem.solution,
        "meta": dict(problem.meta),
        "columns": dict(problem.columns),
        "row": dict(problem.row),
    }
