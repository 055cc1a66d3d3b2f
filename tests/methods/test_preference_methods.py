"""DPO, SimPO and verified SFT: by hand, refused recipes, and what leaves the pairs. Published numbers: tests/parity."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit.errors import UserError
from opdkit.losses.preference import answer_scores, better_in_group, pair_loss, token_shares
from opdkit.methods import METHODS
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.ratios import Importance
from opdkit.recipe import parse_recipe

F64 = {"dtype": torch.float64}


def pairs(reward: list[float], group: list[int], graded: list[bool] | None = None) -> set[tuple[int, int]]:
    known = torch.tensor(graded if graded is not None else [True] * len(reward))
    better_RR = better_in_group(torch.tensor(reward, **F64), torch.tensor(group), known)
    return {(int(i), int(j)) for i, j in better_RR.nonzero()}


def test_pairs_by_hand() -> None:
    """Rewards 1, 0, 0.5 of one problem make three pairs; equal rewards, other problems and ungraded answers none."""
    assert pairs([1, 0, 0.5], [0, 0, 0]) == {(0, 1), (0, 2), (2, 1)}
    assert pairs([1, 1, 0], [0, 0, 1]) == set()
    assert pairs([1, 0, 0], [0, 0, 0], [True, True, False]) == {(0, 1)}


def test_loss_and_slope_by_hand() -> None:
    """One pair, h 3 against 1, beta 0.5: x = 1, loss log(1 + 1/e), slope -+ 0.5 / (1 + e). A margin of 1 makes x = 0:
    log 2, slope -+ 0.25. No pair: loss 0, slope 0, means unknown."""
    score_R, better_RR = torch.tensor([3.0, 1.0], **F64), torch.tensor([[False, True], [False, False]])
    out = pair_loss(score_R, better_RR, beta=0.5)
    assert out.loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert out.slope_R.tolist() == pytest.approx([-0.5 / (1 + math.e), 0.5 / (1 + math.e)])
    assert (out.num_pairs, out.accuracy, out.score_gap, out.logit) == (1, 1.0, 2.0, 1.0)
    out = pair_loss(score_R, better_RR, beta=0.5, margin=1.0)
    assert out.loss == pytest.approx(math.log(2)) and out.slope_R.tolist() == pytest.approx([-0.25, 0.25])
    out = pair_loss(score_R, torch.zeros(2, 2, dtype=torch.bool), beta=0.5)
    assert (out.loss, out.slope_R.tolist(), out.accuracy, out.score_gap) == (0.0, [0.0, 0.0], None, None)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_slope_is_the_gradient(label_smoothing: float) -> None:
    """Equal to autograd of the loss as it is written, with every answer in several pairs, to 1e-12."""
    score_R = torch.randn(7, generator=torch.Generator().manual_seed(0), **F64).requires_grad_()
    better_RR = better_in_group(
        torch.tensor([2.0, 1, 0, 1, 0, 1, 0], **F64),
        torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        torch.ones(7, dtype=torch.bool),
    )
    winner_P, loser_P = better_RR.nonzero(as_tuple=True)
    x_P = 2.0 * (score_R[winner_P] - score_R[loser_P]) - 0.5
    written = -(1 - label_smoothing) * x_P.sigmoid().log() - label_smoothing * (1 - x_P.sigmoid()).log()
    (expected,) = torch.autograd.grad(written.mean(), score_R)
    out = pair_loss(score_R.detach(), better_RR, beta=2.0, margin=0.5, label_smoothing=label_smoothing)
    assert out.loss == pytest.approx(float(written.detach().mean()), rel=1e-12)
    torch.testing.assert_close(out.slope_R, expected, rtol=0, atol=1e-12)


def test_scores_by_hand() -> None:
    """Row 0 has log-probs -1 and -3 (sum -4, mean -2), row 1 has one counted token and one unknown, row 2 none."""
    logprob_N, row_N = torch.tensor([-1.0, -3.0, -5.0, math.nan], **F64), torch.tensor([0, 0, 1, 1])
    mask_N, weight_N = torch.tensor([True, True, True, False]), torch.ones(4)
    for mean, expected in ((False, [-4.0, -5.0, 0.0]), (True, [-2.0, -5.0, 0.0])):
        share_N = token_shares(mask_N, weight_N, row_N, 3, mean=mean)
        assert answer_scores(logprob_N, share_N, row_N, 3).tolist() == expected


MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 10},
}


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("dpo", ["sampling.group_size=1"], "no pairs"),
        ("simpo", ["sampling.group_size=1"], "no pairs"),
        ("dpo", ["teacher.kind=none"], "needs a teacher"),
        ("simpo", ["teacher.kind=self", "teacher.weights=initial"], "never asks"),
        ("dpo", ["method.label_smoothing=0.5"], "less than 0.5"),
        ("verified_sft", ["method.reduction=sum"], "'token', 'sequence' or 'sequence_sum'"),
    ],
)
def test_refusals(name: str, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_recipe({**MINIMAL, "method": {"name": name}}, overrides)


def test_papers_defaults() -> None:
    """DPO: beta 0.1 and a frozen reference. SimPO: beta 2, margin 1, none. All: lr 1e-6, 32 problems of 8 answers."""
    for name, beta, teacher in (("dpo", 0.1, "self"), ("simpo", 2.0, "none"), ("verified_sft", None, "none")):
        recipe = parse_recipe({**MINIMAL, "method": {"name": name}})
        assert getattr(METHODS[name].model_validate({"name": name}), "beta", None) == beta
        assert recipe.teacher.kind == teacher
        assert (recipe.train.lr, recipe.train.problems_per_step, recipe.sampling.group_size) == (1e-6, 32, 8)


def test_accuracy_counts_logits_above_zero() -> None:
    """As published: with a margin of 1 the better answer must be ahead by it. Gaps of 0.2 and 2 at beta 1: half."""
    score_R, better_RR = torch.tensor([0.2, 0.0, 2.0, 0.0], **F64), torch.zeros(4, 4, dtype=torch.bool)
    better_RR[0, 1] = better_RR[2, 3] = True
    assert pair_loss(score_R, better_RR, beta=1.0).accuracy == 1.0
    assert pair_loss(score_R, better_RR, beta=1.0, margin=1.0).accuracy == 0.5


def weighed_plan(weight_of_problem: list[float]) -> PlanInputs:
    """Two problems, each a right and a wrong answer of two tokens."""
    row_N = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    plan = PlanInputs(
        row_N=row_N,
        index_N=torch.tensor([0, 1] * 4),
        group_R=torch.tensor([0, 0, 1, 1]),
        reward_R=torch.tensor([1.0, 0.0, 1.0, 0.0], **F64),
        graded_R=torch.ones(4, dtype=torch.bool),
        mask_N=torch.ones(8, dtype=torch.bool),
        weight_N=torch.ones(8, **F64),
        sampled_logprob_N=None,
        view_logprob={"teacher": torch.full((8,), -1.0, **F64)},
        student_logprob_N=torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, -9], **F64),
        student_entropy_N=None,
        step=0,
        progress=0.0,
    )
    return plan.weighed(weight_R=torch.tensor(weight_of_problem, **F64)[plan.group_R])


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_weights_of_problems_weigh_the_loss_of_a_pair(name: str) -> None:
    """Twice the weight is twice the loss and twice the coefficients, and the scores stay; beta is not touched."""
    method = METHODS[name].model_validate({"name": name})
    one, two = weighed_plan([1.0, 1.0]), weighed_plan([2.0, 2.0])
    assert method.report(two).loss == pytest.approx(2 * method.report(one).loss)
    assert method.report(two).numbers == method.report(one).numbers
    (a,), (b,) = method.terms(one), method.terms(two)
    torch.testing.assert_close(b.coef_N, 2 * a.coef_N)
    only_first = weighed_plan([1.0, 0.0])
    (c,) = method.terms(only_first)
    torch.testing.assert_close(c.coef_N[:4], a.coef_N[:4])
    assert not c.coef_N[4:].any() and method.report(only_first).numbers["num_pairs"] == 2.0


def test_weights_of_tokens_weigh_them_inside_the_score() -> None:
    """The first token of every answer twice, whatever the problems weigh: the score gap is that of the weighed sums."""
    method = METHODS["dpo"].model_validate({"name": "dpo"})
    twice = torch.tensor([2.0, 1.0] * 4, **F64)
    plan = weighed_plan([3.0, 1.0]).weighed(twice)
    gaps = [(2 * -1 - 2) - (2 * -3 - 4), (2 * -5 - 6) - (2 * -7 - 9)]
    assert method.report(plan).numbers["score_gap"] == pytest.approx(sum(gaps) / 2)
    assert plan.weight_N.tolist() == [6, 3, 6, 3, 2, 1, 2, 1]


def test_importance_of_sequences_weighs_pairs() -> None:
    """One ratio an answer is a weight of answers; one a token stays inside the score."""
    plan = replace(weighed_plan([1.0, 1.0]), sampled_logprob_N=torch.full((8,), -3.0, **F64))
    sequence = Importance(level="sequence", cap=2.0).apply(plan)
    assert sequence.weight_R is not None and sequence.tokens_within_N.tolist() == [1.0] * 8
    torch.testing.assert_close(sequence.weight_N, sequence.weight_R[plan.row_N])
    token = Importance(level="token", cap=2.0).apply(plan)
    torch.testing.assert_close(token.tokens_within_N, token.weight_N)
