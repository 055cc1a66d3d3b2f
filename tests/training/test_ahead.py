"""Answers that wait in a checkpoint come back to their problems, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.training.ahead import Ahead
from opdkit.types import Group, Problem, Rollout

PROBLEMS = [Problem(id=name, task="none", messages=({"role": "user", "content": name},)) for name in "ab"]


def row(problem: str, sample: int, episode: int | None = None) -> Rollout:
    return Rollout(
        problem_id=problem, sample_id=sample, policy_version=0, prompt_ids=(1,), answer_ids=(sample,), episode=episode,
        answer_logprobs=None, answer_mask=np.ones(1, dtype=np.bool_), finish="stop",
    )  # fmt: skip


def ahead() -> Ahead:
    return Ahead(1, 4, lambda problems, step, version: list, lambda step: PROBLEMS, is_beside=False)


@pytest.mark.parametrize(
    "rows_of_b",
    [[row("b", 0), row("b", 1)], [row("b", 0, 0), row("b", 1, 1), row("b", 2, 1)]],
    ids=["turns", "an episode of two rows"],
)
def test_what_waited_comes_back(rows_of_b: list[Rollout]) -> None:
    """Also where the number of rows is no multiple of the number of problems."""
    before, after = ahead(), ahead()
    before._groups[1] = [
        Group(problem=PROBLEMS[0], rollouts=(row("a", 0), row("a", 1))),
        Group(problem=PROBLEMS[1], rollouts=tuple(rows_of_b)),
    ]
    after.restore(before.waiting(1))
    assert after._groups == before._groups


@pytest.mark.parametrize("kept", [slice(0, 3), slice(1, 4), slice(0, 2)])
def test_a_row_too_few_is_refused(kept: slice) -> None:
    """None is dropped in silence, and none is taken for another problem's."""
    whole = ahead()
    whole._groups[1] = [Group(problem=p, rollouts=(row(p.id, 0), row(p.id, 1))) for p in PROBLEMS]
    rows = whole.waiting(1)[1]
    with pytest.raises(UserError, match="not to the problems of that step"):
        ahead().restore({1: rows[kept]})
