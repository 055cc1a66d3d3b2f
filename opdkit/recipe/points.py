"""One key of a recipe over training: points of (fraction of the steps, value)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Points(BaseModel):
    """`steps`: a value holds from its point until the next. `linear`: numbers move on straight lines between points,
    and stay what they are before the first and after the last."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    points: tuple[tuple[float, Any], ...]  # fractions rise
    shape: Literal["steps", "linear"] = "steps"

    def defined_at(self, progress: float) -> bool:
        """Whether the key has a value of its own there; before, the recipe's holds."""
        return self.shape == "linear" or progress >= self.points[0][0]

    def at(self, progress: float) -> Any:
        """progress: steps taken / steps of the run."""
        assert self.defined_at(progress)
        if self.shape == "steps":
            return [value for fraction, value in self.points if fraction <= progress][-1]
        for (left, low), (right, high) in pairwise(self.points):
            if left < progress < right:
                share = (progress - left) / (right - left)
                return (1 - share) * low + share * high
        return next((v for fraction, v in reversed(self.points) if fraction <= progress), self.points[0][1])

    def as_toml(self) -> Any:
        points = [[fraction, value] for fraction, value in self.points]
        return points if self.shape == "steps" else {"points": points, "shape": self.shape}


def first_step(fraction: float, steps: int) -> int:
    """The first step, counted from 0, that is taken at or after this fraction of the run."""
    step = max(0, math.ceil(fraction * steps) - 1)  # 0.1 * 30 is a little more than 3: look from one below
    while step / steps < fraction:
        step += 1
    return step
