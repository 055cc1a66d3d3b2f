"""Distillation with a scaled reward: what sets the teacher apart from a reference is taken further than it went.

    A = c (log T(y) - log R(y)) - (log S(y) - log R(y)),   c = `reward_scale`, T teacher, R reference, S student
    L = -1/N sum over tokens  A log S(y),   A held constant

that is on-policy distillation with the target T^c R^(1 - c), renormalised: c = 1 is plain OPD (R cancels, and is not
asked), c < 1 stops on the way from R to T, c > 1 extrapolates. `support = "sampled"` is the published form, one token a
position; any other support compares with the target itself, whose normaliser the sampled form leaves out (one number
for all tokens of a position: the same gradient in the mean).

R is the view "reference": by default the student's initial weights, or the model that the teacher was trained from
("reward correction"), [views.reference.teacher] kind = "model". T, R and S read the same.

Source: G-OPD and ExOPD (arXiv:2602.12125), its code read. Where we differ: log S is the student's at the loss, where
the code has the weights that sampled under a PPO ratio: the same while a batch is used for one update. Its cap of 5 on
the ratio to the sampler is `[weights] importance`, in the recipe. Two teachers by a key of the row are not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from opdkit.losses.names import SupportKind
from opdkit.losses.spec import Target
from opdkit.methods.distillation import DistillationBase


class ExOPD(DistillationBase):
    name: Literal["exopd"] = "exopd"
    reward_scale: float = Field(1.25, gt=0)  # lambda of the paper; 1: plain distillation
    support: SupportKind = "sampled"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "context": {"kind": "none"},
        "views": {"reference": {"teacher": {"kind": "self", "weights": "initial"}}},
        "sampling": {"group_size": 1, "temperature": 1.0, "max_answer_tokens": 16384},
        "train": {"problems_per_step": 1024, "lr": 1e-5},
    }

    @property
    def compared(self) -> Target:
        weights = {"teacher": self.reward_scale, "reference": 1 - self.reward_scale}
        return Target.of({view: weight for view, weight in weights.items() if weight})

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        reference = recipe.views.get("reference")
        if reference is not None and reference.context != recipe.context:
            yield (
                "[context] and [views.reference.context] differ: what is scaled is then also what the teacher reads, "
                "not only what it learned; give both the same"
            )
