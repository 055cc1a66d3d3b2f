"""Self-distillation from siblings: the teacher is the student's average, reading a right answer to the same problem.

    L = mean over rows, mean over tokens of  1/2 KL(student || m) + 1/2 KL(teacher || m),   m = (student + teacher) / 2
    teacher = p_average( . | problem, a sibling's right answer or the answer's own feedback, answer so far)

The divergence compares the student's 100 likeliest entries and one bucket for the rest, in the published scale
(undivided: about a quarter of a KL, so learning rates do not carry over to `forward_kl` and `reverse_kl`). With
`importance_cap` = c each token also counts min(c, p(y) / p_sampled(y)), held constant.

Source: SDPO (arXiv:2601.20802); its `alpha` is `teacher_share`. Where we differ: a row without context leaves the mean
(`without_context = "dilute"` keeps it in the denominator, as published); means are over the whole batch, by rows, which
is what the published token mean over micro-batches of one row comes to; the average is float32 and in every checkpoint;
`trust_region` (logits of initial and live student mixed) is a choice of [teacher] weights. The published cap compares
with log-probs recomputed before the update, so with one update per batch it never acts; here it compares with what the
sampler reported. The published step-level KL equals the token-level loss in value and gradient, so it is no option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.names import DivergenceKind, JsdScale, Reduction, SupportKind
from opdkit.methods.base import Report
from opdkit.methods.distillation import Distillation
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term

# What SDPO and MOPD trained with alike.
TEACHER: Mapping[str, Any] = {"kind": "self", "weights": "ema", "ema_rate": 0.05}
TRAIN: Mapping[str, Any] = {
    "problems_per_step": 32,
    "lr": 1e-5,
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}


class FromSiblings(Distillation):
    """The loss of SDPO and MOPD, which differ in what the teacher reads."""

    divergence: DivergenceKind = "jsd"
    teacher_share: float | None = 0.5
    jsd_scale: JsdScale = "published"
    support: SupportKind = "student_topk"
    k: int | None = 100
    reduction: Reduction = "sequence"
    importance_cap: float | None = Field(None, gt=0)  # published: is_clip = 2

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(reward=True, student=self.importance_cap is not None)

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [self.term(plan, weight_N=None if self.importance_cap is None else self._ratios(plan))]

    def report(self, plan: PlanInputs) -> Report:
        if self.importance_cap is None:
            return Report()
        counted_N = plan.mask_N & plan.said_by(*self.compared.views)
        capped = float((self._ratios(plan)[counted_N] >= self.importance_cap).double().mean())
        return Report(numbers={"share_of_ratios_capped": capped})

    def is_corrected(self, recipe: Any) -> bool:
        return self.importance_cap is not None or super().is_corrected(recipe)

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        if self.importance_cap is None:
            return
        if recipe.weights.importance is not None:
            yield (
                f"method.importance_cap = {self.importance_cap} and [weights] importance would correct for the sampler "
                "twice; keep one of them"
            )
        if recipe.sampling.temperature != self.loss_temperature:
            yield (
                f"method.importance_cap = {self.importance_cap} compares the student with what was sampled, but "
                f"method.loss_temperature = {self.loss_temperature} and sampling.temperature = "
                f"{recipe.sampling.temperature}; set both to the same, or remove the cap"
            )

    def _ratios(self, plan: PlanInputs) -> Tensor:
        assert self.importance_cap is not None
        assert plan.student_logprob_N is not None and plan.sampled_logprob_N is not None
        log_ratio_N = plan.student_logprob_N - plan.sampled_logprob_N
        return losses.weights.importance(log_ratio_N, plan.row_N, "token", self.importance_cap, mean_one=False)


class SDPO(FromSiblings):
    name: Literal["sdpo"] = "sdpo"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "teacher": TEACHER,
        "context": {"kind": "peers", "slots": ["success"], "remove_thinking": "successes"},
        "sampling": {"group_size": 8, "temperature": 1.0, "max_answer_tokens": 8192},
        "train": TRAIN,
    }
