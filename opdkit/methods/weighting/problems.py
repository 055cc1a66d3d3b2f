"""Weights by rewards: of problems by how often they are solved, of answers by which were rewarded. R: rows."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opdkit import losses
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.base import Named, NotNegative, Positive
from opdkit.types import Group, Needs

if TYPE_CHECKING:
    from torch import Tensor


class Paced(Named):
    """PACED (arXiv:2603.11178): problems that are sometimes solved count most, w = p^alpha (1 - p)^beta, p = pass rate.

    p is the share of a problem's graded answers with a reward of at least `success_threshold`. "measured" is the
    paper's: of `samples` answers of the student to every problem, before the first step; it goes with any answers that
    are trained on. "fixed" keeps the first p that a problem has among the answers of the run, "refreshed" takes that of
    each step. Problems without a graded answer leave the mean.
    """

    name: Literal["paced"] = "paced"
    alpha: NotNegative = 1.0  # exponent of the pass rate
    beta: NotNegative = 1.0  # exponent of 1 - pass rate
    floor: NotNegative = 0.0  # weights are at least this: 0 drops problems that are never or always solved
    mean_one: bool = True  # divide by the mean over the batch's problems, so that the learning rate keeps its meaning
    pass_rate: Literal["fixed", "refreshed", "measured"] = "fixed"  # the run's first, each step's, or measured before
    samples: Annotated[int, Field(gt=0, le=2**16)] = 8  # pass_rate = "measured": answers to every problem
    success_threshold: Annotated[float, Field(allow_inf_nan=False)] = 1.0  # a right answer has at least this reward

    @property
    def needs(self) -> Needs:
        return Needs(reward=True)

    def pass_rates(self, groups: Sequence[Group], known: MutableMapping[str, float]) -> dict[str, float | None]:
        """{problem id: share of right answers; None: none is graded}. `known`: of earlier steps, written if fixed."""
        if self.pass_rate == "measured":
            return {group.problem.id: known.get(group.problem.id) for group in groups}
        rates: dict[str, float | None] = {}
        for group in groups:
            rewarded = {rollout.episode_id: rollout.reward for rollout in group.rollouts}
            rewards = [reward for reward in rewarded.values() if reward is not None]
            rate = sum(reward >= self.success_threshold for reward in rewards) / len(rewards) if rewards else None
            if self.pass_rate == "fixed" and group.problem.id in known:
                rate = known[group.problem.id]
            elif self.pass_rate == "fixed" and rate is not None:
                known[group.problem.id] = rate
            rates[group.problem.id] = rate
        return rates

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.pass_rate_R is not None
        known_R = ~plan.pass_rate_R.isnan()
        weight_R = losses.weights.beta_kernel(plan.pass_rate_R.nan_to_num(), self.alpha, self.beta).clamp(
            min=self.floor
        )
        if self.mean_one:  # over the problems that the loss can count a token of
            mean_R = known_R & (plan.row_N[self.known_N(plan)].bincount(minlength=len(known_R)) > 0)
            weight_R[mean_R] = losses.weights.mean_one_per_problem(weight_R[mean_R], plan.group_R[mean_R])
        return _weigh_rows(plan, known_R, weight_R)

    def faults(self, recipe: Any) -> Iterator[str]:
        if self.pass_rate == "measured":
            if recipe.sampling.temperature == 0 or self.samples == 1:
                yield (
                    f'weights.problems.pass_rate = "measured" of {self.samples} answers at sampling.temperature = '
                    f"{recipe.sampling.temperature} is 0 or 1, and so a weight of 0 to all; sample several, above 0"
                )
            return
        yield from _needs_graded_answers(
            recipe, "paced", 'set pass_rate = "measured" (before the first step), or use an on-policy method'
        )
        if recipe.sampling.group_size == 1:
            yield (
                'weights.problems.name = "paced" weighs a problem by how often it is solved, but sampling.group_size '
                "= 1 gives a pass rate of 0 or 1, and so a weight of 0 to nearly all; use 2 or more (the paper: 8)"
            )


class RewardSoftmax(Named):
    """w = n softmax(reward / temperature) over the n answers of a problem: small temperatures train on the best alone.

    per = "batch" is HJSang's reward_beta: over all answers of the step, which also weighs easy problems over hard ones.
    """

    name: Literal["reward_softmax"] = "reward_softmax"
    temperature: Positive = 1.0  # lower: the best answers take more of the weight
    per: Literal["problem", "batch"] = "problem"  # softmax over a problem's answers, or over all

    @property
    def needs(self) -> Needs:
        return Needs(reward=True)

    def apply(self, plan: PlanInputs) -> PlanInputs:
        graded_R = plan.graded_R & plan.first_R
        group_R = plan.group_R[graded_R] if self.per == "problem" else None
        weight_R = plan.reward_R.new_zeros(len(graded_R))
        weight_R[graded_R] = losses.weights.reward_softmax(plan.reward_R[graded_R], group_R, self.temperature)
        return _weigh_rows(plan, plan.graded_R, plan.of_episodes(weight_R))

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_graded_answers(recipe, "reward_softmax")
        if self.per == "problem" and recipe.sampling.group_size == 1:
            yield (
                'weights.problems.name = "reward_softmax" compares the answers to one problem, but '
                'sampling.group_size = 1 samples one: every weight is 1; use 2 or more, or per = "batch"'
            )


PROBLEM_WEIGHTS: dict[str, type[Named]] = {"paced": Paced, "reward_softmax": RewardSoftmax}


def _weigh_rows(plan: PlanInputs, counted_R: Tensor, weight_R: Tensor) -> PlanInputs:
    return replace(plan, mask_N=plan.mask_N & counted_R[plan.row_N]).weighed(weight_R=weight_R)


def _needs_graded_answers(
    recipe: Any, name: str, way_out: str = "remove it, or use an on-policy method"
) -> Iterator[str]:
    if recipe.method.answer_source != "student":
        yield (
            f'weights.problems.name = "{name}" weighs by the student\'s rewards, but the answers of method.name = '
            f'"{recipe.method.name}" come from the {recipe.method.answer_source}; {way_out}'
        )
