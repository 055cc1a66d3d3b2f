"""Reward and teacher in one loss: GRPO's group advantage beside on-policy distillation.

    L = reward_weight * L_grpo + teacher_weight * L_teacher

L_grpo as in `grpo.py`, L_teacher as in `topk_opd.py` with all its forms: by default a divergence over the full
vocabulary, which has far less variance than adding the teacher's advantage of the sampled token to the reward's.

Source: `token_reward_direct_plus_grpo` of Rethinking OPD's code (arXiv:2604.13016), which adds the two advantages of
the sampled token under one ratio: the same value and gradient while a batch is used for one update, reached with
form = "advantage", support = "sampled". There the two fail with top-k candidates; here they add up in every form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit.losses.names import SupportKind
from opdkit.methods.group_reward import GroupReward
from opdkit.methods.opd import OPD
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.topk_opd import TopkDistillation
from opdkit.types import Needs

if TYPE_CHECKING:
    from opdkit.losses import Term


class GRPOOPD(TopkDistillation, GroupReward):
    name: Literal["grpo_opd"] = "grpo_opd"
    support: SupportKind = "full"
    k: int | None = None
    reward_weight: float = Field(1.0, gt=0)  # of GRPO's loss
    teacher_weight: float = Field(1.0, gt=0)  # of the teacher's loss

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = OPD.defaults

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(reward=True)

    @property
    def required_views(self) -> tuple[str, ...]:
        return ()  # the reward's part is of every answer, also of one that the teacher did not score

    def terms(self, plan: PlanInputs) -> list[Term]:
        teacher = [replace(term, coef_N=self.teacher_weight * term.coef_N) for term in super().terms(plan)]
        return [*teacher, self.reward_term(plan, self.reward_weight)]
