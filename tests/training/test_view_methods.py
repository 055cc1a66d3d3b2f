"""One step of each method of several views, and of their control, on tiny models: the gradient is finite, not zero, and
does not depend on micro-batches; what the method says of the batch is there. Numbers by hand: tests/methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.recipe import Recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.step import train_step

# One wording for hints of both kinds, in characters that the tiny tokenizer knows.
WORDING = "wording={ layout = '{question}{success}{failure}', success = ';{text}', failure = ';{text}' }"
SOLUTION = ("context.kind=reference_solution", "context.template=prefix")
PEERS = ("context.kind=peers", "context.slots=['success']", "context.feedback=never", f"context.{WORDING}")
HINTS = (f"views.right.context.{WORDING}", f"views.wrong.context.{WORDING}", "views.wrong.count=2")
MODEL = ("teacher={ kind = 'model', path = '$TEACHER' }",)
METHODS = [
    ("exopd", MODEL),
    ("exopd", (*MODEL, "method.support=full")),
    ("rlsd", SOLUTION),
    ("rlcsd", HINTS),
    ("sr_opsd", (*SOLUTION, "method.k=4")),
    ("dopd", (*MODEL, *SOLUTION, "views.hinted.context.template=prefix", "method.k=4", "method.gap_cut=0.2")),
    ("opsa", ()),
    ("opsa", ("method.share_of=answer", "method.entropy_range_of=answer")),
    ("srpo", (*PEERS, "method.k=4")),
    ("i_sdpo", (*SOLUTION, "method.k=4")),
]


@pytest.fixture
def start(start: Callable[..., TrainingRun]) -> Callable[[Recipe], TrainingRun]:
    """With rewards, which a random student never earns: nobody solves the first problem, half of the answers the
    others."""

    def make(recipe: Recipe) -> TrainingRun:
        run = start(recipe)
        sample = run.state.sample
        run.state.sample = lambda problems, number: [
            replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id % 2 and n)) for r in g.rollouts))
            for n, g in enumerate(sample(problems, number))
        ]
        return run

    return make


def step(run: TrainingRun) -> tuple[Tensor, dict[str, float | None]]:
    """(flat gradient, metrics) of a step that is not applied."""
    seen: list[Tensor] = []
    weights = run.parts.optimizer.weights

    def catch(_: int) -> StepResult:
        seen.extend(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights.values())
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    run.parts.optimizer.step = catch  # type: ignore[assignment, method-assign]
    _, metrics = train_step(run.state, run.problems[:3])
    run.state.step = 0
    return torch.cat(seen).double(), {metric.name: metric.value for metric in metrics}


@pytest.mark.parametrize(("method", "overrides"), METHODS)
def test_a_step(method: str, overrides: tuple[str, ...], recipe: Callable[..., Recipe], start: Any) -> None:
    run = start(recipe(method, *overrides, "sampling.group_size=4", "train.warmup_steps=0", "diagnostics.every=0"))
    whole, metrics = step(run)
    assert whole.isfinite().all() and whole.norm() > 0
    loss = metrics["train/loss"]
    assert loss is not None and math.isfinite(loss)
    own = {name: value for name, value in metrics.items() if name.startswith("method/")}
    assert bool(own) == (method not in ("exopd", "sr_opsd"))
    assert all(value is None or math.isfinite(value) for value in own.values())
    run.state.passes = replace(run.state.passes, max_tokens=1)
    alone, _ = step(run)
    assert (whole - alone).norm() / whole.norm() < 1e-6


def test_branches_are_taken(recipe: Callable[..., Recipe], start: Any) -> None:
    """srpo distils the two failed answers of each solved problem, i_sdpo the four of the one that nobody solved; rlcsd
    has hints of both kinds for the answers of solved problems; equal rewards leave rlsd without a gradient."""
    four = ("sampling.group_size=4", "train.warmup_steps=0", "diagnostics.every=0")
    for method, overrides, num in (("srpo", PEERS, 4), ("i_sdpo", SOLUTION, 4)):
        _, metrics = step(start(recipe(method, *overrides, *four, "method.k=4")))
        assert metrics["method/num_answers_distilled"] == num
    _, metrics = step(start(recipe("rlcsd", *HINTS, *four)))
    assert metrics["views/right/num_rows_without_view"] == 4 and metrics["views/wrong/num_rows_without_view"] == 0
    assert (metrics["method/share_of_tokens_selected"] or 0) > 0
    silent = start(recipe("rlsd", *SOLUTION, *four))
    sample = silent.state.sample
    silent.state.sample = lambda problems, number: sample(problems[:1], number)
    gradient, metrics = step(silent)
    assert gradient.norm() == 0 and metrics["rollout/share_of_groups_with_one_reward"] == 1
