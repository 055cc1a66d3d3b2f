"""Supervised fine-tuning: the cold start before on-policy distillation, and its off-policy baseline.

    L = -1/N sum over tokens  log p(y)

`answers = "dataset"` learns from the data set's own solutions; `answers = "teacher"` from answers the teacher samples
anew at every step (sequence-level distillation, arXiv:1606.07947). The stop token is learned too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from opdkit import losses
from opdkit.losses.spec import NegativeLogLikelihood
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from opdkit.losses import Term


class SFT(Method):
    name: Literal["sft"] = "sft"
    answers: Literal["dataset", "teacher"] = "dataset"  # the data's solutions, or sampled from the teacher
    reduction: Literal["token", "sequence"] = "token"  # mean over tokens, or mean of each answer's mean

    # Rethinking OPD's cold start (arXiv:2604.13016): 1e-5, cosine.
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sampling": {"group_size": 1},
        "train": {"problems_per_step": 64, "lr": 1e-5, "schedule": "cosine"},
    }

    @property
    def answer_source(self) -> Literal["student", "dataset", "teacher"]:
        return self.answers

    @property
    def needs(self) -> Needs:
        return Needs()

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [losses.Term(name="nll", loss=NegativeLogLikelihood(), coef_N=plan.coefficients(self.reduction))]
