"""What methods share that compare the rewards of a group: GRPO, and those that shape its advantage or add to its loss.

    A = (reward - mean of the group) / std of the group          the same for every token of the answer
    r = p(y) / p_sampled(y)
    token loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

A group of equal rewards has A = 0: it teaches nothing. Of episodes, `credit = "turn"` gives turn k of episode e

    A_ek = G_ek - mean of G_.k over the siblings that reached k,  G_ek = sum over j >= k of discount^(j - k) r_ej

with the verdict on the whole episode as part of its last turn's r; fewer than two that reached k: 0. Sources
and choices: `grpo.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import AdvantageStd
from opdkit.losses.spec import PolicyGradient
from opdkit.methods.base import Averaged
from opdkit.methods.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class GroupReward(Averaged):
    """The reward's part of a loss."""

    advantage_std: AdvantageStd = "unbiased"  # divide by the group's standard deviation; "none": Dr. GRPO
    clip_low: float = Field(0.2, ge=0)  # the ratio is clipped at 1 - clip_low
    clip_high: float = Field(0.2, ge=0)  # and at 1 + clip_high
    # What a turn of an episode is credited with: the episode's reward among its siblings', or its own and later rewards
    # among those of siblings that reached that turn.
    credit: Literal["episode", "turn"] = "episode"
    discount: float = Field(1.0, gt=0, le=1)  # credit = "turn": of the reward of each turn further on
    dual_clip: float | None = None  # caps the loss of tokens with a negative advantage; default: off

    corrects_for_sampler: ClassVar[bool] = True
    compares_rewards: ClassVar[bool] = True

    @property
    def required_views(self) -> tuple[str, ...]:
        return ()  # an answer without a teacher's word has its reward all the same

    def compared_R(self, plan: PlanInputs) -> Tensor:
        """[R] bool: the graded answers that are not alone in their group."""
        counted_R = plan.graded_R & plan.first_R
        size_G = plan.group_R[counted_R].bincount(minlength=int(plan.group_R.max()) + 1)
        return plan.graded_R & (size_G[plan.group_R] > 1)

    def advantage_N(self, plan: PlanInputs) -> Tensor:
        """[N] A of every token's answer; 0 for answers that are not compared."""
        if self.credit == "turn" and plan.turn_reward_N is not None:
            return self._by_turn_N(plan)
        compared_R = self.compared_R(plan) & plan.first_R
        advantage_R = plan.reward_R.new_zeros(len(plan.group_R))
        advantage_R[compared_R] = losses.group_centred(
            plan.reward_R[compared_R], plan.group_R[compared_R], self.advantage_std
        )
        return plan.of_episodes(advantage_R)[plan.row_N]

    def _by_turn_N(self, plan: PlanInputs) -> Tensor:
        """[N] the advantage of every token's turn. U: turns of the batch, in the order of rows."""
        assert plan.turn_reward_N is not None and plan.turn_N is not None
        row_R = plan.group_R.new_tensor(range(len(plan.group_R))) if plan.episode_R is None else plan.episode_R
        unit_N = losses.units(row_R[plan.row_N], plan.turn_N)
        num_turns = int(unit_N.max()) + 1 if len(unit_N) else 0

        def of_turns(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(num_turns).index_copy_(0, unit_N, value_N)

        known_U = of_turns(self.compared_R(plan)[plan.row_N].long()) > 0
        return_U = losses.returns(of_turns(plan.turn_reward_N), of_turns(row_R[plan.row_N]), self.discount)
        advantage_U = return_U.new_zeros(num_turns)
        advantage_U[known_U] = losses.centred_by_turn(
            return_U[known_U],
            of_turns(plan.group_R[plan.row_N])[known_U],
            of_turns(plan.turn_N)[known_U],
            self.advantage_std,
        )
        return advantage_U[unit_N]

    def reward_term(
        self,
        plan: PlanInputs,
        weight: float = 1.0,
        *,
        name: str = "grpo",
        advantage_N: Tensor | None = None,
        mask_N: Tensor | None = None,
        weight_N: Tensor | None = None,
    ) -> Term:
        """The clipped policy gradient, under the method's mean. advantage_N: in place of the group's; mask_N: which
        tokens are counted, in place of those of all compared answers; weight_N: how much."""
        mask_N = self.compared_R(plan)[plan.row_N] if mask_N is None else mask_N
        coef_N = plan.coefficients(self.reduction, mask_N=mask_N, weight_N=weight_N, divide_by=self.divide_by)
        assert plan.sampled_logprob_N is not None, "the ratio needs the sampler's log-probs"
        advantage_N = self.advantage_N(plan) if advantage_N is None else advantage_N
        return losses.Term(
            name=name,
            loss=PolicyGradient(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
            coef_N=weight * coef_N,
            advantage_N=advantage_N.to(coef_N.dtype),
            old_logprob_N=plan.sampled_logprob_N,
        )

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        if self.credit == "turn" and recipe.episode is None:
            yield 'method.credit = "turn" credits turns of an episode, and there is no [episode]; add one, or remove it'
        if self.discount != 1 and self.credit != "turn":
            yield f'method.discount = {self.discount} is of credit = "turn" alone; set that, or remove it'
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
