"""[weights] and clips in the trainer: what forms logits, what is saved, what is said, what survives a resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from opdkit import losses
from opdkit.ranks.base import ALONE
from opdkit.recipe import Recipe
from opdkit.run.folder import RunFolder
from opdkit.training import plan
from opdkit.training import step as module
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.parts import Parts
from opdkit.training.saved import checkpoint
from opdkit.training.saved.keeper import Keeper
from opdkit.training.step import train_step

Make = Callable[..., Recipe]


def step(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, float | None], Tensor]:
    """(rows, metrics, flat gradient) of one step, which is not applied."""
    seen: list[Tensor] = []

    def catch(_: int) -> StepResult:
        seen.extend(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights.values())
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    weights = run.parts.optimizer.weights
    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    rows, metrics = train_step(run.state, run.problems[:5])
    return rows, {metric.name: metric.value for metric in metrics}, torch.cat(seen).double()


def rewarded(run: TrainingRun, *rewards: float | None) -> None:
    """Gives the answers to every problem these rewards: a random student never earns one."""
    sample = run.state.sample
    run.state.sample = lambda problems, number: [
        replace(g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True)))
        for g in sample(problems, number)
    ]


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_logits_with_gradient_are_formed_for_kept_tokens_only(
    keep: float, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the head's matrix product in the pass that learns are the kept tokens, floor(keep * T) of every
    answer: memory and time of logits fall with the share. The pass before it, without gradient, reads all tokens, in
    chunks of bounded size. Counts rows, not bytes."""
    run = start(recipe("opd", "weights.tokens.name=soft_or", f"weights.tokens.keep={keep}", "diagnostics.every=0"))
    formed: Counter[str] = Counter()
    phase = ["sampling"]

    def counted(head: Any, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        formed[phase[0]] += len(hidden)
        return project(head, hidden, out)

    def named(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def entered(*args: Any) -> Any:
            phase[0] = name
            return inner(*args)

        monkeypatch.setattr(module, name, entered)

    project = losses.Head.project
    monkeypatch.setattr(losses.Head, "project", counted)
    named(plan, "ask_student")
    named(module, "backward")
    rows, metrics, _ = step(run, monkeypatch)
    lengths = [len(row.rollout.answer_ids) for row in rows]
    kept = sum(max(1, int(keep * n)) for n in lengths)
    assert formed["backward"] == 2 * kept  # student and teacher
    assert formed["ask_student"] == 2 * sum(lengths)
    assert metrics["weights/share_of_tokens_counted"] == pytest.approx(kept / sum(lengths))
    assert metrics["loss/reverse_kl_tokens"] == kept


def test_keeping_everything_is_the_plain_loss(recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep = 1 and weights of 1 give the gradient without [weights]; keep = 0.5 another."""
    _, _, plain = step(start(recipe("opd")), monkeypatch)
    all_kept = ("weights.tokens.name=soft_or", "weights.tokens.keep=1.0", "weights.importance.cap=1e-9")
    _, _, same = step(start(recipe("opd", *all_kept, "weights.importance.mean_one=true")), monkeypatch)
    _, _, other = step(start(recipe("opd", "weights.tokens.name=soft_or")), monkeypatch)
    assert (same - plain).norm() < 1e-5 * plain.norm()
    assert (other - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize(("method", "keys"), [("opd", ()), ("grpo", ("teacher.kind=model", "teacher.path={teacher}"))])
def test_rows_know_the_teacher_at_every_token(
    method: str, keys: tuple[str, ...], recipe: Make, models: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pass before the update has read is saved for tokens that were not kept too, also where the method itself
    asks no teacher; hidden states never leave the step. Means over answers are those of all tokens."""
    keys = tuple(key.format(**models) for key in keys)
    run = start(recipe(method, *keys, "weights.tokens.name=soft_or", "weights.tokens.keep=0.3"))
    rewarded(run, 1.0, 0.0)
    rows, metrics, gradient = step(run, monkeypatch)
    assert gradient.norm() > 0
    for row in rows:
        assert row.signal.hidden_TH is None and np.isfinite(row.signal.sampled_logprob_T).all()
    everything = start(recipe(method, *keys, "weights.tokens.name=soft_or", "weights.tokens.keep=1.0", "name=all"))
    rewarded(everything, 1.0, 0.0)
    _, all_metrics, _ = step(everything, monkeypatch)
    for name in ("student/entropy", "student/logprob"):
        assert metrics[name] == pytest.approx(all_metrics[name], rel=1e-5)


def test_draws_do_not_depend_on_the_order_of_rows(recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds come from identity: the same problems in another order draw the same tokens, so the gradient is the same;
    another step draws others."""
    run = start(recipe("opd", "weights.tokens.name=entropy_sampling", "weights.tokens.keep=0.3"))
    _, _, forward = step(run, monkeypatch)
    run.state.step, run.problems[:5] = 0, run.problems[4::-1]
    _, _, backward = step(run, monkeypatch)
    assert (forward - backward).norm() < 1e-5 * forward.norm()


def test_paced_weighs_problems_and_says_whom_it_leaves_out(
    recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pass rates of 1/2 and 0: at mean one the first kind weighs all. Problems without a graded answer leave the mean;
    if nobody is sometimes solved, nothing is learned, which is no error."""
    run = start(recipe("opd", "weights.problems.name=paced", "weights.problems.pass_rate=refreshed"))
    sample = run.state.sample

    def reward(by_problem: dict[int, tuple[float | None, float | None]]) -> None:
        def graded(problems: Any, number: int) -> Any:
            return [
                replace(g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True)))
                for g, rewards in zip(sample(problems, number), by_problem.values(), strict=True)
            ]

        run.state.sample, run.state.step = graded, 0

    reward({0: (1.0, 0.0), 1: (1.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 0.0), 4: (None, None)})
    _, metrics, gradient = step(run, monkeypatch)
    assert metrics["weights/num_rows_without_weight"] == 6 and metrics["weights/max"] == 2.0
    assert metrics["weights/share_of_tokens_counted"] < 1 and gradient.norm() > 0
    reward(dict.fromkeys(range(5), (1.0, 1.0)))
    _, metrics, gradient = step(run, monkeypatch)
    assert gradient.norm() == 0 and metrics["train/loss"] == 0 and metrics["loss/reverse_kl"] is None
    assert metrics["weights/num_rows_without_weight"] == 10


def test_first_pass_rates_survive_a_resume(recipe: Make, start: Any, console: Console) -> None:
    """Fixed pass rates are in the checkpoint: a run that goes on weighs a problem as it did when it was first met."""
    run = start(recipe("opd", "weights.problems.name=paced", "train.max_grad_norm=1.0"))
    rewarded(run, 1.0, 0.0)
    train_step(run.state, run.problems[:5])
    assert run.state.pass_rates == {problem.id: 0.5 for problem in run.problems[:5]}
    folder = RunFolder(run.recipe.run_dir)
    Keeper(run.recipe, run.parts, run.state, folder, None, ALONE).save()
    saved = checkpoint.latest(folder.checkpoints)
    assert saved is not None
    again = TrainingRun(run.recipe, Parts(run.recipe, saved), run.data, {}, console)
    Keeper(again.recipe, again.parts, again.state, folder, None, ALONE).restore(saved)
    assert again.state.step == 1 and again.state.pass_rates == run.state.pass_rates


@pytest.mark.parametrize("clip", ["token", "entry", "none"])
def test_clips_are_reported(clip: str, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which share of tokens a clip acted on and how much of the loss it took; nothing where there is none. A token's
    mean loss is then at most 0.05."""
    run = start(recipe("opsd", f"method.clip={clip}", "method.divergence=reverse_kl"))
    _, metrics, _ = step(run, monkeypatch)
    shares = [metrics.get(f"loss/reverse_kl_share_of_{what}_clipped") for what in ("tokens", "loss")]
    if clip == "none":
        assert shares == [None, None] and metrics["loss/reverse_kl"] > 0.05
        return
    plain = start(recipe("opsd", "method.clip=none", "method.divergence=reverse_kl", "name=plain"))
    _, unclipped, _ = step(plain, monkeypatch)
    taken = 1 - metrics["loss/reverse_kl"] / unclipped["loss/reverse_kl"]
    assert shares[1] == pytest.approx(taken, rel=1e-4)
    assert 0 < shares[0] <= 1 and 0 < shares[1] < 1
    assert clip == "entry" or metrics["loss/reverse_kl"] <= 0.05
