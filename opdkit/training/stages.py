"""What a [schedule] changes, step by step: the method, the weights and the sampling of the next step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.metrics import Metric
from opdkit.recipe import Recipe, recipe_at, scheduled_at, stage_starts
from opdkit.run.console import Console, say
from opdkit.training.answers import Answers
from opdkit.training.state import State


@dataclass(slots=True)
class Stages:
    """Called before every step. A function of the step alone, so a resumed run is in the stage it stopped in."""

    recipe: Recipe
    console: Console
    _said: int | None = field(default=None, init=False)  # the stage the console last spoke of

    def enter(self, state: State, answers: Answers) -> list[Metric]:
        """Change `state` and `answers` to the recipe of the step to come; returns `schedule/stage` (from 1) and every
        scheduled number, `schedule/<key>`."""
        if not self.recipe.schedule:
            return []
        now = recipe_at(self.recipe, state.step)
        state.method, state.weights, answers.recipe = now.method, now.weights, now
        state.temperature = now.sampling.temperature
        views = now.all_views
        state.viewers = {name: replace(viewer, context=views[name].context) for name, viewer in state.viewers.items()}
        answers.viewers = state.viewers
        starts, values = stage_starts(self.recipe), scheduled_at(self.recipe, state.step)
        number = sum(start <= state.step for start in starts)
        if number != self._said:
            self._said = number
            self._say(number, starts, values)
        numbers = {key: float(v) for key, v in values.items() if isinstance(v, int | float)}
        return [
            Metric("schedule/stage", float(number), "last"),
            *(Metric(f"schedule/{key}", value, "last") for key, value in numbers.items()),
        ]

    def _say(self, number: int, starts: list[int], values: dict[str, Any]) -> None:
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        say(self.console, f"stage {number} of {len(starts)}, from step {starts[number - 1] + 1} on: {told}")
