"""Runs that are made, stepped by hand and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from opdkit.recipe import Recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data


@pytest.fixture
def start(console: Console) -> Iterator[Callable[..., TrainingRun]]:
    """rewards: of the answers to each problem, in order; a random student never earns one."""
    runs = []

    def make(recipe: Recipe, rewards: Sequence[float | None] = ()) -> TrainingRun:
        run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, console)
        runs.append(run)
        sample = run.state.sample
        if rewards:
            run.state.sample = lambda problems, number: [
                replace(g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True)))
                for g in sample(problems, number)
            ]
        return run

    yield make
    for run in runs:
        run.close()
