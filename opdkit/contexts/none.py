"""The teacher reads what the student read: the problem, through the teacher's own chat template."""

from __future__ import annotations

from typing import Literal

from opdkit.contexts.base import Context, Cut, Reading
from opdkit.types import Group, Rollout


class NoContext(Context):
    kind: Literal["none"] = "none"

    def read(self, group: Group, rollout: Rollout, cut: Cut) -> Reading:
        return Reading(messages=group.problem.messages)
