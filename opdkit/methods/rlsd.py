"""Reward and privileged self in one advantage: the reward says which way, the teacher how far.

    d = log T(y | solution) - log S(y), held constant
    w = exp(sign(A) d), clipped to [1 - ratio_clip, 1 + ratio_clip]
    A' = A ((1 - l) + l w),   l = teacher_share, falling to 0 in a line over `fade_steps`
    L = GRPO's clipped policy gradient (`group_reward.py`) with A' in place of A

A is GRPO's advantage of the answer. Where it is positive, tokens that the informed teacher likes better count more;
where it is negative, those that it likes less. No token's direction is ever the teacher's. A group of equal rewards has
A = 0 and is silent; an answer that the teacher did not score keeps A. From `fade_steps` on the rest is GRPO, though
the teacher is still asked; 0: l stays.

Source: RLSD (arXiv:2604.03128), from a translation and two reimplementations, no code of the authors. Not public:
whether the mean is over tokens or answers (`reduction`; by answers, as in `grpo`). The teacher is the live student; one
reimplementation takes a snapshot every 10 steps, for which teacher.weights has no choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import Reduction
from opdkit.methods.base import Report
from opdkit.methods.group_reward import GroupReward
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class RLSD(GroupReward):
    name: Literal["rlsd"] = "rlsd"
    reduction: Reduction = "sequence"
    teacher_share: float = Field(0.5, ge=0, le=1)  # lambda of the paper, at the first step
    ratio_clip: float = Field(0.2, gt=0, lt=1)  # of w, either way
    fade_steps: int = Field(50, ge=0)  # steps until teacher_share is 0; 0: it stays

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"kind": "self", "weights": "live"},
        "context": {"kind": "reference_solution"},
        "sampling": {"group_size": 8, "temperature": 1.0},
        "train": {"problems_per_step": 32, "lr": 1e-6, "max_grad_norm": 1.0},
    }

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled")}, reward=True, student=True)

    def share(self, step: int) -> float:
        return self.teacher_share * (max(0.0, 1 - step / self.fade_steps) if self.fade_steps else 1.0)

    def gap_N(self, plan: PlanInputs) -> Tensor:
        assert plan.teacher_logprob_N is not None and plan.student_logprob_N is not None
        return losses.teacher_minus_student(plan.teacher_logprob_N, plan.student_logprob_N)

    def terms(self, plan: PlanInputs) -> list[Term]:
        advantage_N = losses.scaled_by_ratio(
            self.advantage_N(plan), self.gap_N(plan), self.share(plan.step), self.ratio_clip
        )
        return [self.reward_term(plan, advantage_N=advantage_N)]

    def report(self, plan: PlanInputs) -> Report:
        moved_N = (self.advantage_N(plan).sign() * self.gap_N(plan)).exp() - 1
        told_N = moved_N[plan.mask_N & plan.said_by("teacher") & (self.advantage_N(plan) != 0)]
        clipped = float((told_N.abs() > self.ratio_clip).double().mean()) if len(told_N) else None
        return Report(numbers={"teacher_share": self.share(plan.step), "share_of_ratios_clipped": clipped})

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if 0 < self.fade_steps < recipe.train.steps:
            yield (
                f"method.fade_steps = {self.fade_steps}: from there to train.steps = {recipe.train.steps} this is GRPO "
                "(as published); 0 keeps the teacher's share"
            )
