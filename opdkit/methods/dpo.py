"""On-policy direct preference optimisation: pairs of the student's own answers, against a frozen reference.

    h = sum over the answer's tokens  log p(y) - log p_reference(y)
    L = mean over pairs  -log sigmoid(beta (h_better - h_worse))

The reference is the teacher, asked for the log-probs of the sampled tokens: by default the student's initial weights.
An answer that the reference cannot score (too long for its positions) is in no pair.

Sources: DPO (arXiv:2305.18290, eq. 7), on-policy as in MOPD's baselines (arXiv:2605.12652). Where we differ: pairs are
formed over the whole batch (see `preference.py`), and sums over tokens are in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.preference import Preference
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor


class DPO(Preference):
    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)  # larger: closer to the reference
    scores_mean: ClassVar[bool] = False

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"kind": "self", "weights": "initial"},
        "sampling": {"group_size": 8, "temperature": 1.0, "max_answer_tokens": 4096},
        "train": {"problems_per_step": 32, "lr": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled")}, reward=True, student=True)

    @property
    def pair_margin(self) -> float:
        return 0.0

    def comparable_R(self, plan: PlanInputs) -> Tensor:
        silent_R = plan.row_N[~plan.said_by("teacher")].bincount(minlength=len(plan.reward_R)) > 0
        return super().comparable_R(plan) & ~silent_R

    def logprob(self, plan: PlanInputs) -> Tensor:
        assert plan.student_logprob_N is not None and plan.teacher_logprob_N is not None
        return plan.student_logprob_N.double() - plan.teacher_logprob_N.double()
