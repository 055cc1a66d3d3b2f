"""No grader: the task of data that hold prompts alone, and of recipes that name none."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.tasks.base import Grade
from opdkit.types import Problem


class NoTask:
    """Rewards are unknown: for methods that need none, such as `opd`. What needs rewards refuses it."""

    name = "none"

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [Grade(score=None, verdict="error", feedback="not graded: the task is none") for _ in items]

    def close(self) -> None:
        pass
