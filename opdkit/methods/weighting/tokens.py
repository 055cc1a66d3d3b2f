"""Which tokens of an answer count, or how much by their place. Letters: N tokens of the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import Divergence, LossSpec, Support, Target
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.base import Named, NotNegative, Share
from opdkit.types import Needs, seed_from

if TYPE_CHECKING:
    from torch import Tensor


class Selection(Named, ABC):
    """Some tokens of every answer, at least one. The others are not counted, and cost no logits. An answer that cannot
    be compared (the teacher did not score it) is kept whole."""

    keep: Share

    @property
    def needs(self) -> Needs:
        asked = (Needs(views=Target().asks(score)) for score in self.scores.values())
        return reduce(Needs.__or__, asked, Needs(student=True))

    @abstractmethod
    def kept_N(self, plan: PlanInputs) -> Tensor:
        """[N] bool. All that it compares is known of every token of `plan`."""

    def apply(self, plan: PlanInputs) -> PlanInputs:
        known_N, mask_N = self.known_N(plan), plan.mask_N.clone()
        mask_N[known_N] &= self.kept_N(plan.take(known_N))
        return replace(plan, mask_N=mask_N)


class SoftOr(Selection):
    """TIP's main method (arXiv:2604.14084): tokens where the student is unsure, or apart from the teacher."""

    name: Literal["soft_or"] = "soft_or"
    keep: Share = 0.5  # share of an answer's tokens that is kept
    entropy_percentile: Share = 0.98  # entropy is cut here before it is compared

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        return {"reverse_kl": Divergence("reverse_kl")}

    def kept_N(self, plan: PlanInputs) -> Tensor:
        entropy_N, apart_N = plan.student_entropy_N, plan.student_scores["reverse_kl"]
        assert entropy_N is not None
        score_N = losses.weights.soft_or(entropy_N, apart_N, self.entropy_percentile)
        return losses.weights.keep_best(score_N, plan.row_N, self.keep)


class Q3(Selection):
    """TIP's third quadrant: tokens of which the student is sure and the teacher is not (confidently wrong)."""

    name: Literal["q3"] = "q3"
    keep: Share = 0.1  # share of an answer's tokens that is kept
    entropy_percentile: Share = 0.98  # entropy is cut here before it is compared

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        return {"forward_kl": Divergence("forward_kl")}

    def kept_N(self, plan: PlanInputs) -> Tensor:
        entropy_N, apart_N = plan.student_entropy_N, plan.student_scores["forward_kl"]
        assert entropy_N is not None
        score_N = losses.weights.confident_and_wrong(entropy_N, apart_N, self.entropy_percentile)
        return losses.weights.keep_best(score_N, plan.row_N, self.keep)


class MostApart(Selection):
    """TIP's ablation: the tokens of largest KL(student || teacher)."""

    name: Literal["divergence"] = "divergence"
    keep: Share = 0.5  # share of an answer's tokens that is kept

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
    keep: Share = 0.5  # share of an answer's tokens that is kept
    alpha: NotNegative = 1.0  # exponent of the entropy
    gamma: NotNegative = 0.0  # exponent of the JSD; 0: the teacher is not used
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
    w_min: Annotated[float, Field(ge=0, le=1)] = 0.25  # the weight of the first tokens; of the last: 1
    tau: float = 0.30  # where along the answer (0 to 1) the weight is half-way
    s: NotNegative = 0.10  # how gradual the rise is; 0: a step
    mean_one: bool = False  # divide the weights of every answer by their mean
    reverse: bool = False  # early tokens count as much as late ones would: a control of the claim, not a method

    def apply(self, plan: PlanInputs) -> PlanInputs:
        weight_N = losses.weights.position(
            plan.row_N,
            self.w_min,
            self.tau,
            self.s,
            mean_one=self.mean_one,
            reverse=self.reverse,
            dtype=plan.weight_N.dtype,
        )
        return plan.weighed(weight_N)

    def faults(self, recipe: Any) -> Iterator[str]:
        if recipe.method.weighs_position:
            yield (
                f'weights.tokens.name = "position" would weigh by position a second time: method.name = '
                f'"{recipe.method.name}" does it already; remove one of the two'
            )


TOKEN_WEIGHTS: dict[str, type[Named]] = {
    "soft_or": SoftOr,
    "q3": Q3,
    "divergence": MostApart,
    "entropy_sampling": EntropySampling,
    "position": Position,
}
