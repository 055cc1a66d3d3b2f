"""REOPOLD: the sampled-token surrogate with a floor under its reward, and two phases of masks.

    R = log q(y) - log p(y) before the update,   floor = ln(lambda) / (1 - lambda), -2.56 for lambda = 0.1
    explore, the first `switch_step` steps:  M = R >= floor
    refine, from then on:                    M = H(p) >= the (1 - refine_keep)-quantile of H(p) over the batch
    L = - sum over tokens  M max(R, floor) log p(y)  /  sum over tokens M

The phases are masks: tokens outside them leave the denominator. While exploring every kept reward is above the floor,
so the floor acts in the second phase alone. H(p) is the student's entropy at the loss temperature, in nats.

Source: REOPOLD (arXiv:2603.11137) as trained by PW-OPSD (arXiv:2605.21606), whose settings these are; the paper itself
switches after 150 of 300 steps. Where we differ: quantile and mean are over the whole batch, not each micro-batch. The
published code drops the importance ratio as 1, which a truncated sampler makes untrue; `[weights] importance` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import PolicyGradient
from opdkit.methods.base import Averaged, Report
from opdkit.methods.opsd import OPSD
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class Reopold(Averaged):
    name: Literal["reopold"] = "reopold"
    loss_temperature: float = Field(1.1, gt=0)
    floor_lambda: float = Field(0.1, gt=0, lt=1)  # the reward's floor is ln(lambda) / (1 - lambda)
    refine_keep: float = Field(0.2, gt=0, le=1)  # beta of the paper: the share of tokens that refining keeps
    switch_step: int = Field(50, ge=0)  # steps of exploring, before refining

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = OPSD.defaults

    @property
    def estimates_from_samples(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled")}, student=True)

    @property
    def floor(self) -> float:
        return math.log(self.floor_lambda) / (1 - self.floor_lambda)

    def reward_N(self, plan: PlanInputs) -> Tensor:
        assert plan.teacher_logprob_N is not None and plan.student_logprob_N is not None
        return losses.teacher_minus_student(plan.teacher_logprob_N, plan.student_logprob_N)

    def kept_N(self, plan: PlanInputs) -> Tensor:
        if plan.step < self.switch_step:
            return self.reward_N(plan) >= self.floor
        assert plan.student_entropy_N is not None
        entropy_A = plan.student_entropy_N[plan.mask_N]
        return plan.student_entropy_N >= losses.weights.quantile(entropy_A, 1 - self.refine_keep)

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [
            losses.Term(
                name="reopold",
                loss=PolicyGradient(),
                coef_N=plan.coefficients(self.reduction, mask_N=self.kept_N(plan), divide_by=self.divide_by),
                advantage_N=self.reward_N(plan).clamp(min=self.floor),
            )
        ]

    def report(self, plan: PlanInputs) -> Report:
        said_N = plan.said_by("teacher")
        floored_N, kept_N = (self.reward_N(plan) < self.floor)[said_N], self.kept_N(plan)[said_N]
        return Report(
            numbers={
                "share_of_tokens_kept": float(kept_N.double().mean()),
                "share_of_rewards_below_floor": float(floored_N.double().mean()),
            }
        )
