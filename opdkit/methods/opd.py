"""On-policy distillation from another model.

The student answers, the teacher reads the same problem, and at every token of the student's answer the two next-token
distributions are compared:

    L = 1/N sum over rows, sum over tokens  D(student, teacher)          N = counted answer tokens of the whole batch

D is any divergence on any support; by default reverse_kl = KL(student || teacher) on the full vocabulary, exact given
the states. `support = "sampled"` is the one-sample form, which needs only the teacher's log-prob of the sampled token:

    L = -1/N sum A log p(y),   A = log q(y) - log p(y) held constant

No gradient flows through the sampling of the answer: a token is credited with its own A alone, unless `credit =
"group_return"` centres A among all tokens of the problem and sums it to the answer's end.

`answers = "teacher"` learns from answers the teacher samples anew at every step, `answers = "dataset"` from the data
set's own solutions (the teacher's, as `opdkit sample` keeps them): with forward_kl, the warm-up of PACED and of
Sparse-to-Dense.

Sources: GKD (arXiv:2306.13649, eq. 4; its mix of data sources is here a [schedule] from one to the other). The
optimisation settings are those of Rethinking On-Policy Distillation (arXiv:2604.13016), whose code has `group_return`
as token_grpo. `advantage_from = "sampler"` is the advantage of IW-OPD (TRL), which goes with `[weights] prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from opdkit import losses
from opdkit.losses.names import AdvantageStd
from opdkit.losses.spec import LossSpec, PolicyGradient
from opdkit.methods.distillation import Distillation
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from opdkit.losses import Term


class OPD(Distillation):
    name: Literal["opd"] = "opd"
    answers: Literal["student", "dataset", "teacher"] = "student"  # dataset: one a problem, whatever group_size
    # support = "sampled": whose log p(y) the advantage has, at the loss or as it was sampled.
    advantage_from: Literal["student", "sampler"] = "student"
    # Support = "sampled": each token its own advantage, or centred in its group and summed to the end.
    credit: Literal["token", "group_return"] = "token"
    credit_std: AdvantageStd = "unbiased"  # credit = "group_return": divide by the deviation, or only centre

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "context": {"kind": "none"},
        "sampling": {"group_size": 4, "temperature": 1.0, "max_answer_tokens": 7168},
        "train": {"problems_per_step": 64, "lr": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }

    @property
    def answer_source(self) -> Literal["student", "dataset", "teacher"]:
        return self.answers

    @property
    def plans_advantage(self) -> bool:
        return (self.advantage_from, self.credit) != ("student", "token")

    @property
    def loss(self) -> LossSpec:
        return PolicyGradient() if self.plans_advantage else super().loss

    @property
    def needs(self) -> Needs:
        if not self.plans_advantage:
            return super().needs
        views = dict.fromkeys(self.compared.views, Asked("sampled"))
        return Needs(views=views, student=self.advantage_from == "student")

    @model_validator(mode="after")
    def _estimates_from_own_tokens(self) -> Self:
        if self.support == "sampled" and self.answers != "student":
            raise ValueError(
                f'method.support = "sampled" estimates from tokens that the student drew, but method.answers = '
                f'"{self.answers}"; use a support with more entries, or answers = "student"'
            )
        return self

    @model_validator(mode="after")
    def _advantage_has_a_token(self) -> Self:
        if self.plans_advantage and self.support != "sampled":
            raise ValueError(
                f'method.advantage_from = "{self.advantage_from}" and method.credit = "{self.credit}" concern the '
                f'advantage of the sampled token, but support = "{self.support}" has none; set support = "sampled"'
            )
        return self

    def terms(self, plan: PlanInputs) -> list[Term]:
        if not self.plans_advantage:
            return super().terms(plan)
        own_N = plan.student_logprob_N if self.advantage_from == "student" else plan.sampled_logprob_N
        assert own_N is not None
        advantage_N = losses.teacher_minus_student(plan.target_logprob(self.compared), own_N)
        if self.credit == "group_return":
            said_N = plan.said_by(*self.compared.views)
            advantage_N[said_N] = losses.group_return(
                advantage_N[said_N], plan.row_N[said_N], plan.group_R, self.credit_std
            )
        return [
            losses.Term(name=self.divergence, loss=self.loss, coef_N=self.coefficients(plan), advantage_N=advantage_N)
        ]
