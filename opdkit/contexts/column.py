"""A column of the data set: a hint, a rubric, a plan, feedback, whatever stands beside each problem.

A problem without it has nothing to show: its answers leave the teacher's part of the loss, and are counted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdkit.contexts.base import Cut, Reading
from opdkit.contexts.beside import Beside
from opdkit.types import Group, Rollout


class Column(Beside):
    kind: Literal["column"] = "column"
    column: Annotated[str, Field(min_length=1)]  # dots go into a nested one

    @property
    def needs_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading | None:
        text = group.problem.columns.get(self.column)
        return self.beside(group.problem, text, cut) if text else None
