"""What SRPO and I-SDPO share: failed answers are distilled from a teacher that reads the solution, the rest is GRPO.

    L = sum over distilled tokens  u w D(student, teacher)  +  sum over the other answers' tokens  PPO(A),  both / count
    w = e^(-certainty H(teacher)), divided by its mean over the distilled tokens
    u = min(importance_cap, p(y) / p_sampled(y))

Both weights are held constant. A is GRPO's advantage, from all answers of the group, also the distilled ones. count is
of all tokens of both branches (`mean_over = "all"`: every token counts alike), or of the branch's own. A failed answer
that the teacher did not score is GRPO's, as is one of a group that is not routed; ungraded answers are in no branch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import Reduction
from opdkit.methods.base import Report
from opdkit.methods.group_reward import GroupReward
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.sdpo import FromSiblings
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class Branched(FromSiblings, GroupReward):
    reduction: Reduction = "token"
    without_context: Literal["leave"] = "leave"
    importance_cap: float | None = Field(2.0, gt=0)  # of distilled tokens
    certainty: float = Field(1.0, ge=0)  # b of the papers, a nat; 0: every distilled token counts alike
    mean_over: Literal["all", "branch"] = "all"  # whether both branches share one count
    success_threshold: float = Field(1.0, allow_inf_nan=False)  # an answer below it has failed

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(views={"teacher": Asked("sampled", entropy=True)} if self.certainty else {})

    @property
    def required_views(self) -> tuple[str, ...]:
        return ()

    def failed_R(self, plan: PlanInputs) -> Tensor:
        """[R] bool: graded, and below the threshold."""
        return plan.graded_R & (plan.reward_R < self.success_threshold)

    def in_solved_group_R(self, plan: PlanInputs) -> Tensor:
        """[R] bool: some answer to the same problem is right."""
        right_R = plan.graded_R & ~self.failed_R(plan)
        return plan.group_R[right_R].bincount(minlength=int(plan.group_R.max()) + 1)[plan.group_R] > 0

    @abstractmethod
    def routed_R(self, plan: PlanInputs) -> Tensor:
        """[R] bool: the answers to distil, if the teacher has a word on them."""

    def distilled_N(self, plan: PlanInputs) -> Tensor:
        return plan.mask_N & self.routed_R(plan)[plan.row_N] & plan.said_by(*self.needs.views)

    def terms(self, plan: PlanInputs) -> list[Term]:
        distilled_N = self.distilled_N(plan)
        compared_N = self.compared_R(plan)[plan.row_N] & ~distilled_N
        weight_N = distilled_N.to(plan.weight_N.dtype)
        if self.certainty:
            entropy_N = plan.view_entropy["teacher"][distilled_N]
            sure_N = losses.weights.certainty(entropy_N, self.certainty)
            weight_N = weight_N.masked_scatter(distilled_N, sure_N.to(weight_N.dtype))
        if self.importance_cap is not None:
            weight_N = weight_N * self._ratios(plan)
        both_N = distilled_N | compared_N if self.mean_over == "all" else None
        coef_N = plan.coefficients(
            self.reduction,
            mask_N=distilled_N if both_N is None else both_N,
            weight_N=weight_N,
            divide_by=self.divide_by,
        )
        reward_N = compared_N.to(plan.weight_N.dtype)
        return [
            losses.Term(name=self.divergence, loss=self.loss, coef_N=coef_N, target=self.compared),
            self.reward_term(plan, mask_N=compared_N if both_N is None else both_N, weight_N=reward_N),
        ]

    def report(self, plan: PlanInputs) -> Report:
        distilled_N = self.distilled_N(plan)
        numbers: dict[str, float | None] = {
            "num_answers_distilled": float(len(plan.row_N[distilled_N].unique())),
            "share_of_tokens_distilled": float(distilled_N[plan.mask_N].double().mean()),
        }
        if self.importance_cap is not None and distilled_N.any():
            capped_N = self._ratios(plan)[distilled_N] >= self.importance_cap
            numbers["share_of_ratios_capped"] = float(capped_N.double().mean())
        return Report(numbers=numbers)
