"""What every step says of itself: sampler against trainer, what taught nothing, what a teacher read, what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from opdkit.losses import group_centred
from opdkit.metrics import reduce_metrics
from opdkit.recipe import Recipe
from opdkit.reporting.page import write_report
from opdkit.run.history import History
from opdkit.run.sentinels import find
from opdkit.training.answers import Answers
from opdkit.training.loop import TrainingRun, train
from opdkit.training.step import train_step
from opdkit.types import Rollout

Make = Callable[..., Recipe]
WORDING = "context.wording={ layout = '{question}{success}{another}{failure}{feedback}', " + ", ".join(
    f"{kind} = ';{{text}}'" for kind in ("success", "another", "failure", "feedback", "summary", "failed_summary")
)
PEERS = ("context.kind=peers", "context.feedback=never", WORDING + " }", "train.warmup_steps=0", "diagnostics.every=0")
FOUR = ("sampling.group_size=4", "train.warmup_steps=0")
GAP = ("rollout/sampler_gap_bias", "rollout/sampler_gap_mean", "rollout/sampler_gap_p999")


def with_rollouts(run: TrainingRun, change: Callable[[Rollout], Rollout]) -> None:
    sample = run.state.sample
    run.state.sample = lambda problems, number: [
        replace(g, rollouts=tuple(change(r) for r in g.rollouts)) for g in sample(problems, number)
    ]


def values(run: TrainingRun) -> dict[str, float | None]:
    return reduce_metrics(train_step(run.state, run.problems[:4])[1])


def rewarded(monkeypatch: pytest.MonkeyPatch, *rewards: float | None) -> None:
    """Every group of a run has these rewards: a random student never earns one."""
    sampled = Answers.__call__

    def graded(self: Answers, problems: Any, step: int) -> Any:
        return [
            replace(g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True)))
            for g in sampled(self, problems, step)
        ]

    monkeypatch.setattr(Answers, "__call__", graded)


def told(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, list[dict[str, Any]]]:
    """(console, page as text, metrics) of a whole run."""
    train(recipe, console=Console(width=400))
    page = write_report(recipe.run_dir).read_text()
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return capsys.readouterr().out, page, lines


# Sampler and trainer


def gaps(seen: dict[str, float | None], chosen: Recipe) -> list[str]:
    return [one.sentence for one in find(History([{"step": 1, **seen}]), chosen) if one.name == "sampler_gap"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "cut", [(), ("sampling.top_p=0.7",), ("sampling.top_k=3",), ("sampling.min_p=0.1",), ("sampling.top_k=999",)]
)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_sampler_and_trainer_agree_to_rounding(
    dtype: str, cut: Any, temperature: float, recipe: Make, start: Any
) -> None:
    """Also where the recipe cuts: compared is the whole distribution of the same forward. Every token is."""
    keys = (f"sampling.temperature={temperature}", f"method.loss_temperature={temperature}", f"model.dtype={dtype}")
    run = start(recipe("opsd", *keys, *cut))
    seen = values(run)
    bias, mean, p999 = (seen[name] for name in GAP)
    rounding = 1e-5 if dtype == "float32" else 0.1
    assert abs(bias) <= mean <= p999 < rounding and seen["rollout/num_tokens_not_compared"] == 0
    assert not gaps(seen, run.recipe)


def test_the_gap_by_hand(recipe: Make, start: Any) -> None:
    """The sampler reports 0.03 nats too much of every token: sampler minus trainer, so the bias is +0.03."""
    run = start(recipe("opd"))
    with_rollouts(run, lambda r: replace(r, answer_logprobs=r.answer_logprobs + np.float32(0.03)))
    seen = values(run)
    assert [seen[name] for name in GAP] == pytest.approx([0.03] * 3, abs=1e-4)
    (sentence,) = gaps(seen, run.recipe)
    assert "differ by +0.03 nats in the mean and by 0.03 at the 99.9th percentile" in sentence
    assert "rounding in float32 stays within 0.001 and 0.05" in sentence


@pytest.mark.parametrize(
    ("dtype", "gap", "warned"),
    [
        ("float32", (0.0009, 0.01, 0.04), False),
        ("float32", (-0.0011, 0.01, 0.04), True),
        ("float32", (0.0, 0.01, 0.06), True),
        ("float32", (float("nan"), float("nan"), float("nan")), True),
        ("float32", (None, None, None), False),
        ("bfloat16", (0.019, 0.02, 0.49), False),
        ("bfloat16", (-0.021, 0.03, 0.49), True),
        ("bfloat16", (0.0, 0.02, float("inf")), True),
    ],
)
def test_limits_of_the_gap(dtype: str, gap: Any, warned: bool, recipe: Make) -> None:
    seen = {**dict(zip(GAP, gap, strict=True)), "rollout/num_rows": 8.0}
    assert len(gaps(seen, recipe("opd", f"model.dtype={dtype}"))) == warned
    other = "sentinels.sampler_gap=1.0", "sentinels.sampler_gap_p999=false"
    assert not [gap for gap in gaps(seen, recipe("opd", *other)) if "nan" not in gap]


@pytest.mark.parametrize(
    ("method", "keys", "share"),
    [
        ("opsd", ("sampling.temperature=0.7",), 1.0),
        ("opsd", ("sampling.temperature=0.0", "sampling.group_size=1"), 1.0),
        ("opd", ("method.answers=teacher",), 1.0),
        ("sft", (), 1.0),
        ("opd", ("train.updates_per_step=4",), None),
        ("grpo", ("train.updates_per_step=4",), None),
    ],
)
def test_what_is_not_comparable_is_counted(method: str, keys: Any, share: Any, recipe: Make, start: Any) -> None:
    """Another temperature, greedy answers, somebody else's answers: no number. Later updates: the first one's."""
    run = start(recipe(method, *keys))
    if method == "grpo":
        with_rollouts(run, lambda r: replace(r, reward=float(r.sample_id)))
    rows, metrics = train_step(run.state, run.problems[:4])
    seen, tokens = reduce_metrics(metrics), [len(row.rollout.answer_ids) for row in rows]
    if share is None:
        assert seen["rollout/num_tokens_not_compared"] == sum(tokens[len(tokens) // 4 :])
        assert seen[GAP[2]] < 1e-5
    else:
        assert seen["rollout/num_tokens_not_compared"] == share * sum(tokens)
        assert all(seen[name] is None for name in GAP)


def test_a_wide_gap_is_said_on_console_and_page(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = Answers.__call__

    def off(self: Answers, problems: Any, step: int) -> Any:
        return [
            replace(g, rollouts=tuple(replace(r, answer_logprobs=r.answer_logprobs - 0.1) for r in g.rollouts))
            for g in sampled(self, problems, step)
        ]

    monkeypatch.setattr(Answers, "__call__", off)
    console, page, _ = told(recipe("opd", "train.steps=3"), capsys)
    assert console.count("the sampler's log-probs are not the trainer's") == 1 and "warning step 1: " in console
    assert "Steps in which sampler and trainer disagreed on log-probs by more than rounding: 3." in page


# What taught nothing


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -2.7])
@pytest.mark.parametrize("std", ["unbiased", "none"])
def test_equal_rewards_have_an_advantage_of_exactly_0(reward: float, std: Any) -> None:
    """0.1 + 0.1 + 0.1 is not 3 * 0.1: what is left of it must be no advantage. A group of one keeps its reward."""
    rewards = torch.full((8,), reward, dtype=torch.float64)
    rewards[-1] = 5.0
    advantage = group_centred(rewards, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]), std)
    assert (advantage[:7] == 0).all() and advantage[7] != 0


@pytest.mark.parametrize(
    ("method", "keys", "rewards", "why"),
    [
        ("grpo", (), (0.0,) * 4, "no problem has two answers of different reward"),
        ("grpo", (), (0.1,) * 4, "(mean reward 0.1)"),
        ("grpo", (), (None,) * 4, "no answer could be graded"),
        ("dpo", (), (1.0,) * 4, "no problem has two answers of different reward"),
        ("simpo", (), (0.0,) * 4, "no problem has two answers of different reward"),
        ("verified_sft", (), (0.0,) * 4, "every token's gradient is zero, or no token is counted"),
        ("sdpo", (*PEERS, "context.slots=['success']"), (0.0,) * 4, "the teacher had nothing to read for any answer"),
    ],
)
def test_a_step_that_teaches_nothing_says_so(
    method: str,
    keys: Sequence[str],
    rewards: Any,
    why: str,
    recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once on the console with the reason, on the page with the number of such steps, in the summary's counts; and it
    moves nothing, by weight decay either. The page claims no learning."""
    rewarded(monkeypatch, *rewards)
    chosen = recipe(method, *FOUR, *keys, "train.steps=2", "train.weight_decay=0.1", "train.save_every=1")
    console, page, lines = told(chosen, capsys)
    assert console.count("the step taught nothing and changed nothing") == 1 and why in console
    assert [line["train/num_steps_without_gradient"] for line in lines] == [1, 1]
    assert [line["train/num_skipped_steps"] for line in lines] == [1, 1]
    assert "Steps that taught nothing" in page and "and it learned nothing." in page
    assert json.loads((chosen.run_dir / "summary.json").read_text())["counts"]["steps_without_gradient"] == 2
    first, second = (
        (chosen.run_dir / f"checkpoints/step_00000{n}/model/model.safetensors").read_bytes() for n in (1, 2)
    )
    assert first == second


def test_rewards_may_teach_nothing_beside_a_teacher(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GRPO with a teacher: its part goes on, the reward's is said to be nothing; the page claims only scores."""
    rewarded(monkeypatch, 0.0, 0.0, 0.0, 0.0)
    console, page, lines = told(recipe("grpo_opd", *FOUR, "train.steps=2"), capsys)
    assert (
        "the rewards gave no gradient, only the rest of the loss did" in console and "taught nothing and" not in console
    )
    assert lines[0]["train/num_steps_without_gradient"] == 0 and lines[0]["train/grad_norm"] > 0
    assert "a grader rewarded them, and it learned from the scores." in page


def test_a_step_that_taught_says_nothing(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewarded(monkeypatch, 1.0, 0.0, 0.0, 0.5)
    console, page, lines = told(recipe("grpo", *FOUR, "train.steps=2"), capsys)
    assert "taught nothing" not in console + page and lines[0]["train/num_steps_without_gradient"] == 0


# What a teacher was shown


@pytest.mark.parametrize(
    ("rewards", "keys", "shown"),
    [
        ((1.0, 1.0, 1.0, 0.0), (), {"success_success": 1 / 4, "success_success_failure": 3 / 4}),
        ((1.0, 0.0, 0.0, 0.0), (), {"failure": 1 / 4, "success_failure": 3 / 4}),
        ((0.0, 0.0, 0.0, 0.0), (), {"failure": 1.0}),
        ((1.0, 0.0, None, None), ("context.slots=['success']",), {"success": 3 / 4, "nothing": 1 / 4}),
        ((1.0, 1.0, 0.0, 0.0), ("context.control={ kind = 'random_peer' }", "context.slots=['success']"), None),
    ],
)
def test_what_was_shown_is_said_by_kind(rewards: Any, keys: Any, shown: Any, recipe: Make, start: Any) -> None:
    """Shares of all answers, in the order of the prompt; nobody is shown its own success. They add up to 1. A control's
    peers are not called successes."""
    run = start(recipe("mopd", *PEERS, *FOUR, *keys))
    with_rollouts(run, lambda r: replace(r, reward=rewards[r.sample_id]))
    seen = values(run)
    shares = {
        name.removeprefix("context/share_"): value
        for name, value in seen.items()
        if name.startswith("context/share_") and "/share_of_" not in name
    }
    assert sum(shares.values()) == pytest.approx(1)
    if shown is None:
        assert set(shares) == {"nothing", "random_peer"}
    else:
        assert shares == pytest.approx({"nothing": 0.0, **shown})
    assert seen["context/share_of_groups_with_success"] == float(1.0 in rewards)


def test_no_success_anywhere_is_said(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page tells what the teacher was shown, and does not repeat what the method shows where somebody is right."""
    rewarded(monkeypatch, 0.5, 0.0, 0.0, 0.0)
    console, page, _ = told(recipe("mopd", *PEERS, *FOUR, "train.steps=2"), capsys)
    assert console.count("no group has a success, so no teacher read a right answer: the best reward is 0.5") == 1
    assert "Steps in which no group had a success to show the teacher: 2." in page
    assert "Beside the problem the teacher was shown: failure for 40 of 40 (100 %) answers." in page
    assert "reads two right answers" not in page


def test_a_context_without_successes_asks_for_none(recipe: Make, start: Any) -> None:
    run = start(recipe("mopd", *PEERS, *FOUR, "context.slots=['failure']"))
    seen = values(run)
    assert "context/share_of_groups_with_success" not in seen and seen["context/share_failure"] == 1
    assert values(start(recipe("opsd")))["context/share_solution"] == 1
    assert not any(name.startswith("context/") for name in values(start(recipe("opd"))))


# What it cost


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_seconds_and_memory_of_every_step(method: str, recipe: Make, console: Console) -> None:
    """Parts of a step fit into it; on a CPU the peak is the process's, which is no less than Python with torch."""
    chosen = recipe(method, "train.steps=2")
    train(chosen, console=console)
    for line in (json.loads(text) for text in (chosen.run_dir / "metrics.jsonl").read_text().splitlines()):
        parts = [line[f"time/{part}_s"] for part in ("sample", "score", "update")]
        assert all(part >= 0 for part in parts) and 0 < sum(parts) <= line["time/step_s"]
        assert line["time/grading_s"] <= line["time/sample_s"]
        assert 0.05 < line["memory/peak_gib"] < 64
