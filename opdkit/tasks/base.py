"""What a task is: a name and a grader. Graders read text, never run in the trainer's thread of trust: the text is
hostile."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, Protocol, get_args

from opdkit.errors import UserError
from opdkit.types import Problem

Verdict = Literal["correct", "wrong", "no_answer", "timeout", "error"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MAX_TEXT_CHARACTERS = 1_000_000  # of `parsed`, and of `feedback`: both are saved with every answer


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash(Grade):
    """The grader failed on this answer, which stays ungraded and is counted. `why`: one line."""

    why: str

    @classmethod
    def because(cls, why: str, parsed: str | None = None) -> Crash:
        return cls(
            score=None, verdict="error", parsed=parsed, feedback=f"the grader failed: {why}", why=whole_text(why)
        )


def checked(grade: object) -> Grade:
    """Raises TypeError or ValueError for what a grader must not return."""
    if not isinstance(grade, Grade):
        raise TypeError(f"a grade is {type(grade).__name__}, not a Grade")
    if grade.score is not None and not isinstance(grade.score, Real):
        raise TypeError(f"a score is {type(grade.score).__name__}, not a number")
    if grade.score is not None and not math.isfinite(grade.score):
        raise ValueError(f"a score is {grade.score}")
    if (grade.score is None) != (grade.verdict == "error") or grade.verdict not in VERDICTS:
        raise ValueError(f'score {grade.score} with verdict "{str(grade.verdict)[:80]}"; None goes with "error" alone')
    for text in (grade.parsed, grade.feedback):
        if not isinstance(text, str | None):
            raise TypeError(f"parsed or feedback is {type(text).__name__}, not text")
        if text is not None and len(text) > MAX_TEXT_CHARACTERS:
            raise ValueError(f"parsed or feedback has {len(text):,} characters, over {MAX_TEXT_CHARACTERS:,}")
    return grade


def place_and_fault(error: BaseException, *, skip: str = "") -> str:
    """The exception in one line, with the last place of a file that is neither `skip` nor this one."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    place = next(
        (f for f in frames if f.filename not in (skip, __file__) and not f.filename.startswith("<frozen")), None
    )
    text = " ".join(str(error).split())[:300]
    where = f" ({Path(place.filename).name}:{place.lineno})" if place else ""
    return whole_text(f"{type(error).__name__}: {text}{where}")


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


class GraderDown(UserError, RuntimeError):
    """Nothing can be graded on this machine now, whatever the text; not the fault of an answer."""


@dataclass(frozen=True, slots=True)
class Option:
    """Beside the type of a task's keyword argument, as `Annotated[float, Option("...", above=0)]`: what a user is told
    of it, and the numbers it may be."""

    help: str
    above: float | None = None
    at_least: float | None = None
