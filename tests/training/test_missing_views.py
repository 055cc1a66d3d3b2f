"""A row that lacks a view leaves the terms that need it, not the batch: its reward, its tokens and its place stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opdkit.recipe import Recipe
from opdkit.training import step as training_step
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.state import State
from opdkit.training.step import train_step
from opdkit.types import Asked, Example, Signal

Make = Callable[..., Recipe]
WORDING = "context.wording={ layout = '{question}{success}{another}{failure}', " + ", ".join(
    f"{kind} = ';{{text}}'" for kind in ("success", "another", "failure", "feedback", "summary", "failed_summary")
)
ONE_SUCCESS = ("context.kind=peers", "context.feedback=never", "context.slots=['success']", WORDING + " }")
FOUR = ("sampling.group_size=4", "train.warmup_steps=0", "diagnostics.every=0")
SELF = ("teacher={ kind = 'self', weights = 'initial' }",)
SOLUTION = ("context.kind=reference_solution", "context.template=prefix", "method.loss_temperature=1.0")


def step(run: TrainingRun, problems: Any = None) -> tuple[list[Example], dict[str, float | None], Tensor]:
    """(rows, metrics, flat gradient) of a step that is not applied."""
    seen: list[Tensor] = []
    weights, original = run.parts.optimizer.weights, run.parts.optimizer.step

    def catch(_: int) -> StepResult:
        seen.extend(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights.values())
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    run.parts.optimizer.step = catch  # type: ignore[method-assign]
    rows, metrics = train_step(run.state, run.problems[:4] if problems is None else problems)
    run.parts.optimizer.step, run.state.step = original, 0  # type: ignore[method-assign]
    return rows, {metric.name: metric.value for metric in metrics}, torch.cat(seen).double()


def apart(a: Tensor, b: Tensor) -> float:
    assert a.norm() > 0
    return float((a - b).norm() / a.norm())


def term(row: Example, name: str) -> Tensor:
    """[T] coefficient times loss of one term, 0 where it does not count the token."""
    assert row.taught is not None
    place = row.taught.terms.index(name)
    coef_T, loss_T = row.taught.coef_ST[place], row.taught.loss_ST[place]
    return torch.tensor(np.where(coef_T == 0, 0.0, coef_T * loss_T))


@pytest.fixture
def too_long_for_teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The teacher of a run says nothing of these rows of every step."""

    def make(run: TrainingRun, *rows: int) -> None:
        score = training_step.score

        def silent(state: State, groups: Any, views: Any, *rest: Any) -> list[dict[str, Signal]]:
            said = score(state, groups, views, *rest)
            return [{} if state is run.state and row in rows else signals for row, signals in enumerate(said)]

        monkeypatch.setattr(training_step, "score", silent)

    return make


@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, None), (0.5, 0.25, 1.0, 0.0)])
def test_the_only_success_keeps_its_reward(rewards: Any, recipe: Make, start: Any) -> None:
    """It has no other success to read: it leaves the teacher's term, and the reward's term is that of GRPO alone."""
    mixed = start(recipe("grpo_opd", *ONE_SUCCESS, *FOUR, *SELF), rewards)
    rows, metrics, _ = step(mixed)
    alone, _, _ = step(start(recipe("grpo", *FOUR, "method.reduction=token"), rewards))
    assert any(row.view is None for row in rows) == (rewards.count(1.0) == 1)
    for row, other in zip(rows, alone, strict=True):
        torch.testing.assert_close(term(row, "grpo"), term(other, "grpo"), rtol=1e-4, atol=1e-7)
        if row.view is None:
            assert row.taught is not None and (row.taught.coef_ST[row.taught.terms.index("reverse_kl")] == 0).all()
    tokens = sum(len(row.rollout.answer_ids) for row in rows if row.rollout.reward is not None)
    assert metrics["loss/grpo_tokens"] == tokens
    assert metrics["loss/reverse_kl_tokens"] == sum(len(r.rollout.answer_ids) for r in rows if r.view is not None)


def test_the_teachers_term_is_that_of_the_rows_it_reads(recipe: Make, start: Any) -> None:
    """Its mean is over the rows with a view, as in `sdpo` without a reward's term."""
    rewards = (1.0, 0.0, 0.0, 0.0)
    rows, _, _ = step(start(recipe("grpo_opd", *ONE_SUCCESS, *FOUR, *SELF), rewards))
    plain = ("method.divergence=reverse_kl", "method.support=full", "method.reduction=token", *SELF)
    alone, _, _ = step(start(recipe("sdpo", *ONE_SUCCESS, *FOUR, *plain), rewards))
    for row, other in zip(rows, alone, strict=True):
        assert (other.taught is None) == (row.view is None)
        if other.taught is not None:
            torch.testing.assert_close(term(row, "reverse_kl"), term(other, "reverse_kl"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "keys", [(), ("method.support=sampled", "method.form=advantage"), ("method.support=union", "method.k=4")]
)
def test_a_step_that_no_teacher_reads_still_has_its_rewards(keys: Any, recipe: Make, start: Any) -> None:
    """Nobody is right enough to be shown, but some are better than others: GRPO's gradient, exactly."""
    rewards = (0.5, 0.0, 0.25, 0.0)
    rows, metrics, mixed = step(start(recipe("grpo_opd", *ONE_SUCCESS, *FOUR, *SELF, *keys), rewards))
    _, _, alone = step(start(recipe("grpo", *FOUR, "method.reduction=token"), rewards))
    assert all(row.view is None for row in rows) and apart(alone, mixed) < 1e-6
    assert metrics["teacher/num_rows_without_view"] == 16


@pytest.mark.parametrize("estimate", ["k3", "exact"])
def test_rows_too_long_for_the_reference_keep_their_reward(
    estimate: str, recipe: Make, start: Any, too_long_for_teacher: Any
) -> None:
    """GRPO with a KL: the two rows lose that term alone, under a count of their own."""
    keys = (*SELF, "method.kl_weight=0.1", f"method.kl_estimate={estimate}", *FOUR)
    run = start(recipe("grpo", *keys), (1.0, 0.0, 1.0, 0.0))
    too_long_for_teacher(run, 0, 5)
    rows, metrics, gradient = step(run)
    assert metrics["teacher/num_rows_too_long"] == 2 and gradient.isfinite().all()
    alone, _, _ = step(start(recipe("grpo", *FOUR), (1.0, 0.0, 1.0, 0.0)))
    for row, other in zip(rows, alone, strict=True):
        torch.testing.assert_close(term(row, "grpo"), term(other, "grpo"), rtol=1e-4, atol=1e-7)
        assert (row.signal is None) == bool((torch.tensor(row.taught.coef_ST[1]) == 0).all())  # type: ignore[union-attr]


def test_an_answer_without_a_reference_is_in_no_pair(recipe: Make, start: Any, too_long_for_teacher: Any) -> None:
    """DPO: the gradient is that of a batch in which these answers are not graded."""
    rewards = (1.0, 0.0, 0.5, 0.0)
    run = start(recipe("dpo", *FOUR), rewards)
    too_long_for_teacher(run, 0, 6)
    _, _, lacking = step(run)
    other = start(recipe("dpo", *FOUR), rewards)
    sample = other.state.sample
    keys = [(run.problems[0].id, 0), (run.problems[1].id, 2)]
    other.state.sample = lambda problems, number: [
        replace(g, rollouts=tuple(replace(r, reward=None) if r.key in keys else r for r in g.rollouts))
        for g in sample(problems, number)
    ]
    _, _, ungraded = step(other)
    assert apart(ungraded, lacking) < 1e-6


@pytest.mark.parametrize("method", ["simpo", "verified_sft", "grpo"])
@pytest.mark.parametrize("weights", [("tokens.name=soft_or",), ("prefix.gamma=1.0",)])
def test_what_cannot_be_compared_is_kept_whole(
    method: str, weights: Any, recipe: Make, start: Any, too_long_for_teacher: Any, models: Any
) -> None:
    """A method without a teacher, [weights] with one: rows it says nothing of keep every token at weight 1, counted;
    the others are weighed as ever. Where it says nothing at all, the gradient is that without [weights]."""
    keys = ("teacher.kind=model", f"teacher.path={models['teacher']}", *(f"weights.{w}" for w in weights), *FOUR)
    run = start(recipe(method, *keys), (1.0, 0.0, 1.0, 0.0))
    too_long_for_teacher(run, 0, 5)
    rows, metrics, _ = step(run)
    assert metrics["weights/num_rows_not_compared"] == 2
    if "soft_or" in weights[0]:
        counted = sum(len(r.rollout.answer_ids) // (1 if r.signal is None else 2) or 1 for r in rows)
        assert metrics["weights/share_of_tokens_counted"] == pytest.approx(counted / metrics["rollout/tokens"])
    silent = start(recipe(method, *keys), (1.0, 0.0, 1.0, 0.0))
    too_long_for_teacher(silent, *range(16))
    _, _, nothing = step(silent)
    _, _, plain = step(start(recipe(method, *FOUR), (1.0, 0.0, 1.0, 0.0)))
    assert apart(plain, nothing) < 1e-6


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("opsd", ("weights.tokens.name=soft_or",)),
        ("opsd", ("weights.tokens.name=q3", "weights.tokens.keep=0.5")),
        ("opsd", ("weights.tokens.name=entropy_sampling", "weights.tokens.gamma=1.0")),
        ("opsd", ("weights.tokens.name=entropy_sampling",)),
        ("opsd", ("weights.importance.mean_one=true",)),
        ("opsd", ("weights.importance.mean_one=true", "weights.importance.level=sequence")),
        ("opsd", ("weights.prefix.gamma=1.0", "method.reduction=sequence")),
        ("opsd", ("method.support=teacher_topk", "method.k=4", "weights.tokens.name=position")),
        ("pw_opsd", ()),
        ("eopd", ("method.entropy_gate=2.0",)),
        ("reopold", ()),
        ("reopold", ("method.switch_step=0",)),
        ("sdpo", ("method.importance_cap=2.0",)),
        ("opd", ("method.support=sampled", "method.credit=group_return", *SELF)),
        ("opd", ("method.support=sampled", "method.advantage_from=sampler", *SELF)),
    ],
)
def test_rows_that_no_term_can_count_leave_no_trace(method: str, keys: Any, recipe: Make, start: Any) -> None:
    """A problem without a solution gives the teacher nothing to read: neither its tokens nor any statistic of [weights]
    over the batch (quantiles, means, sums along answers) touch the gradient of the others."""
    keys = (
        *SOLUTION,
        "sampling.temperature=1.0",
        "sampling.top_p=1.0",
        "sampling.top_k=0",
        *keys,
        "train.warmup_steps=0",
    )
    run = start(recipe(method, *keys), (1.0, 0.0))
    problems = run.problems[:4]
    _, _, others = step(run, problems[:3])
    rows, metrics, with_bare = step(run, [replace(problems[3], solution=None), *problems[:3]])
    assert apart(others, with_bare) < 2e-6
    assert [row.taught is None for row in rows] == [True] * 2 + [False] * 6
    assert metrics["teacher/num_rows_without_view"] == 2


def test_rewards_are_compared_among_all_answers(recipe: Make, start: Any) -> None:
    """[1, 0, 0, 0] at temperature 1: softmax over four answers, of which three can be taught: 4 / (e + 3) each, not 1,
    which is what answers as bad as these would weigh in a group that nobody solved."""
    keys = (*ONE_SUCCESS, *FOUR, "weights.problems.name=reward_softmax", *SELF)
    rows, metrics, _ = step(start(recipe("sdpo", *keys), (1.0, 0.0, 0.0, 0.0)))
    assert sum(row.view is None for row in rows) == 4
    assert metrics["weights/mean"] == pytest.approx(4 / (np.e + 3), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [("live",), ("trust_region", "teacher.student_share=0.3"), ("initial",)])
def test_hidden_states_are_read_through_the_head_they_were_made_with(
    weights: Any, dtype: str, recipe: Make, start: Any
) -> None:
    """Four updates a step: what the loss reads from the teacher's hidden states is what the teacher said before the
    first of them, also in the last part."""
    first, *more = weights
    keys = (f"teacher.weights={first}", *more, f"model.dtype={dtype}", "train.updates_per_step=4", "train.lr=0.01")
    run = start(recipe("opsd", "teacher.kind=self", *keys))
    teacher, said = run.parts.teacher, {}
    score = teacher.score

    def both(contexts: Any, answers: Any, whole: Asked, **options: Any) -> Any:
        asked = score(contexts, answers, Asked("sampled"), **options)
        said.update({(c, a): s.sampled_logprob_T for c, a, s in zip(contexts, answers, asked, strict=True)})
        return score(contexts, answers, whole, **options)

    teacher.score = both
    before = next(iter(run.parts.optimizer.weights.values())).clone()
    rows, _ = train_step(run.state, run.problems[:4])
    assert not torch.equal(before, next(iter(run.parts.optimizer.weights.values())))
    for row in rows:
        expected = said[row.view.context_ids, row.rollout.answer_ids]
        np.testing.assert_allclose(row.signal.sampled_logprob_T, expected, atol=1e-5 if dtype == "float32" else 2e-2)
        assert row.signal.hidden_TH is None and row.signal.head is None
