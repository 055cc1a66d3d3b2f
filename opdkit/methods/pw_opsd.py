"""Position-weighted self-distillation: OPSD in which late tokens count more.

    L = 1/B sum over rows  1/T sum over tokens  w(u_i) D_i,   u_i = (i - 1/2) / T for the i-th of T tokens
    w(u) = w_min + (1 - w_min) sigmoid((u - tau) / s)

D is OPSD's divergence with its clip; a row's mean is divided by T, not by its weights, so early tokens lose what late
ones do not gain: with the Moderate schedule the loss is 0.77 of the unweighted one, which the gradient-norm clip of 0.1
sees. `mean_one` divides the weights by their mean in every row.

Source: PW-OPSD (arXiv:2605.21606, schedule and reduction as in its code; `reduction = "token"` is its ablation). The
paper's tables also name an "Aggressive" schedule; its values are published nowhere, so it must be given them.
Where we differ: the clip (see `opsd.py`). T is the answer's length as sampled, also where max_answer_tokens cut it: as
published, the last tokens of a cut answer then count as late ones (`rollout/num_truncated` says how many are cut).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from opdkit import losses
from opdkit.losses.names import Reduction
from opdkit.methods.opsd import OPSD
from opdkit.methods.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from opdkit.losses import Term

SCHEDULES = {"moderate": {"w_min": 0.25, "tau": 0.30, "s": 0.10}}


class PWOPSD(OPSD):
    name: Literal["pw_opsd"] = "pw_opsd"  # type: ignore[assignment]
    schedule: Literal["moderate", "aggressive"] = "moderate"  # aggressive: w_min, tau and s must be given
    w_min: float = Field(ge=0, le=1)  # the schedule's, as are the next two, unless they are set
    tau: float  # where along the answer (0 to 1) the weight is half-way
    s: float = Field(ge=0)  # how gradual the rise is; 0: a step
    mean_one: bool = False  # divide the weights of every answer by their mean
    reverse: bool = False  # u counted from the end: the control of the claim that late tokens are the reliable ones
    reduction: Reduction = "sequence"

    weighs_position: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _schedule_by_name(cls, keys: Any) -> Any:
        if not isinstance(keys, Mapping):
            return keys
        name = keys.get("schedule", "moderate")
        missing = [key for key in ("w_min", "tau", "s") if key not in keys]
        if name == "aggressive" and missing:
            raise ValueError(
                'method.schedule = "aggressive" is named in the paper\'s tables, but its values are published neither '
                f'there nor in the code; set method.{", method.".join(missing)} yourself, or use "moderate"'
            )
        return {**(SCHEDULES.get(name, {}) if isinstance(name, str) else {}), **keys}

    def terms(self, plan: PlanInputs) -> list[Term]:
        weight_N = losses.weights.position(
            plan.row_N,
            self.w_min,
            self.tau,
            self.s,
            mean_one=self.mean_one,
            reverse=self.reverse,
            dtype=plan.weight_N.dtype,
        )
        return [losses.Term(name=self.divergence, loss=self.loss, coef_N=self.coefficients(plan, weight_N))]
