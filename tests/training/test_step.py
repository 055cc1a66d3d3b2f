"""The straight line: what a step's gradient depends on, and what it must not depend on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opdkit.recipe import Recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.step import State, train_step
from opdkit.types import Asked, Group, Problem

Make = Callable[..., Recipe]
# The published sentences hold characters that the tiny tokenizer does not know.
WORDING = "context.wording={ layout = '{question}{success}{another}{failure}', " + ", ".join(
    f"{kind} = ';{{text}}'" for kind in ("success", "another", "failure", "feedback", "summary", "failed_summary")
)
PEERS = ("context.kind=peers", "context.feedback=never", WORDING + " }", "train.warmup_steps=0")
SOLUTION = ("context.kind=reference_solution", "context.template=prefix", "method.loss_temperature=1.0")
METHODS = [
    ("opd", ()),
    ("opd", ("method.support=sampled",)),
    ("opd", ("method.support=teacher_topk", "method.k=4", "method.divergence=forward_kl", "method.reduction=sequence")),
    ("opd", ("method.support=sampled", "method.credit=group_return", "weights.tokens.name=position")),
    ("opd", ("weights.tokens.name=soft_or", "weights.importance.cap=1.5", "weights.prefix.gamma=0.5")),
    ("opd", ("method.support=sampled", "weights.tokens.name=entropy_sampling", "weights.tokens.gamma=1.0")),
    ("topk_opd", ("method.k=4", "method.support=union")),
    ("topk_opd", ("method.k=4", "method.support=symmetric_difference", "method.form=advantage")),
    ("opsd", ()),
    ("pw_opsd", SOLUTION),
    ("eopd", (*SOLUTION, "method.entropy_gate=2.0")),
    ("reopold", SOLUTION),
    ("reopold", (*SOLUTION, "method.switch_step=0", "weights.tokens.name=q3", "weights.tokens.keep=0.7")),
    ("grpo", ()),
    ("grpo", ("method.kl_weight=0.1", "teacher.kind=model", "teacher.path=$TEACHER")),
    ("grpo_opd", ("method.form=advantage", "method.support=sampled")),
    ("sft", ()),
    ("dpo", ()),
    ("simpo", ()),
    ("verified_sft", ()),
    ("mopd", (*PEERS, "method.importance_cap=2.0")),
    ("sdpo", (*PEERS, "teacher.weights=trust_region", "teacher.student_share=0.3", "method.without_context=dilute")),
]


def gradient(run: TrainingRun, problems: Sequence[Problem], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The gradient one step would apply."""
    seen: dict[str, Tensor] = {}

    def catch(step: int) -> Any:
        from opdkit.training.models.optimizer import StepResult

        for name, p in run.parts.optimizer.weights.items():
            seen[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    train_step(run.state, problems)
    return seen


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    flat_a, flat_b = (torch.cat([g.flatten().double() for g in grads.values()]) for grads in (a, b))
    assert flat_a.norm() > 0
    return float((flat_a - flat_b).norm() / flat_a.norm())


@pytest.mark.parametrize(("method", "overrides"), METHODS)
@pytest.mark.parametrize("max_tokens", [1, 50, 120])
def test_gradient_does_not_depend_on_micro_batches(
    method: str, overrides: tuple[str, ...], max_tokens: int, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ragged length, alone or together: the same gradient to 1e-6 (fp32 rounding). One process only."""
    run = start(recipe(method, *overrides))
    if run.state.method.needs.reward:  # a random student never earns one: give it some, so that there is a gradient
        sample = run.state.sample
        run.state.sample = lambda problems, step: [
            replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id)) for r in g.rollouts))
            for g in sample(problems, step)
        ]
    whole = gradient(run, run.problems[:5], monkeypatch)
    run.state.step, run.state.passes = 0, replace(run.state.passes, max_tokens=max_tokens)
    assert distance(whole, gradient(run, run.problems[:5], monkeypatch)) < 1e-6


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("opd", ("sampling.group_size=4", "train.share_prefixes=2")),
        ("opd", ("sampling.group_size=4", "train.share_prefixes=2", "model.gradient_checkpointing=true")),
        ("mopd", (*PEERS, "method.importance_cap=2.0", "train.share_prefixes=2")),
        ("opsd", ("sampling.group_size=4", "train.share_prefixes=2", "model.lora.r=4", "train.lr=1e-3")),
    ],
)
def test_what_is_shared_changes_no_gradient(
    method: str, overrides: tuple[str, ...], recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Siblings read as a tree by student and teachers, under checkpointing, several views, LoRA: the gradient of rows
    that are read alone, to 1e-5; and less is computed."""
    trees, alone = start(recipe(method, *overrides)), start(recipe(method, *overrides, "train.share_prefixes=false"))
    assert alone.state.passes.least_shared is None and alone.state.student.passes.least_shared is None
    assert distance(*(gradient(run, run.problems[:3], monkeypatch) for run in (trees, alone))) < 1e-5
    seen = {}
    for name, run in (("trees", trees), ("alone", alone)):
        run.state.step = 0
        seen[name] = {m.name: m.value for m in train_step(run.state, run.problems[:3])[1]}
    for part in ("score", "update"):
        assert seen["trees"][f"passes/{part}_distinct"] < 0.9 and seen["alone"][f"passes/{part}_distinct"] == 1
        assert seen["trees"][f"passes/{part}_padding"] == 1
    assert seen["trees"]["train/loss"] == pytest.approx(seen["alone"]["train/loss"], rel=1e-5, abs=1e-7)


def test_a_run_writes_down_how_rows_are_put_together(recipe: Make, start: Any) -> None:
    """What goes by the kind of device is in the recipe of the run; what was asked for stays."""
    written = start(recipe("opd", "train.fixed_tokens_per_pass=7")).recipe.as_dict()["train"]
    assert written["max_tokens_per_micro_batch"] == written["max_tokens_per_scoring_pass"] == 4096
    assert written["fixed_tokens_per_pass"] == 7 and written["share_prefixes"] == 64
    off = start(recipe("opd", "train.share_prefixes=false", "name=off")).recipe
    assert off.as_dict()["train"]["share_prefixes"] is False and off.on_device("cuda") == off


def test_gradient_does_not_depend_on_the_order_of_rows(
    recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same problems in another order: seeds come from identity, so the same answers and the same gradient."""
    run = start(recipe("opd"))
    forward = gradient(run, run.problems[:5], monkeypatch)
    run.state.step = 0
    assert distance(forward, gradient(run, run.problems[4::-1], monkeypatch)) < 1e-6


def test_a_teacher_equal_to_the_student_teaches_nothing(recipe: Make, start: Any, models: Any) -> None:
    """KL is zero, and so is its gradient: context, alignment and temperature are the same on both sides."""
    run = start(recipe("opd", f"teacher.path={models['student']}", "method.loss_temperature=0.7"))
    _, metrics = train_step(run.state, run.problems[:5])
    values = {m.name: m.value for m in metrics}
    assert values["train/loss"] == pytest.approx(0.0, abs=1e-6)
    assert values["train/grad_norm"] == pytest.approx(0.0, abs=1e-5)


def test_rows_without_context_leave_the_mean(recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem without a solution gives the teacher nothing to read: the gradient is that of the others, undiluted."""
    run = start(recipe("opsd"))
    problems = run.problems[:4]
    others = gradient(run, problems[:3], monkeypatch)
    run.state.step = 0
    rows, metrics = [], []
    original = train_step

    def keep(state: State, chosen: Sequence[Problem]) -> Any:
        rows[:], metrics[:] = original(state, chosen)
        return rows, metrics

    monkeypatch.setitem(gradient.__globals__, "train_step", keep)
    with_one_bare = gradient(run, [*problems[:3], replace(problems[3], solution=None)], monkeypatch)
    assert distance(others, with_one_bare) < 1e-6
    assert len(rows) == 8  # every row is kept and saved, also those that taught nothing
    assert {m.name: m.value for m in metrics}["teacher/num_rows_without_view"] == 2


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_rows_without_context_may_dilute_the_mean(
    reduction: str, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SDPO published it: 2 of 8 rows without context take their share, by rows or by tokens, of the others' mean."""
    keys = ("train.max_grad_norm=1e9", f"method.reduction={reduction}")
    run = start(recipe("opsd", *keys, "method.without_context=dilute"))
    *solved, bare = run.problems[:4]
    problems = [*solved, replace(bare, solution=None)]
    rows: list[Any] = []
    original = train_step

    def keep(state: State, chosen: Sequence[Problem]) -> Any:
        rows[:], metrics = original(state, chosen)
        return rows, metrics

    monkeypatch.setitem(gradient.__globals__, "train_step", keep)
    diluted = gradient(run, problems, monkeypatch)
    sizes = [1 if reduction == "sequence" else len(row.rollout.answer_ids) for row in rows]
    present = sum(size for size, row in zip(sizes, rows, strict=True) if row.view is not None)
    leaving = gradient(start(recipe("opsd", "name=leave", *keys)), problems, monkeypatch)
    assert present < sum(sizes)
    assert distance({n: g * (present / sum(sizes)) for n, g in leaving.items()}, diluted) < 1e-6


def test_contexts_longer_than_the_teachers_positions_leave_and_are_counted(recipe: Make, start: Any) -> None:
    """They are not cut anywhere: their rows leave the mean, under a count of their own."""
    run = start(recipe("opsd"))
    run.parts.teacher.model.max_positions = 40
    problems = [replace(p, solution=p.solution * (5 if i < 2 else 1)) for i, p in enumerate(run.problems[:5])]
    rows, metrics = train_step(run.state, problems)
    values = {m.name: m.value for m in metrics}
    assert values["teacher/num_rows_too_long"] == 4 and values["teacher/num_rows_without_view"] == 0
    assert [row.signal is None for row in rows] == [True] * 4 + [False] * 6


def test_kept_rows_say_what_the_teacher_said(recipe: Make, start: Any) -> None:
    """The saved log-probs, read in the loss from hidden states, are those the teacher gives when asked directly."""
    run = start(recipe("opd"))
    rows, _ = train_step(run.state, run.problems[:5])
    for row in rows:
        assert row.signal.hidden_TH is None
        (asked,) = run.parts.teacher.score(
            [row.view.context_ids], [row.rollout.answer_ids], Asked("sampled"), temperature=1.0
        )
        np.testing.assert_allclose(row.signal.sampled_logprob_T, asked.sampled_logprob_T, atol=1e-5)


def test_ungraded_answers_leave_grpo(recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer the grader could not judge is no zero: the gradient is that of the batch without it."""
    run = start(recipe("grpo", "sampling.group_size=3"))
    sample = run.state.sample

    def graded(rewards: tuple[float | None, ...], keep: int) -> Any:
        def with_rewards(problems: Sequence[Problem], step: int) -> list[Group]:
            return [
                replace(
                    g, rollouts=tuple(replace(r, reward=w) for r, w in zip(g.rollouts, rewards, strict=True))[:keep]
                )
                for g in sample(problems, step)
            ]

        return with_rewards

    run.state.sample = graded((1.0, 0.0, None), 3)
    with_ungraded = gradient(run, run.problems[:5], monkeypatch)
    run.state.sample, run.state.step = graded((1.0, 0.0, None), 2), 0
    assert distance(with_ungraded, gradient(run, run.problems[:5], monkeypatch)) < 1e-6


def test_several_updates_on_one_batch(recipe: Make, start: Any) -> None:
    """Two updates on four problems are an update on the first two and another on the last two, of answers that were all
    sampled before: the second sees ratios other than 1. The teacher's average follows once."""
    whole = start(recipe("grpo", "train.updates_per_step=2", "train.lr=0.01"))
    groups = whole.state.sample(whole.problems[:4], 0)
    groups = [replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id)) for r in g.rollouts)) for g in groups]
    whole.state.sample = lambda problems, step: groups
    rows, metrics = train_step(whole.state, whole.problems[:4])
    assert [row.rollout.key for row in rows] == [r.key for g in groups for r in g.rollouts]
    assert whole.state.step == 1 and len([m for m in metrics if m.name == "train/loss"]) == 2

    apart = start(recipe("grpo", "train.lr=0.01"))
    for half in (groups[:2], groups[2:]):
        apart.state.sample = lambda problems, step, half=half: half
        seen, _ = train_step(apart.state, [])
    assert all(torch.equal(p, apart.parts.optimizer.weights[n]) for n, p in whole.parts.optimizer.weights.items())
    for row, alone in zip(rows[len(rows) // 2 :], seen, strict=True):
        assert row.taught is not None and alone.taught is not None and row.rollout.answer_logprobs is not None
        assert (row.taught.student_logprob_T == alone.taught.student_logprob_T).all()
        assert abs(row.taught.student_logprob_T - np.asarray(row.rollout.answer_logprobs)).max() > 1e-3


def test_an_ungraded_batch_moves_nothing(recipe: Make, start: Any) -> None:
    """Every answer ungraded: no token counts, and neither momentum nor weight decay moves the student."""
    run = start(recipe("grpo", "train.weight_decay=0.1"))
    sample = run.state.sample

    def rewarded(reward: Any) -> Any:
        return lambda problems, step: [
            replace(g, rollouts=tuple(replace(r, reward=reward(r)) for r in g.rollouts)) for g in sample(problems, step)
        ]

    run.state.sample = rewarded(lambda r: float(r.sample_id))
    train_step(run.state, run.problems[:5])  # so that there is momentum
    before = {n: p.detach().clone() for n, p in run.parts.optimizer.weights.items()}
    run.state.sample = rewarded(lambda r: None)
    _, metrics = train_step(run.state, run.problems[5:10])
    values = {m.name: m.value for m in metrics}
    assert values["train/num_skipped_steps"] == 1 and values["rollout/num_ungraded"] == 10
    assert all(torch.equal(p, before[n]) for n, p in run.parts.optimizer.weights.items())


def test_non_finite_gradients_skip_the_step_and_are_counted(recipe: Make, start: Any) -> None:
    """A teacher that says NaN: weights, optimizer state and EMA stay as they were, bit for bit; the metric says so."""
    run = start(recipe("opsd", "teacher.weights=ema", "teacher.ema_rate=0.5"))
    train_step(run.state, run.problems[:5])  # so that there is momentum, and an average away from the student
    state = {**run.parts.optimizer.state(), **{f"ema {k}": v for k, v in run.parts.teacher.state().items()}}
    state = {k: v.clone() for k, v in state.items()}
    score = run.parts.teacher.score

    def broken(*args: Any, **kwargs: Any) -> Any:
        return [replace(s, hidden_TH=s.hidden_TH * torch.nan) for s in score(*args, **kwargs)]

    run.parts.teacher.score = broken
    before = {n: p.detach().clone() for n, p in run.parts.optimizer.weights.items()}
    _, metrics = train_step(run.state, run.problems[:5])
    assert {m.name: m.value for m in metrics}["train/num_skipped_steps"] == 1
    assert all(torch.equal(p, before[n]) for n, p in run.parts.optimizer.weights.items())
    after = {**run.parts.optimizer.state(), **{f"ema {k}": v for k, v in run.parts.teacher.state().items()}}
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)


def test_bfloat16_computes_but_float32_learns(recipe: Make, start: Any) -> None:
    """A 1e-6 step on weights of size 1 is lost in bfloat16; the float32 masters keep it; the computation is bf16."""
    run = start(recipe("opd", "model.dtype=bfloat16", "train.lr=1e-6", "train.warmup_steps=0"))
    before = {n: p.detach().clone() for n, p in run.parts.optimizer.weights.items()}
    hidden = run.parts.student.hidden([[5, 6]], [[7]], weights=run.parts.optimizer.compute_weights())
    assert hidden.dtype == torch.bfloat16
    train_step(run.state, run.problems[:5])
    for name, p in run.parts.optimizer.weights.items():
        assert p.dtype == torch.float32
        moved = (p - before[name]).abs().max()
        assert 0 < moved < 2e-6, name


def test_lora_leaves_the_base_bit_identical(recipe: Make, start: Any) -> None:
    """Three steps of OPSD with the adapter-off teacher: only adapters move, the teacher stays the base model."""
    run = start(recipe("opsd", "model.lora.r=4", "model.lora.alpha=8", "teacher.weights=adapter_off"))
    named = dict(run.parts.student.module.named_parameters())
    base = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
    adapter = {n: p.detach().clone() for n, p in named.items() if p.requires_grad}
    assert adapter and all(".lora_" in name for name in adapter)
    for _ in range(3):
        train_step(run.state, run.problems[:5])
    assert all(torch.equal(named[n], p) for n, p in base.items())
    assert any(not torch.equal(named[n], p) for n, p in adapter.items())


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_pairs_have_the_gradient_of_their_loss(
    method: str, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sampling to parameters: the step's gradient, from coefficients in small micro-batches, is autograd's of the
    loss written out on whole answers, and train/loss is that loss. The student has moved away from its reference."""
    run = start(recipe(method, "sampling.group_size=3", "train.max_grad_norm=1e9"))
    state, sample = run.state, run.state.sample
    with torch.no_grad():
        for p in state.optimizer.weights.values():
            p.mul_(1.1)
    groups = [
        replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id % 2)) for r in g.rollouts))
        for g in sample(run.problems[:3], 0)
    ]
    state.sample = lambda problems, step: groups
    state.passes = replace(state.passes, max_tokens=40)
    metrics: list[Any] = []
    original = train_step

    def keep(state: State, chosen: Sequence[Problem]) -> Any:
        rows, metrics[:] = original(state, chosen)
        return rows, metrics

    monkeypatch.setitem(gradient.__globals__, "train_step", keep)
    got = gradient(run, run.problems[:3], monkeypatch)

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompts, answers = [r.prompt_ids for r in rollouts], [r.answer_ids for r in rollouts]
    head, hidden_NH = state.student.head(), state.student.hidden(prompts, answers)
    logprob_NV = (hidden_NH @ head.weight_VH[: head.num_tokens].T).log_softmax(-1)
    logprob_N = logprob_NV.gather(-1, torch.tensor([i for a in answers for i in a])[:, None])[:, 0]
    if run.parts.teacher is not None:
        said = run.parts.teacher.score(prompts, answers, Asked("sampled"), temperature=1.0)
        logprob_N = logprob_N - torch.cat([torch.from_numpy(s.sampled_logprob_T) for s in said])
    h = [part.sum() if method == "dpo" else part.mean() for part in logprob_N.split([len(a) for a in answers])]
    beta, margin = (0.1, 0.0) if method == "dpo" else (2.0, 1.0)
    pairs = [(h[i + 1], h[i + j]) for i in range(0, 9, 3) for j in (0, 2)]  # the answer rewarded 1 against two of 0
    loss = -torch.stack([torch.nn.functional.logsigmoid(beta * (w - v) - margin) for w, v in pairs]).mean()
    names = list(state.optimizer.weights)
    wanted = dict(zip(names, torch.autograd.grad(loss, list(state.optimizer.weights.values())), strict=True))
    assert distance(wanted, got) < 1e-5
    assert {m.name: m.value for m in metrics}["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
