"""GRPO and its mixtures with a teacher: by hand through the head, what is asked, what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import Head, ViewTokens, head_loss
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.recipe import parse_recipe
from opdkit.types import Asked, Needs

F64: Any = {"dtype": torch.float64}
LOG2 = math.log(2)
# Two answers of one problem: two tokens rewarded 1, one token rewarded 0. Three ids; the student's probabilities.
ROW_N, IDS_N = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
STUDENT_NV = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], **F64)
TEACHER_NV = torch.tensor([[0.25, 0.5, 0.25]] * 3, **F64)


def plan(log_ratio: list[float], reward: list[float] | None = None) -> PlanInputs:
    """The sampler's log-probs are those that give each token this log p / p_sampled."""
    logprob_N = STUDENT_NV.log().gather(-1, IDS_N[:, None])[:, 0]
    return PlanInputs(
        row_N=ROW_N,
        index_N=torch.tensor([0, 1, 0]),
        group_R=torch.tensor([0, 0]),
        reward_R=torch.tensor([1.0, 0.0] if reward is None else reward, **F64),
        graded_R=torch.tensor([True, True]),
        mask_N=torch.ones(3, dtype=torch.bool),
        weight_N=torch.ones(3, **F64),
        sampled_logprob_N=logprob_N - torch.tensor(log_ratio, **F64),
        student_logprob_N=None,
        student_entropy_N=None,
        step=0,
        progress=0.0,
    )


def learn(method: Method, inputs: PlanInputs) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, gradient with respect to the logits, loss per token of each term)."""
    hidden_NV = STUDENT_NV.log().requires_grad_()
    head = Head(weight_VH=torch.eye(3, **F64), num_tokens=3)
    teacher = ViewTokens(hidden_NH=TEACHER_NV.log(), head=head)
    out = head_loss(hidden_NV, head, IDS_N, method.terms(inputs), teacher)
    return out.loss.item(), torch.autograd.grad(out.loss, hidden_NV)[0], out.token_loss


def grpo(**keys: Any) -> Method:
    return METHODS["grpo"].model_validate({"name": "grpo", **keys})


def test_mean_only_baseline_by_hand() -> None:
    """Rewards 1 and 0: A is 1/2 and -1/2. Ratio 1: token losses -1/2, -1/2, 1/2; by rows their mean is 0, by tokens
    -1/6. With the unbiased standard deviation, 1/sqrt(2), A is +-1/sqrt(2)."""
    loss, _, tokens = learn(grpo(advantage_std="none"), plan([0.0, 0.0, 0.0]))
    assert tokens["grpo"].tolist() == pytest.approx([-0.5, -0.5, 0.5]) and loss == pytest.approx(0.0)
    assert learn(grpo(advantage_std="none", reduction="token"), plan([0.0] * 3))[0] == pytest.approx(-1 / 6)
    assert learn(grpo(), plan([0.0] * 3))[2]["grpo"].tolist() == pytest.approx([-(0.5**0.5)] * 2 + [0.5**0.5], rel=1e-5)


def test_clip_higher_and_dual_clip_by_hand() -> None:
    """A = 1/2: ratio 2 counts as 1 + clip_high and gives no gradient, ratio 1/2 counts as it is. A = -1/2: ratio 4
    loses 2, or with dual_clip = 3 no more than 3/2, without gradient."""
    keys = {"advantage_std": "none", "clip_low": 0.2, "clip_high": 0.28}
    _, gradient_NV, tokens = learn(grpo(**keys), plan([LOG2, -LOG2, 2 * LOG2]))
    assert tokens["grpo"].tolist() == pytest.approx([-0.5 * 1.28, -0.25, 2.0])
    assert gradient_NV[0].abs().max() == 0 and gradient_NV[1].abs().max() > 0 and gradient_NV[2].abs().max() > 0
    _, gradient_NV, tokens = learn(grpo(**keys, dual_clip=3.0), plan([LOG2, -LOG2, 2 * LOG2]))
    assert tokens["grpo"].tolist() == pytest.approx([-0.5 * 1.28, -0.25, 1.5]) and gradient_NV[2].abs().max() == 0


def test_distance_to_the_reference_by_hand() -> None:
    """Rewards equal, so the reference is all there is. k3 of the tokens: q/p = 1/2, 1, 1/2. Exact: the student's KL to
    the reference, log 2 / 4, 0 and log 2 / 4 (where p and q swap two of the three). Weight 0.1, mean over tokens."""
    even, keys = plan([0.0] * 3, reward=[1.0, 1.0]), {"kl_weight": 0.1, "reduction": "token"}
    k3 = 0.5 + LOG2 - 1
    loss, _, tokens = learn(grpo(**keys), even)
    assert tokens["reference_kl"].tolist() == pytest.approx([k3, 0.0, k3]) and loss == pytest.approx(0.1 * 2 * k3 / 3)
    loss, _, tokens = learn(grpo(**keys, kl_estimate="exact"), even)
    assert tokens["reference_kl"].tolist() == pytest.approx([LOG2 / 4, 0.0, LOG2 / 4])
    assert loss == pytest.approx(0.1 * LOG2 / 6)


def test_what_is_asked() -> None:
    """No reference, no teacher: the baseline stays as cheap as it was."""
    assert grpo().needs == Needs(reward=True)
    assert grpo(kl_weight=0.1).needs == Needs(views={"teacher": Asked("sampled")}, reward=True)
    assert grpo(kl_weight=0.1, kl_estimate="exact").needs == Needs(
        views={"teacher": Asked("distribution")}, reward=True
    )
    mixed = METHODS["grpo_opd"].model_validate({"name": "grpo_opd", "support": "sampled"})
    assert mixed.needs == Needs(views={"teacher": Asked("sampled")}, reward=True)


@pytest.mark.parametrize("keys", [{}, {"form": "advantage", "support": "union", "k": 2}, {"support": "sampled"}])
def test_a_mixture_is_the_sum_of_its_parts(keys: dict[str, Any]) -> None:
    """Gradients add up with the named coefficients, whatever form the teacher's part has."""
    inputs = plan([0.1, -0.1, 0.3])
    mixed = METHODS["grpo_opd"].model_validate(
        {"name": "grpo_opd", "reward_weight": 0.5, "teacher_weight": 2.0, **keys}
    )
    teacher = METHODS["topk_opd"].model_validate({"name": "topk_opd", "support": "full", **keys})
    expected = 0.5 * learn(grpo(reduction="token"), inputs)[1] + 2.0 * learn(teacher, inputs)[1]
    torch.testing.assert_close(learn(mixed, inputs)[1], expected, rtol=0, atol=1e-15)


MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 10},
}
TEACHER = {"teacher": {"kind": "model", "path": "t"}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "grpo", "kl_weight": 0.1}}, "needs a teacher"),
        ({"method": {"name": "grpo", "kl_weight": -1.0}}, "greater than or equal to 0"),
        ({"method": {"name": "grpo", "reduction": "constant"}}, "set both or neither"),
        ({"method": {"name": "grpo_opd"}}, "needs a teacher"),
        ({"method": {"name": "grpo_opd", "reward_weight": 0.0}, **TEACHER}, "greater than 0"),
        ({"method": {"name": "grpo_opd"}, **TEACHER, "sampling": {"group_size": 1}}, "no group to compare"),
        ({"method": {"name": "grpo_opd"}, **TEACHER, "sampling": {"temperature": 0.7}}, "compare two distributions"),
    ],
)
def test_refusals(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_recipe({**MINIMAL, **sections})


def test_a_reference_is_the_initial_weights() -> None:
    """The published KL penalty by recipe alone."""
    recipe = parse_recipe(
        {
            **MINIMAL,
            "method": {"name": "grpo", "kl_weight": 0.005, "advantage_std": "none"},
            "teacher": {"kind": "self", "weights": "initial"},
        }
    )
    assert recipe.teacher.weights == "initial" and recipe.needs.teacher == Asked("sampled")
