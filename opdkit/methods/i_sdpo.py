"""GRPO in which a problem that no answer solved is distilled instead: routing by group.

    all answers to a problem are distilled if all are wrong and the teacher has a solution to read; else GRPO

where GRPO itself would be silent, for equal rewards have A = 0. A problem that all answers solve stays silent.

    D = (1 - a) KL(teacher || student) + a KL(student || teacher),   a = `reverse_share` = 1/2

on the student's 100 likeliest tokens and a bucket; weights, means and the rest are in `branched.py`. The teacher, the
student's average, reads [context], by default the reference solution. The paper shows it the gold answer alone:
`data.columns = { solution = "answer" }` has the data's answer in place of a solution.

Source: I-SDPO (arXiv:2608.12957), from third-party notes. Its average moves at 0.05, its cap on ratios is 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from opdkit.losses.names import DivergenceKind, JsdScale
from opdkit.methods.branched import Branched
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.sdpo import TEACHER

if TYPE_CHECKING:
    from torch import Tensor


class ISDPO(Branched):
    name: Literal["i_sdpo"] = "i_sdpo"
    divergence: DivergenceKind = "mixed_kl"
    teacher_share: float | None = None
    jsd_scale: JsdScale = "continuous"
    reverse_share: float | None = 0.5

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": TEACHER,
        "context": {"kind": "reference_solution"},
        "sampling": {"group_size": 16, "temperature": 1.0},
        "train": {"problems_per_step": 32, "lr": 5e-6, "max_grad_norm": 1.0},
    }

    def routed_R(self, plan: PlanInputs) -> Tensor:
        return self.failed_R(plan) & ~self.in_solved_group_R(plan)
