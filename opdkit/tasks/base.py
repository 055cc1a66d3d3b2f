"""What a task is: a name and a grader. Graders read text, never run in the trainer's thread of trust: the text is
hostile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from opdkit.types import Problem

Verdict = Literal["correct", "wrong", "no_answer", "timeout", "error"]


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


class Task(Protocol):
    name: str

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grade (problem, answer text) pairs, in order. Never raises for anything the text holds."""
        ...

    def close(self) -> None:
        """Release workers. Safe to call twice."""
        ...
