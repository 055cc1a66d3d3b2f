"""A reward of several terms: score = sum of weight x the score of a task. The first term is what is being learned.

Its verdict, parsed answer, feedback and accuracy are the grade's, and an evaluation measures it alone. The others
(`format`, `length`, another grader, your own) only move the score. A term that cannot grade an answer leaves it
ungraded: a sum with a hole in it would compare answers by what the graders happened to survive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from opdkit.errors import UserError
from opdkit.tasks.base import Crash, Grade, Option, Task
from opdkit.types import Problem


class WeightedTerm(NamedTuple):
    weight: float
    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGrade(Grade):
    main: Grade  # of the first term
    terms: Mapping[str, float]  # the score of each, before its weight

    @property
    def accuracy(self) -> float | None:
        return self.main.accuracy

    @property
    def numbers(self) -> Mapping[str, float]:
        return {**self.main.numbers, **{f"terms/{name}": score for name, score in self.terms.items()}}


class WeightedTask:
    name = "weighted"

    def __init__(
        self,
        *,
        terms: Annotated[
            Mapping[str, Any], Option('NAME = { weight = 1.0, task = "math" }, ...; the first is what is being learned')
        ],
    ) -> None:
        """terms: name -> `WeightedTerm` or (weight, task)."""
        if not terms:
            raise UserError("weighted needs at least one term")
        self._terms = {name: WeightedTerm(*term) for name, term in terms.items()}

    @staticmethod
    def warnings(options: Mapping[str, Any]) -> list[str]:
        name, first = next(iter(options["terms"].items()))
        if first.task.name not in ("format", "length"):
            return []
        return [f"the first term, {name}, is what an evaluation measures; put what is to be learned first"]

    @property
    def main(self) -> Task:
        first = next(iter(self._terms.values())).task
        return getattr(first, "main", first)

    @property
    def stats(self) -> Mapping[str, Any]:
        tasks = {name: term.task for name, term in self._terms.items()}
        return {name: task.stats for name, task in tasks.items() if hasattr(task, "stats")}

    def describe(self) -> dict[str, Any]:
        tasks = {name: term.task for name, term in self._terms.items()}
        return {name: task.describe() for name, task in tasks.items() if hasattr(task, "describe")}

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        graded = {name: term.task.grade(items) for name, term in self._terms.items()}
        return [self._sum({name: grades[row] for name, grades in graded.items()}) for row in range(len(items))]

    def close(self) -> None:
        for term in self._terms.values():
            term.task.close()

    def _sum(self, grades: Mapping[str, Grade]) -> Grade:
        main = next(iter(grades.values()))
        scores = {name: grade.score for name, grade in grades.items()}
        known = {name: score for name, score in scores.items() if score is not None}
        if len(known) < len(scores):
            name = next(name for name, score in scores.items() if score is None)
            reason = f"the term {name} is not graded: {grades[name].feedback or 'no reason given'}"
            if isinstance(grade := grades[name], Crash):
                return Crash.because(f"the term {name}: {grade.why}", main.parsed)
            return Grade(score=None, verdict="error", parsed=main.parsed, feedback=reason)
        return WeightedGrade(
            score=sum(self._terms[name].weight * score for name, score in known.items()),
            verdict=main.verdict,
            parsed=main.parsed,
            feedback=main.feedback,
            main=main,
            terms=known,
        )
