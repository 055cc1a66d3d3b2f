"""What is saved of every token's part in the loss: it adds up to the loss, and shows masks, selections and clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opdkit.recipe import Recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step
from opdkit.types import Example

Make = Callable[..., Recipe]


@pytest.fixture
def step(console: Console) -> Iterator[Callable[[Recipe], Any]]:
    runs = []

    def make(recipe: Recipe, rewards: tuple[float | None, ...] = ()) -> tuple[list[Example], dict[str, float | None]]:
        run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, console)
        runs.append(run)
        sample = run.state.sample
        if rewards:  # a random student never earns one
            run.state.sample = lambda problems, number: [
                replace(g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True)))
                for g in sample(problems, number)
            ]
        rows, metrics = train_step(run.state, run.problems[:5])
        return rows, {metric.name: metric.value for metric in metrics}

    yield make
    for run in runs:
        run.close()


def counted_sum(rows: list[Example]) -> float:
    taught = [row.taught for row in rows if row.taught]
    return sum(float((t.coef_ST[t.coef_ST != 0].astype(float) * t.loss_ST[t.coef_ST != 0]).sum()) for t in taught)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("opd", ()),
        ("opd", ("method.support=sampled",)),
        ("opd", ("weights.tokens.name=soft_or", "weights.tokens.keep=0.5")),
        ("opsd", ("method.clip_at=0.02",)),
        ("topk_opd", ()),
        ("grpo_opd", ()),
    ],
)
def test_tokens_add_up_to_the_loss(method: str, keys: tuple[str, ...], recipe: Make, step: Any) -> None:
    """Coefficient times token loss, summed over every saved token, is the loss that metrics.jsonl reports."""
    rows, metrics = step(recipe(method, *keys))
    assert counted_sum(rows) == pytest.approx(metrics["train/loss"], rel=1e-4, abs=1e-6)
    assert all(row.taught is not None for row in rows)


def test_the_students_log_probs_are_those_it_sampled_with(recipe: Make, step: Any) -> None:
    """At temperature 1 nothing was cut off: sampling and the loss see one distribution. Entropy is not negative."""
    rows, _ = step(recipe("opd"))
    for row in rows:
        assert row.taught and row.rollout.answer_logprobs is not None and row.signal
        np.testing.assert_allclose(row.taught.student_logprob_T, row.rollout.answer_logprobs, atol=1e-4)
        assert (row.taught.student_entropy_T >= 0).all() and row.signal.sampled_logprob_T is not None


def test_a_selection_shows(recipe: Make, step: Any) -> None:
    """Half of every answer's tokens count; the others have coefficient 0, no loss, and are known all the same."""
    rows, _ = step(recipe("opd", "weights.tokens.name=soft_or", "weights.tokens.keep=0.5"))
    for row in rows:
        assert row.taught
        left_out = row.taught.coef_ST[0] == 0
        assert (~left_out).sum() == max(1, len(left_out) // 2)
        assert np.isnan(row.taught.loss_ST[0][left_out]).all()
        assert not np.isnan(row.taught.student_logprob_T).any()


def test_a_clip_shows(recipe: Make, step: Any) -> None:
    """The share of tokens flagged is the one in the metrics, and no flagged token's loss is above the clip."""
    rows, metrics = step(recipe("opsd", "method.clip_at=0.02"))
    flags = np.concatenate([row.taught.clipped_T for row in rows])
    losses = np.concatenate([row.taught.loss_ST[0] for row in rows])
    (share,) = [value for name, value in metrics.items() if name.endswith("_share_of_tokens_clipped")]
    assert 0 < flags.mean() < 1 and flags.mean() == pytest.approx(share)
    assert losses.max() <= 0.02 + 1e-6 and losses[flags] == pytest.approx(0.02)


def test_a_ppo_clip_shows(recipe: Make, step: Any) -> None:
    """Sampled from its three likeliest tokens, every ratio is below 1: where it is below 0.8, answers that did worse
    than their group are clipped, and the better ones are not. Recomputed here from what is saved."""
    rows, _ = step(recipe("grpo", "sampling.top_k=3"), rewards=(1.0, 0.0))
    num_clipped = 0
    for row in rows:
        assert row.taught and row.rollout.answer_logprobs is not None
        outside = np.exp(row.taught.student_logprob_T - row.rollout.answer_logprobs) < 0.8
        assert (row.taught.clipped_T == (outside & (row.rollout.reward == 0.0))).all()
        num_clipped += int(row.taught.clipped_T.sum())
    assert num_clipped > 0


def test_a_step_that_counts_nothing_says_so(recipe: Make, step: Any) -> None:
    """Ungraded answers give GRPO nothing to compare: the loss read no row, and no row claims that it did."""
    rows, _ = step(recipe("grpo"), rewards=(None, None))
    assert rows and all(row.taught is None for row in rows)
