"""Runs of episodes, trained, evaluated and resumed. The model is random and speaks digits; nothing is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train

TALK = '''
from opdkit.rollouts.environments.base import Grade, Step

class Talk:
    """Says a number after every turn, twice; some problems do not begin."""
    tools = ()
    def __init__(self, broken: bool = False):
        self.broken = broken
    def reset(self, problem, seed):
        if self.broken and int(problem.gold) % 3 == 0:
            raise RuntimeError("closed")
        self.turn = 0
        return problem.messages
    def step(self, action, seed):
        self.turn += 1
        if self.turn == 3:
            return Step(done=True, reward=0.25)
        return Step(messages=[{"role": "user", "content": str(seed % 100)}], reward=0.5 * (len(action.text) % 2))
'''


@pytest.fixture
def episodes(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    file = tmp_path / "talk.py"
    file.write_text(TALK)

    def make(method: str, *settings: str, broken: bool = False) -> Recipe:
        environment = f"{{ name = '{file}', broken = {str(broken).lower()} }}"
        limits = ("episode.max_turn_tokens=8", "episode.max_observation_tokens=6", "episode.workers=1")
        few = ("train.steps=2", "train.problems_per_step=4", "train.save_every=1", "data.limit=12", "eval.before=false")
        return recipe(method, f"episode.environment={environment}", *limits, *few, *settings)

    return make


def rows_of(recipe: Recipe) -> list[Any]:
    files = sorted((recipe.run_dir / "rows").glob("*.parquet"))
    return [row for file in files for row in load_rows(file)]


def test_a_run_of_episodes(episodes: Callable[..., Recipe], console: Any) -> None:
    chosen = episodes(
        "opd", "eval.data=arithmetic:merge-3:test", "eval.limit=3", "eval.samples=1", "eval.teacher=false"
    )
    train(chosen, console=console)
    rows = rows_of(chosen)
    assert len(rows) == 16
    for row in rows:
        rollout = row.rollout
        assert len(rollout.turns) == 3 and rollout.ended == "done"
        assert rollout.reward == pytest.approx(sum(turn.reward for turn in rollout.turns))
        assert (np.isnan(rollout.answer_logprobs) == ~rollout.answer_mask).all()
        assert row.taught is not None and (row.taught.coef_ST[:, ~rollout.answer_mask] == 0).all()
