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

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import AdvantageStd, Reduction
from opdkit.losses.spec import Divergence, KLEstimate, PolicyGradient, Target
from opdkit.methods.base import Averaged
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from opdkit.losses import Term


class GroupReward(Averaged):
    """The reward's part of a loss, for GRPO and for methods that mix it with a teacher's."""

    advantage_std: AdvantageStd = "unbiased"  # divide by the group's standard deviation; "none": Dr. GRPO
    clip_low: float = Field(0.2, ge=0)  # the ratio is clipped at 1 - clip_low
    clip_high: float = Field(0.2, ge=0)  # and at 1 + clip_high
    dual_clip: float | None = None  # caps the loss of tokens with a negative advantage; default: off

    corrects_for_sampler: ClassVar[bool] = True
    compares_rewards: ClassVar[bool] = True

    @property
    def required_views(self) -> tuple[str, ...]:
        return ()  # an answer that the teacher did not score still has its reward

    def reward_term(self, plan: PlanInputs, weight: float = 1.0) -> Term:
        graded, group_R = plan.graded_R, plan.group_R
        size_G = group_R[graded].bincount(minlength=int(group_R.max()) + 1)
        compared_R = graded & (size_G[group_R] > 1)
        advantage_R = plan.reward_R.new_zeros(len(group_R))
        advantage_R[compared_R] = losses.group_centred(
            plan.reward_R[compared_R], group_R[compared_R], self.advantage_std
        )
        coef_N = plan.coefficients(self.reduction, mask_N=compared_R[plan.row_N], divide_by=self.divide_by)
        assert plan.sampled_logprob_N is not None, "the ratio needs the sampler's log-probs"
        return losses.Term(
            name="grpo",
            loss=PolicyGradient(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
            coef_N=weight * coef_N,
            advantage_N=advantage_R[plan.row_N].to(coef_N.dtype),
            old_logprob_N=plan.sampled_logprob_N,
        )

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        if recipe.sampling.group_size < 2:
            yield (
                f"sampling.group_size = {recipe.sampling.group_size} gives GRPO no group to compare an answer with: "
                "every advantage is zero; use 2 or more (the paper: 64, common: 8)"
            )
        if recipe.sampling.temperature != self.loss_temperature:
            yield (
                f"method.loss_temperature = {self.loss_temperature} and sampling.temperature = "
                f"{recipe.sampling.temperature}: the ratio would compare two distributions; set both to the same"
            )


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
