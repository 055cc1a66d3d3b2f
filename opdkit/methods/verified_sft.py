"""Supervised fine-tuning on the student's own right answers: rejection sampling, on-policy.

    L = -mean over right answers, mean over tokens  log p(y)

An answer is right from a reward of `success_threshold` on; the others, and ungraded ones, leave the mean. A step
without a right answer has no gradient. `reduction = "sequence_sum"` sums over an answer's tokens.

Source: the `verified_sft` baseline of MOPD (arXiv:2605.12652). Where we differ: means are over the whole batch, not
over each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import NegativeLogLikelihood
from opdkit.methods.base import Method, Report
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class VerifiedSFT(Method):
    name: Literal["verified_sft"] = "verified_sft"
    success_threshold: float = Field(1.0, allow_inf_nan=False)  # a right answer has at least this reward
    # Over tokens, answers' means, or answers' sums.
    reduction: Literal["token", "sequence", "sequence_sum"] = "sequence"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sampling": {"group_size": 8, "temperature": 1.0, "max_answer_tokens": 4096},
        "train": {"problems_per_step": 32, "lr": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }

    @property
    def needs(self) -> Needs:
        return Needs(reward=True)

    def terms(self, plan: PlanInputs) -> list[Term]:
        coef_N = plan.coefficients(self.reduction, mask_N=self._right(plan)[plan.row_N])
        return [losses.Term(name="nll", loss=NegativeLogLikelihood(), coef_N=coef_N)]

    def report(self, plan: PlanInputs) -> Report:
        return Report(numbers={"num_right_answers": float(self._right(plan).sum())})

    def _right(self, plan: PlanInputs) -> Tensor:
        return plan.graded_R & (plan.reward_R >= self.success_threshold)
