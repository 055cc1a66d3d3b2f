"""What a task is: a name and a grader. Graders read text, never run in the trainer's thread of trust: the text is
hostile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from opdkit.types import Problem

Verdict = Literal["correct", "wrong", "no_answer", "timeout", "error"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def whole_text(text: str) -> str:
    """JSON of a model or a data set can name half a character ("\\ud800"), which no file can hold: it is escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


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

    def __post_init__(self) -> None:
        for name in ("parsed", "feedback"):
            if isinstance(text := getattr(self, name), str):
                object.__setattr__(self, name, whole_text(text))

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
        needs_gold: bool     whether problems without a gold answer are of use (default: they are)
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


class GraderDown(RuntimeError):
    """Nothing can be graded on this machine now, whatever the text; not the fault of an answer."""


@dataclass(frozen=True, slots=True)
class Option:
    """Beside the type of a task's keyword argument, as `Annotated[float, Option("...", above=0)]`: what a user is told
    of it, and the numbers it may be."""

    help: str
    above: float | None = None
    at_least: float | None = None
