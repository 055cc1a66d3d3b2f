"""GRPO in which an answer that failed beside a right sibling is distilled instead: routing by answer.

    answer i is distilled, as in SDPO, if it is wrong and some sibling is right; else it is GRPO's

The teacher, the student's average, reads a right sibling. D is SDPO's Jensen-Shannon divergence on the student's 100
likeliest tokens and a bucket; weights, means and the rest are in `branched.py`. A problem whose answers are all wrong,
or all right, has nobody to distil and A = 0: it is silent (`i_sdpo` teaches the first kind).

Source: SRPO (arXiv:2604.02288), from a reimplementation (github.com/THU-BPM/RLCSD), not the authors' code. "One
denominator over all routed tokens" is read here as that of both branches (`mean_over = "all"`), as every answer is
routed to one of them; "branch" is the other reading. Not public: the learning rate, here GRPO's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from opdkit.methods.branched import Branched
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.sdpo import TEACHER

if TYPE_CHECKING:
    from torch import Tensor


class SRPO(Branched):
    name: Literal["srpo"] = "srpo"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": TEACHER,
        "context": {"kind": "peers", "slots": ["success"], "feedback": "never", "remove_thinking": "successes"},
        "sampling": {"group_size": 8, "temperature": 1.0},
        "train": {"problems_per_step": 32, "lr": 1e-6, "max_grad_norm": 1.0},
    }

    def routed_R(self, plan: PlanInputs) -> Tensor:
        return self.failed_R(plan) & self.in_solved_group_R(plan)
