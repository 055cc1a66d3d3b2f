"""Group-relative policy optimisation: reward only. The baseline every dense signal is measured against.

    A = (reward - mean of the group) / std of the group          the same for every token of the answer
    r = p(y) / p_sampled(y)
    L = mean over rows, mean over tokens of  max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        + kl_weight * mean of a distance to a reference, the teacher, e.g. [teacher] kind = "self", weights = "initial"

p_sampled is what the sampler reported, under the distribution that was sampled, so a truncated (top-p) sampler is
corrected for instead of being taken for the policy. With one update per batch r differs from 1 by that alone.
Ungraded answers, and answers that are alone in their group, leave the statistics and the mean.

`kl_estimate`: "k3" is e^d - d - 1 of the sampled token, d = log q - log p (verl's low_var_kl, without its cap at 10);
its gradient is in the mean that of KL(reference || student). "exact" is KL(student || reference) over the vocabulary.

Sources: DeepSeekMath (arXiv:2402.03300, eq. 3 and 4); `advantage_std = "none"` (a mean-only baseline) and
`reduction = "constant"` are Dr. GRPO (arXiv:2503.20783); clip_high above clip_low is DAPO (arXiv:2503.14476);
dual_clip is arXiv:1912.09729.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import Reduction
from opdkit.losses.spec import Divergence, KLEstimate, Target
from opdkit.methods.group_reward import GroupReward
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from opdkit.losses import Term


class GRPO(GroupReward):
    name: Literal["grpo"] = "grpo"
    reduction: Reduction = "sequence"
    kl_weight: float = Field(0.0, ge=0)  # 0: no reference is asked
    kl_estimate: Literal["k3", "exact"] = "k3"  # from the sampled token, or over the vocabulary

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sampling": {"group_size": 8, "temperature": 1.0},
        "train": {"problems_per_step": 32, "lr": 1e-6, "max_grad_norm": 1.0},
    }

    @property
    def kl(self) -> KLEstimate | Divergence:
        return KLEstimate() if self.kl_estimate == "k3" else Divergence("reverse_kl")

    @property
    def needs(self) -> Needs:
        return Needs(reward=True, views=Target().asks(self.kl) if self.kl_weight else {})

    def terms(self, plan: PlanInputs) -> list[Term]:
        terms = [self.reward_term(plan)]
        if self.kl_weight:
            coef_N = self.kl_weight * plan.coefficients(self.reduction, divide_by=self.divide_by, views=("teacher",))
            terms.append(losses.Term(name="reference_kl", loss=self.kl, coef_N=coef_N))
        return terms
