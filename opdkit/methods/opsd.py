"""On-policy self-distillation: the teacher is the student's own initial weights, reading the reference solution.

    L = 1/N sum over tokens  D min(1, c / D),   D = KL(teacher || student),   the factor held constant, c = 0.05

    teacher = p_initial( . | problem, solution, answer so far)

Forward KL on the full vocabulary at temperature 1.1 on both sides, the temperature the answers are sampled with.
Nothing is graded. Rows whose problem has no solution leave the mean, and are counted.

Sources: OPSD (arXiv:2601.18734) with the settings PW-OPSD (arXiv:2605.21606) trained it with. Their initial weights are
a LoRA student's frozen base, which `teacher.weights = "adapter_off"` (or "initial") reproduces.

Where we differ from the published code. It caps every vocabulary entry's term at c before summing; a capped entry gives
no gradient, so where the teacher's favourite token is capped the rest push the student away from it, and the loss is
not bounded below. Ours caps the token's loss and keeps its direction; `clip = "entry"` is the published one, and the
metrics `loss/forward_kl_share_of_..._clipped` say what either took. Token means are over the whole batch instead of
each micro-batch, and everything is in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from opdkit.losses.names import ClipKind, DivergenceKind
from opdkit.methods.distillation import Distillation


class OPSD(Distillation):
    name: Literal["opsd"] = "opsd"
    divergence: DivergenceKind = "forward_kl"
    loss_temperature: float = Field(1.1, gt=0)
    clip: ClipKind = "token"
    clip_at: float = Field(0.05, gt=0)

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": {"kind": "self", "weights": "initial"},
        "context": {"kind": "reference_solution"},
        "sampling": {"group_size": 1, "temperature": 1.1, "top_p": 0.95, "top_k": 20, "max_answer_tokens": 1024},
        "train": {"problems_per_step": 32, "lr": 5e-6, "schedule": "linear", "max_grad_norm": 0.1},
    }
