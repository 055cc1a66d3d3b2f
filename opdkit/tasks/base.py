"""What a task is: a name and a grader. Graders read text, never run in the trainer's thread of trust: the text is
hostile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from opdkit.types import Problem

Verdict = Literal["correct", "wrong", "no_answer", "timeout", "error"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """One graded answer.

    score is None only for verdict "error" (the grader itself failed, or the problem has no gold): the answer stays
    ungraded, is counted and shown, and is never taken for a zero.
    """

    score: float | None
    verdict: Verdict
    parsed: str | None = None  # the final answer as the grader read it; equal strings count as one vote in maj@n
    feedback: str | None = None

    @property
    def accuracy(self) -> float | None:
        """How right the answer is, whatever else the score rewards (format, length). None: not graded."""
        return self.score

    @property
    def numbers(self) -> Mapping[str, float]:
        """What else is known of the answer, by name; their means become the metrics `grading/<name>`."""
        return {}


class Task(Protocol):
    """What can be graded. Its options in a recipe are the keyword arguments it is made with (`options.py`).

    A task may also have
        needs_gold: bool     whether it cannot grade problems without a gold answer (default: it can)
        needs_tests: bool    whether it cannot grade problems without `meta["tests"]` (default: it can)
        can_grade(problem)   whether it has what it grades this problem by (default: yes)
        stats                a dataclass of counts since it was made; what grew in a step becomes metrics
        describe()           plain values for environment.json: what the answers were graded by
        main                 the task whose accuracy an evaluation measures (default: itself)
    """

    name: str

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grade (problem, answer text) pairs, in order. Never raises for anything the text holds."""
        ...

    def close(self) -> None:
        """Release workers. Safe to call twice."""
        ...


def can_grade(task: Task, problem: Problem) -> bool:
    """Whether it is any use to ask for a grade of an answer to the problem."""
    asked = getattr(task, "can_grade", None)
    return asked is None or bool(asked(problem))


class GraderDown(RuntimeError):
    """Nothing can be graded on this machine now, whatever the text; not the fault of an answer."""


@dataclass(frozen=True, slots=True)
class Option:
    """Beside the type of a task's keyword argument, as `Annotated[float, Option("...", above=0)]`: what a user is told
    of it, and the numbers it may be."""

    help: str
    above: float | None = None
    at_least: float | None = None
