"""The recipe's [weights]: which tokens count, and how much, whatever the method.

    tokens      one of TOKEN_WEIGHTS: a selection (a mask: the loss is the mean over kept tokens), or `position`
    problems    one of PROBLEM_WEIGHTS: weights by how often a problem is solved, or which answers were rewarded
    importance  truncated importance weights: the policy that is trained over the distribution that was sampled
    prefix      early tokens count more, by how much of the answer's disagreement still lies ahead (IW-OPD)

They act on the plan before the method makes its terms, and multiply. What a selection must know of the student and the
teacher comes from a pass without gradient before the update, which is made only if somebody asks; a token that is not
kept then forms no logits with gradient. The formulas are in `losses/weights.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from opdkit import losses
from opdkit.losses.names import RatioLevel
from opdkit.losses.spec import Divergence, LossSpec, Support
from opdkit.methods.base import PlanInputs
from opdkit.types import Group, Needs, seed_from

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Weighting(BaseModel, ABC):
    """One way to weigh. Its fields are its recipe keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @property
    def needs(self) -> Needs:
        """What must be known beside what the method asks for."""
        return Needs()

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        """Losses to be known of every token before the update, by name: `PlanInputs.student_scores`."""
        return {}

    @abstractmethod
    def apply(self, plan: PlanInputs) -> PlanInputs:
        """The plan with some of its mask or weight changed."""

    def faults(self, recipe: Any) -> Iterator[str]:
        """What cannot work in a recipe whose keys are each legal; a sentence each, with the way out."""
        yield from ()


class Named(Weighting, ABC):
    name: str


class Selection(Named, ABC):
    """Some tokens of every answer, at least one. The others are not counted, and cost no logits."""

    keep: Share

    @property
    def needs(self) -> Needs:
        return reduce(Needs.__or__, (score.needs for score in self.scores.values()), Needs(student=True))

    @abstractmethod
    def kept_N(self, plan: PlanInputs) -> Tensor:
        """[N] bool."""

    def apply(self, plan: PlanInputs) -> PlanInputs:
        return replace(plan, mask_N=plan.mask_N & self.kept_N(plan))


class SoftOr(Selection):
    """TIP's main method (arXiv:2604.14084): tokens where the student is unsure, or apart from the teacher."""

    name: Literal["soft_or"] = "soft_or"
    keep: Share = 0.5
    entropy_percentile: Share = 0.98  # entropy is cut here before it is compared

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        return {"reverse_kl": Divergence("reverse_kl")}

    def kept_N(self, plan: PlanInputs) -> Tensor:
        entropy_N, apart_N = plan.student_entropy_N, plan.student_scores["reverse_kl"]
        assert entropy_N is not None
        score_N = losses.weights.soft_or(entropy_N, apart_N, self.entropy_percentile, plan.gather)
        return losses.weights.keep_best(score_N, plan.row_N, self.keep)


class Q3(Selection):
    """TIP's third quadrant: tokens of which the student is sure and the teacher is not (confidently wrong)."""

    name: Literal["q3"] = "q3"
    keep: Share = 0.1
    entropy_percentile: Share = 0.98

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        return {"forward_kl": Divergence("forward_kl")}

    def kept_N(self, plan: PlanInputs) -> Tensor:
        entropy_N, apart_N = plan.student_entropy_N, plan.student_scores["forward_kl"]
        assert entropy_N is not None
        score_N = losses.weights.confident_and_wrong(entropy_N, apart_N, self.entropy_percentile, plan.gather)
        return losses.weights.keep_best(score_N, plan.row_N, self.keep)


class MostApart(Selection):
    """TIP's ablation: the tokens of largest KL(student || teacher)."""

    name: Literal["divergence"] = "divergence"
    keep: Share = 0.5

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        return {"reverse_kl": Divergence("reverse_kl")}

    def kept_N(self, plan: PlanInputs) -> Tensor:
        return losses.weights.keep_best(plan.student_scores["reverse_kl"], plan.row_N, self.keep)


class EntropySampling(Selection):
    """Tokens drawn with probability ~ entropy^alpha JSD^gamma: TIP's baseline; gamma > 0 is HJSang's variant.

    Drawn from each answer with its own seed; HJSang draws from a micro-batch, so there the draw depends on the split.
    """

    name: Literal["entropy_sampling"] = "entropy_sampling"
    keep: Share = 0.5
    alpha: NotNegative = 1.0
    gamma: NotNegative = 0.0
    k: Annotated[int, Field(ge=2)] | None = None  # JSD on the teacher's k likeliest tokens, both sides renormalised

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        if not self.gamma:
            return {}
        support = Support() if self.k is None else Support("teacher_topk", self.k)
        return {"jsd": Divergence("jsd", support, "renormalise", teacher_share=0.5, scale="published")}

    def propensity_N(self, plan: PlanInputs) -> Tensor:
        assert plan.student_entropy_N is not None and plan.num_ids is not None
        jsd_N = plan.student_scores["jsd"] if self.gamma else None
        return losses.weights.propensity(plan.student_entropy_N, jsd_N, plan.num_ids, self.alpha, self.gamma)

    def kept_N(self, plan: PlanInputs) -> Tensor:
        seeds = [seed_from(seed, self.name) for seed in plan.seed_R]
        return losses.weights.draw(self.propensity_N(plan), plan.row_N, self.keep, seeds)

    def faults(self, recipe: Any) -> Iterator[str]:
        if self.k is not None and not self.gamma:
            yield (
                f"weights.tokens.k = {self.k} is the support of the JSD, which gamma = 0 leaves out; "
                "set gamma above 0, or remove k"
            )


class Position(Named):
    """Late tokens count more (PW-OPSD, arXiv:2605.21606), with any method. The defaults are its Moderate schedule."""

    name: Literal["position"] = "position"
    w_min: Share = 0.25
    tau: float = 0.30
    s: NotNegative = 0.10
    mean_one: bool = False  # divide the weights of every answer by their mean

    def apply(self, plan: PlanInputs) -> PlanInputs:
        weight_N = losses.weights.position(
            plan.row_N, self.w_min, self.tau, self.s, mean_one=self.mean_one, dtype=plan.weight_N.dtype
        )
        return replace(plan, weight_N=plan.weight_N * weight_N)

    def faults(self, recipe: Any) -> Iterator[str]:
        if recipe.method.weighs_position:
            yield (
                f'weights.tokens.name = "position" would weigh by position a second time: method.name = '
                f'"{recipe.method.name}" does it already; remove one of the two'
            )


class Paced(Named):
    """PACED (arXiv:2603.11178): problems that are sometimes solved count most, w = p^alpha (1 - p)^beta, p = pass rate.

    p is the share of a problem's graded answers with a reward of at least `success_threshold`, over all answers of the
    step. "fixed" keeps the first p of a problem for the whole run (the paper computes it once, before training);
    "refreshed" takes this step's. Problems without a graded answer leave the mean.
    """

    name: Literal["paced"] = "paced"
    alpha: NotNegative = 1.0
    beta: NotNegative = 1.0
    floor: NotNegative = 0.0  # weights are at least this: 0 drops problems that are never or always solved
    mean_one: bool = True  # divide by the mean over the batch's problems, so that the learning rate keeps its meaning
    pass_rate: Literal["fixed", "refreshed"] = "fixed"
    success_threshold: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(reward=True)

    def pass_rates(self, groups: Sequence[Group], known: MutableMapping[str, float]) -> dict[str, float | None]:
        """{problem id: share of right answers; None: none is graded}. `known`: of earlier steps, written if fixed."""
        rates: dict[str, float | None] = {}
        for group in groups:
            rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
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
        if self.mean_one:
            weight_R[known_R] = losses.weights.mean_one_per_problem(
                weight_R[known_R], plan.group_R[known_R], plan.total
            )
        return _weigh_rows(plan, known_R, weight_R)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_graded_answers(recipe, "paced")
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
    temperature: Positive = 1.0
    per: Literal["problem", "batch"] = "problem"

    @property
    def needs(self) -> Needs:
        return Needs(reward=True)

    def apply(self, plan: PlanInputs) -> PlanInputs:
        graded_R = plan.graded_R
        group_R = plan.group_R[graded_R] if self.per == "problem" else None
        weight_R = plan.reward_R.new_zeros(len(graded_R))
        weight_R[graded_R] = losses.weights.reward_softmax(
            plan.reward_R[graded_R], group_R, self.temperature, plan.gather
        )
        return _weigh_rows(plan, graded_R, weight_R)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_graded_answers(recipe, "reward_softmax")
        if self.per == "problem" and recipe.sampling.group_size == 1:
            yield (
                'weights.problems.name = "reward_softmax" compares the answers to one problem, but '
                'sampling.group_size = 1 samples one: every weight is 1; use 2 or more, or per = "batch"'
            )


class Importance(Weighting):
    """min(cap, p / p_sampled): corrects for what the sampler leaves out (top-p, top-k) and rounds (PW-OPSD spec, M3).

    p is the student at the loss temperature before the update, p_sampled what the sampler reported.
    """

    level: RatioLevel = "token"  # sequence: the ratio of the whole answer for each of its tokens
    cap: Positive = 2.0
    mean_one: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(student=True)

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.student_logprob_N is not None and plan.sampled_logprob_N is not None
        log_ratio_N = plan.student_logprob_N - plan.sampled_logprob_N
        weight_N = losses.weights.importance(
            log_ratio_N, plan.row_N, self.level, self.cap, mean_one=self.mean_one, total=plan.total
        )
        return replace(plan, weight_N=plan.weight_N * weight_N)

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
    """IW-OPD (TRL): 1 + gamma (1 - share of the answer's disagreement with the teacher that lies before the token)."""

    gamma: Positive = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(teacher="sampled")

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.teacher_logprob_N is not None and plan.sampled_logprob_N is not None
        weight_N = losses.weights.prefix(plan.teacher_logprob_N - plan.sampled_logprob_N, plan.row_N, self.gamma)
        return replace(plan, weight_N=plan.weight_N * weight_N)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from _needs_sampled_answers(recipe, "prefix")


class Weights(BaseModel):
    """The section [weights]."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: SerializeAsAny[Named] | None = None
    problems: SerializeAsAny[Named] | None = None
    importance: Importance | None = None
    prefix: Prefix | None = None

    @property
    def parts(self) -> tuple[Weighting, ...]:
        return tuple(p for p in (self.tokens, self.problems, self.importance, self.prefix) if p is not None)

    @property
    def needs(self) -> Needs:
        return reduce(Needs.__or__, (part.needs for part in self.parts), Needs())

    @property
    def scores(self) -> dict[str, LossSpec]:
        return {name: score for part in self.parts for name, score in part.scores.items()}

    def pass_rates(self, groups: Sequence[Group], known: MutableMapping[str, float]) -> dict[str, float | None]:
        return self.problems.pass_rates(groups, known) if isinstance(self.problems, Paced) else {}

    def apply(self, plan: PlanInputs) -> PlanInputs:
        return reduce(lambda changed, part: part.apply(changed), self.parts, plan)

    def faults(self, recipe: Any) -> Iterator[str]:
        for part in self.parts:
            yield from part.faults(recipe)


TOKEN_WEIGHTS: dict[str, type[Named]] = {
    "soft_or": SoftOr,
    "q3": Q3,
    "divergence": MostApart,
    "entropy_sampling": EntropySampling,
    "position": Position,
}
PROBLEM_WEIGHTS: dict[str, type[Named]] = {"paced": Paced, "reward_softmax": RewardSoftmax}


def _weigh_rows(plan: PlanInputs, counted_R: Tensor, weight_R: Tensor) -> PlanInputs:
    weight_N = plan.weight_N * weight_R[plan.row_N].to(plan.weight_N.dtype)
    return replace(plan, mask_N=plan.mask_N & counted_R[plan.row_N], weight_N=weight_N)


def _needs_graded_answers(recipe: Any, name: str) -> Iterator[str]:
    if recipe.method.answer_source != "student":
        yield (
            f'weights.problems.name = "{name}" weighs by the student\'s rewards, but the answers of method.name = '
            f'"{recipe.method.name}" come from the {recipe.method.answer_source}; remove it, or use an on-policy method'
        )


def _needs_sampled_answers(recipe: Any, key: str) -> Iterator[str]:
    if recipe.method.answer_source != "student":
        yield (
            f"weights.{key} needs what the student's sampler reported, but the answers of method.name = "
            f'"{recipe.method.name}" come from the {recipe.method.answer_source}; remove it, or use an on-policy method'
        )
