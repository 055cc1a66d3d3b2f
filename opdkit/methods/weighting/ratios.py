"""Weights from log-probs of the sampled tokens: the student against its sampler, the teacher against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opdkit import losses
from opdkit.losses.names import RatioLevel
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.base import Positive, Weighting
from opdkit.types import Asked, Needs


class Importance(Weighting):
    """min(cap, p / p_sampled): corrects for what the sampler leaves out (top-p, top-k) and rounds (PW-OPSD spec, M3).

    p is the student at the loss temperature before the update, p_sampled what the sampler reported.
    """

    level: RatioLevel = "token"  # sequence: the ratio of the whole answer for each of its tokens
    cap: Positive = 2.0  # no weight is larger
    mean_one: bool = False  # divide the weights by their mean

    @property
    def needs(self) -> Needs:
        return Needs(student=True)

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.student_logprob_N is not None and plan.sampled_logprob_N is not None
        known_N, factor_N = self.known_N(plan), plan.weight_N.new_ones(len(plan.weight_N))
        log_ratio_N = (plan.student_logprob_N - plan.sampled_logprob_N)[known_N]
        factor_N[known_N] = losses.weights.importance(
            log_ratio_N, plan.row_N[known_N], self.level, self.cap, mean_one=self.mean_one
        )
        if self.level == "token":
            return plan.weighed(factor_N)
        weight_R = factor_N.new_ones(len(plan.reward_R)).index_copy(0, plan.row_N, factor_N)
        return plan.weighed(weight_R=weight_R)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_sampled_answers(recipe, "importance")
        if recipe.sampling.temperature != recipe.method.loss_temperature:
            yield (
                f"weights.importance: method.loss_temperature = {recipe.method.loss_temperature} and "
                f"sampling.temperature = {recipe.sampling.temperature} would make the ratio one of two temperatures; "
                "set both to the same"
            )
        if recipe.method.corrects_for_sampler:
            yield (
                f"weights.importance would correct for the sampler a second time: the ratio of method.name = "
                f'"{recipe.method.name}" does it already; remove [weights] importance'
            )


class Prefix(Weighting):
    """IW-OPD (TRL): 1 + gamma (1 - share of the answer's disagreement with the teacher that lies before the token).
    An answer that the teacher did not score keeps weight 1."""

    gamma: Positive = 1.0  # how much more the first tokens count

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled")})

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.teacher_logprob_N is not None and plan.sampled_logprob_N is not None
        known_N, factor_N = self.known_N(plan), plan.weight_N.new_ones(len(plan.weight_N))
        gap_N = (plan.teacher_logprob_N - plan.sampled_logprob_N)[known_N]
        factor_N[known_N] = losses.weights.prefix(gap_N, plan.row_N[known_N], self.gamma)
        return plan.weighed(factor_N)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_sampled_answers(recipe, "prefix")


def _needs_sampled_answers(recipe: Any, key: str) -> Iterator[str]:
    if recipe.method.answer_source != "student":
        yield (
            f"weights.{key} needs what the student's sampler reported, but the answers of method.name = "
            f'"{recipe.method.name}" come from the {recipe.method.answer_source}; remove it, or use an on-policy method'
        )
