"""Between a grader and the training loop: nothing a grader does stops a run, and everything it does is counted.

A grader that raises leaves the answer ungraded, never zero; the others of the batch are graded one by one. What was
counted since the last `drain` becomes metrics `grading/...`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from operator import or_
from typing import Any

from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.ranks.base import ALONE, Ranks
from opdkit.tasks.base import VERDICTS, Crash, Grade, GraderDown, Task, checked, place_and_fault, whole_text
from opdkit.tasks.final_text import final_channel
from opdkit.tasks.options import TaskOptions, resolve_task
from opdkit.tasks.sandbox import SandboxUnavailable
from opdkit.types import Problem

_FAILURES = (Exception, SystemExit)  # a library may call exit(); only Ctrl-C is the user's
_COUNTED_HERE = {"num_graded", *(f"num_{verdict}" for verdict in VERDICTS)}


@dataclass(slots=True)
class _Counts:
    verdicts: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, list[float]] = field(default_factory=dict)  # that answers have
    stats: dict[str, float] = field(default_factory=dict)  # what grew of the task's own counts
    num_crashes: int = 0
    seconds: float = 0.0

    def joined(self, other: _Counts) -> _Counts:
        numbers = {name: list(values) for name, values in self.numbers.items()}
        for name, values in other.numbers.items():
            numbers.setdefault(name, []).extend(values)
        return _Counts(
            self.verdicts + other.verdicts,
            numbers,
            {name: self.stats.get(name, 0.0) + other.stats.get(name, 0.0) for name in {**self.stats, **other.stats}},
            self.num_crashes + other.num_crashes,
            max(self.seconds, other.seconds),
        )


class GuardedTask:
    """A task that never raises for an answer. `main`: what an evaluation measures."""

    def __init__(self, task: Task, options: TaskOptions) -> None:
        self.name, self.options, self._task = options.name, options, task
        main = getattr(task, "main", task)
        self.main: GuardedTask = self if main is task else GuardedTask(main, options.main)
        self._counts = _Counts()
        self._crashes: Counter[str] = Counter()
        self._told: set[str] = set()

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """In order. Raises GraderDown and SandboxUnavailable alone: then the machine is at fault."""
        started, before = time.monotonic(), numbers_of(self._task)
        try:
            grades = self._checked(items)
        except (GraderDown, SandboxUnavailable):
            raise
        except _FAILURES:
            grades = [self._alone(item) for item in items]
        self._count(grades, before, time.monotonic() - started)
        return grades

    def can_grade(self, problem: Problem) -> bool:
        """Whether the problem holds what the task grades by."""
        return self.options.can_grade(problem)

    def close(self) -> None:
        close = getattr(self._task, "close", None)
        if close is not None:
            close()

    def describe(self) -> dict[str, Any]:
        """For environment.json: the task, every option, digests of the user's files, and what the task says itself."""
        said = self.options.model_dump(mode="json", exclude_none=True)
        if self.options.user_files:
            said["files"] = self.options.user_files
        describe = getattr(self._task, "describe", None)
        return said if describe is None else {**said, "runs": describe()}

    def try_out(self, problem: Problem) -> None:
        """Grades an empty answer. Raises UserError if that fails: better now than in the first step."""
        try:
            (grade,) = self._checked([(problem, "")])
        except (GraderDown, UserError):
            raise
        except _FAILURES as error:
            grade = Crash.because(place_and_fault(error, skip=__file__))
        if isinstance(grade, Crash):
            raise UserError(
                f"the task {self.name} fails on an empty answer to problem {whole_text(problem.id)}: {grade.why}; "
                "a grader must take any text"
            )

    def drain(self, ranks: Ranks = ALONE) -> list[Metric]:
        """What was counted since the last call, on all ranks."""
        told = ranks.gather((self._counts, self._crashes))
        counts, self._counts = reduce(_Counts.joined, (counts for counts, _ in told)), _Counts()
        self._crashes = reduce(or_, (crashes for _, crashes in told))
        if not counts.verdicts:
            return []
        sums = {f"num_{verdict}": float(counts.verdicts[verdict]) for verdict in VERDICTS}
        sums |= {"num_crashes": float(counts.num_crashes)}
        sums |= counts.stats
        means = {name: sum(numbers) / len(numbers) for name, numbers in counts.numbers.items()}
        return [
            *(Metric(f"grading/{name}", number, "sum") for name, number in sums.items()),
            *(Metric(f"grading/{name}", number) for name, number in means.items()),
            Metric("time/grading_s", counts.seconds, "sum"),
        ]

    def new_crashes(self) -> Iterator[str]:
        """A sentence for each kind of crash that was not told of yet, in training or evaluation."""
        if self.main is not self:
            yield from self.main.new_crashes()
        for crash in self._crashes.keys() - self._told:
            self._told.add(crash)
            yield f"the task {self.name} failed on an answer, which stays ungraded: {crash}"

    @property
    def num_crashes(self) -> int:
        """Since it was made."""
        return sum(self._crashes.values())

    def _alone(self, item: tuple[Problem, str]) -> Grade:
        try:
            return self._checked([item])[0]
        except (GraderDown, SandboxUnavailable):
            raise
        except _FAILURES as error:
            return Crash.because(place_and_fault(error, skip=__file__))

    def _checked(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Raises for what a grader must not return. Graders read what the answer says to its reader."""
        grades = self._task.grade([(problem, final_channel(text)) for problem, text in items])
        if len(grades) != len(items):
            raise ValueError(f"{len(grades)} grades for {len(items)} answers")
        return [checked(grade) for grade in grades]

    def _count(self, grades: Sequence[Grade], before: Mapping[str, float], seconds: float) -> None:
        counts = self._counts
        counts.seconds += seconds
        for name, number in numbers_of(self._task).items():
            counts.stats[name] = counts.stats.get(name, 0.0) + number - before.get(name, 0.0)
        for grade in grades:
            counts.verdicts[grade.verdict] += 1
            if isinstance(grade, Crash):
                counts.num_crashes += 1
                self._crashes[grade.why] += 1
            known = dict(grade.numbers)
            if grade.accuracy is not None:
                known["accuracy"] = grade.accuracy
            for name, number in known.items():
                counts.numbers.setdefault(name, []).append(float(number))


def make_task(options: TaskOptions, problems: Sequence[Problem] = ()) -> GuardedTask:
    """The task of a recipe, started, guarded, and tried out on `problems`. Raises UserError for what cannot start."""
    task = GuardedTask(options.make(), options)
    try:
        for problem in problems:
            task.try_out(problem)
    except BaseException:
        task.close()
        raise
    return task


def make_task_for(options: TaskOptions, sets: Sequence[Sequence[Problem]]) -> GuardedTask:
    """The task, tried out on the first problem of each set that it can grade; nobody where there is none: no sandbox
    need start for prompts alone. Raises UserError for what cannot start."""
    first_ones = [next(filter(options.can_grade, problems), None) for problems in sets]
    found = [problem for problem in first_ones if problem is not None]
    return make_task(options if found else resolve_task("none"), found)


def unknown_rewards(options: TaskOptions, problems: Sequence[Problem]) -> str | None:
    """A sentence about the problems that the task cannot grade; None: it can grade all of them."""
    count = sum(not options.can_grade(problem) for problem in problems)
    if not count:
        return None
    why = "data.task names no grader" if options.is_none else "they have no gold answer"
    return f"the rewards of {count} of {len(problems)} problems are unknown: {why}"


def task_named(line: str, *, flag: str = "--task", may_be_none: bool = False) -> TaskOptions:
    """The task that one line of text names, e.g. "tool_use feedback=reveal". Raises UserError, also for "none" where
    somebody must grade."""
    try:
        task = resolve_task(line)
    except ValueError as error:
        raise UserError(f"{flag} {line}: {error}") from None
    if task.is_none and not may_be_none:
        raise UserError(f"{flag} none has no grader, and one is needed here; name a task (`opdkit tasks`)")
    return task


def numbers_of(task: Task) -> dict[str, float]:
    """The task's own counts, flat, without those that are counted here."""
    return dict(_flat(getattr(task, "stats", None), ""))


def _flat(stats: Any, prefix: str) -> Iterator[tuple[str, float]]:
    if is_dataclass(stats) and not isinstance(stats, type):
        stats = {item.name: getattr(stats, item.name) for item in fields(stats)}
    if not isinstance(stats, Mapping):
        return
    for name, value in stats.items():
        if isinstance(value, int | float):
            if name not in _COUNTED_HERE:
                yield f"{prefix}{name}", value
        else:
            yield from _flat(value, f"{prefix}{name}/")
