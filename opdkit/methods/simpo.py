"""On-policy simple preference optimisation: pairs of the student's own answers by mean log-prob, without a reference.

    h = mean over the answer's tokens  log p(y)
    L = mean over pairs  -log sigmoid(beta (h_better - h_worse) - margin)

Sources: SimPO (arXiv:2405.14734, eq. 6; `margin` is its gamma), on-policy as in MOPD's baselines (arXiv:2605.12652).
Where we differ: pairs are formed over the whole batch (see `preference.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.preference import Preference

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(Preference):
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)  # scales the difference of scores
    margin: float = Field(1.0, ge=0)  # not divided by beta
    scores_mean: ClassVar[bool] = True

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sampling": {"group_size": 8, "temperature": 1.0, "max_answer_tokens": 4096},
        "train": {"problems_per_step": 32, "lr": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
    }

    @property
    def pair_margin(self) -> float:
        return self.margin

    def logprob(self, plan: PlanInputs) -> Tensor:
        assert plan.student_logprob_N is not None
        return plan.student_logprob_N
