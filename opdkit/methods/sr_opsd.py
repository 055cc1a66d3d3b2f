"""Self-distillation with an anchor: the target is mixed with the initial policy, the divergence is Renyi's.

    P ~ T^a R^(1 - a), renormalised and held constant,   a = `teacher_exponent`
    L = mean over tokens of  1 / (rho - 1) log sum P^rho S^(1 - rho),   rho = `order`
    its gradient with respect to the logits is  S - Q,   Q ~ P^rho S^(1 - rho)

T is the student's average, reading the reference solution; R, the view "reference", the initial weights reading
nothing. a = 1 leaves the anchor out (and is not asked for R), `divergence = "forward_kl"` is the limit rho -> 1. The
sum is over the student's 100 likeliest tokens and one bucket for the rest.

Source: SR-OPSD (arXiv:2608.09745), its code read in a fork. By its paper the anchor alone, without Renyi's divergence,
hurts. Not public: the number of problems a step. LoRA 64 / 128 is in the recipe. Nothing is graded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from opdkit.losses.names import DivergenceKind, SupportKind
from opdkit.losses.spec import Target
from opdkit.methods.distillation import DistillationBase


class SROPSD(DistillationBase):
    name: Literal["sr_opsd"] = "sr_opsd"
    teacher_exponent: float = Field(0.9, gt=0, le=1)  # a; 1: no reference
    divergence: DivergenceKind = "renyi"
    order: float | None = 0.95
    support: SupportKind = "student_topk"
    k: int | None = 100

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"kind": "self", "weights": "ema", "ema_rate": 0.05},
        "context": {"kind": "reference_solution"},
        "views": {"reference": {"teacher": {"kind": "self", "weights": "initial"}, "context": {"kind": "none"}}},
        "sampling": {"group_size": 8, "temperature": 1.0},
        "train": {"lr": 5e-6, "max_grad_norm": 0.1},
    }

    @property
    def compared(self) -> Target:
        weights = {"teacher": self.teacher_exponent, "reference": 1 - self.teacher_exponent}
        return Target.of({view: weight for view, weight in weights.items() if weight})
