"""On-policy distillation on a few likely tokens: five candidate sets, three weights, or the sampled token.

With S the candidates of a position (`support`), p the student, q the teacher:

    form = "divergence"  D(student, teacher) on S with the rest of both sides in one bucket, a true divergence
    form = "advantage"   as published: L = -sum over S of A r,  A = -w (log p - log q) held constant,  r = p / p_old,
                         w = p / p(S), q / q(S) or 1 / |S| for `entry_weight` = student_p, teacher_p, none;
                         on the symmetric difference w = p, q or 1;  on the sampled token w = 1

log p and log q are those of the full vocabulary. The published PPO clip and dual clip of r are no keys here: p_old is
the student as each update finds it, so r is 1 and neither ever acts, as in the published settings of one update a batch
(`tests/parity/test_topk_opd.py` holds the clipped ratio to its numbers too). [weights] importance corrects for the
sampler, and for earlier updates on the same batch.

Which steps go downhill: over 1000 random pairs of distributions on 200 tokens, k = 16, the step of "advantage" goes up
the full reverse KL in 0 % (student_p on student_topk or union), 3 to 15 % (teacher_p; student_p on other supports), 9 %
(none on student_topk) and up to 11 % (symmetric_difference). The last two go up the forward KL even more often, and
`none` and the symmetric difference follow no divergence: `opdkit check` warns of them. The table is in
`tests/methods/test_topk_modes.py`; real lists that overlap more are kinder.

Source: Rethinking OPD (arXiv:2604.13016); its only_stu, only_tch and union-intersection are student_topk, teacher_topk
and symmetric_difference. Where we differ: the default is the divergence; means are over the whole batch; what is
missing on one side comes from hidden states, not from another pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from opdkit.losses.names import EntryWeight, SupportKind
from opdkit.losses.spec import EntryAdvantage, LossSpec, Support, TeacherAdvantage
from opdkit.methods.distillation import Distillation
from opdkit.methods.opd import OPD
from opdkit.methods.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from opdkit.losses import Term


class TopkDistillation(Distillation):
    """The loss of `topk_opd`, also for methods that add to it."""

    support: SupportKind = "student_topk"
    k: int | None = 16
    form: Literal["divergence", "advantage"] = "divergence"  # a divergence, or the published policy gradient
    entry_weight: EntryWeight | None = None  # form = "advantage" on more than the sampled token; student_p there

    @model_validator(mode="before")
    @classmethod
    def _form_fills_in(cls, keys: Any) -> Any:
        if not isinstance(keys, Mapping) or keys.get("form") != "advantage":
            return keys
        weight = {} if keys.get("support") == "sampled" else {"entry_weight": "student_p"}
        return {"tail": "drop", **weight, **keys}

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        where = f'method.form = "{self.form}" with support = "{self.support}"'
        if self.entry_weight is not None and (self.support == "sampled" or self.form == "divergence"):
            raise ValueError(
                f'{where} has no use for entry_weight = "{self.entry_weight}": it weighs the candidates of form = '
                '"advantage"; leave it out (a divergence has its direction: divergence = "forward_kl", ...)'
            )
        if self.form == "advantage" and (self.divergence, self.tail, self.clip) != ("reverse_kl", "drop", "none"):
            raise ValueError(
                f"{where} is no divergence: divergence, tail and clip have no meaning for it; leave them out, or use "
                'form = "divergence"'
            )
        return self

    @property
    def loss(self) -> LossSpec:
        if self.form == "divergence":
            return super().loss
        if self.support == "sampled":
            return TeacherAdvantage("ratio")
        assert self.entry_weight is not None
        return EntryAdvantage(Support(self.support, self.k), self.entry_weight)

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [self.term(plan, self.divergence if self.form == "divergence" else "advantage")]

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if self.form == "advantage" and (self.entry_weight == "none" or self.support == "symmetric_difference"):
            yield (
                f'method.form = "advantage" with support = "{self.support}" and entry_weight = "{self.entry_weight}" '
                "follows no divergence, so its step is not always a descent direction (measured in "
                'opdkit/methods/topk_opd.py); form = "divergence" follows one'
            )


class TopkOPD(TopkDistillation):
    name: Literal["topk_opd"] = "topk_opd"

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = OPD.defaults
