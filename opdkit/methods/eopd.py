"""Entropy-gated on-policy self-distillation: where the teacher itself is unsure, its top tokens teach as well.

    L = 1/N sum over tokens  -A r  +  1[H(q) > 0.8] KL(q16 || p)
    A = log q(y) - log p(y),   r = p(y) / p(y) held constant below,   H(q) the teacher's entropy, nats

q16 is the teacher on its 16 likeliest tokens, renormalised; p the student over the full vocabulary, so the second term
also pulls mass towards these tokens. Both terms act on gated tokens. The gate is a weight: it changes no denominator.
The published code clips r as PPO does, but r is 1, so the clip never acts and is not here; `[weights] importance`
corrects for the sampler, which r does not.

Source: EOPD (arXiv:2603.07079) as trained by PW-OPSD (arXiv:2605.21606), whose settings these are. Where we differ: the
token mean is over the whole batch, not each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import Divergence, Support, TeacherAdvantage
from opdkit.methods.base import Averaged, Report
from opdkit.methods.opsd import OPSD
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class EOPD(Averaged):
    name: Literal["eopd"] = "eopd"
    loss_temperature: float = Field(1.1, gt=0)
    entropy_gate: float = Field(0.8, ge=0)  # nats, of the teacher at the loss temperature; a gated token is above it
    k: int = Field(16, ge=1)  # length of the teacher's list

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = OPSD.defaults

    @property
    def estimates_from_samples(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("topk", self.k, entropy=True)})

    def gated_N(self, plan: PlanInputs) -> Tensor:
        assert plan.teacher_entropy_N is not None
        return plan.teacher_entropy_N > self.entropy_gate

    def terms(self, plan: PlanInputs) -> list[Term]:
        gate_N = self.gated_N(plan).to(plan.weight_N.dtype)
        return [
            losses.Term(
                name="surrogate",
                loss=TeacherAdvantage("ratio"),
                coef_N=plan.coefficients(self.reduction, divide_by=self.divide_by),
            ),
            losses.Term(
                name="forward_kl",
                loss=Divergence("forward_kl", Support("teacher_topk", self.k), "renormalise_teacher"),
                coef_N=plan.coefficients(self.reduction, weight_N=gate_N, divide_by=self.divide_by),
            ),
        ]

    def report(self, plan: PlanInputs) -> Report:
        return Report(
            numbers={"share_of_tokens_gated": float(self.gated_N(plan)[plan.said_by("teacher")].double().mean())}
        )
