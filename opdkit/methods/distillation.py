"""The family of distillation: a student compared with a target, by a divergence over a support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from opdkit import losses
from opdkit.losses.names import ClipKind, DivergenceKind, JsdScale, SupportKind, TailKind
from opdkit.losses.spec import Divergence, LossSpec, Support, Target, TeacherAdvantage
from opdkit.methods.base import Averaged
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term

TEACHER: Mapping[str, float] = {"teacher": 1.0}


class DistillationBase(Averaged):
    """What all methods share in which a target is compared with the student: direction, entries, tail, mean."""

    divergence: DivergenceKind = "reverse_kl"  # of student and target
    teacher_share: float | None = None  # of the mixture in jsd and the skewed forms
    # Jsd: divided so that it becomes the KLs at both ends of teacher_share, or undivided as in GKD and SDPO.
    jsd_scale: JsdScale = "continuous"
    reverse_share: float | None = None  # of reverse_kl in mixed_kl; the rest is forward_kl
    order: float | None = None  # of renyi, between 0 and 1
    support: SupportKind = "full"  # "sampled": the one-sample policy gradient of reverse_kl
    k: int | None = None  # length of a top-k list
    # What becomes of entries outside a list: one bucket, both sides or the teacher renormalised, dropped.
    tail: TailKind = "bucket"
    clip: ClipKind = "none"  # token: no token's loss above clip_at, its gradient never turned; entry: as OPSD published
    clip_at: float = Field(0.05, gt=0)  # nats
    # Rows for which a view has nothing to read: "leave" takes them out of the mean; "dilute" counts their tokens in its
    # denominator with a loss of 0, as SDPO published, so that the other rows count less.
    without_context: Literal["leave", "dilute"] = "leave"

    @property
    def loss(self) -> LossSpec:
        if self.support == "sampled":
            return TeacherAdvantage()
        support = Support(self.support, self.k)
        clips = {f"{self.clip}_clip": self.clip_at} if self.clip != "none" else {}
        return Divergence(
            self.divergence,
            support,
            self.tail,
            self.teacher_share,
            self.jsd_scale,
            self.reverse_share,
            self.order,
            **clips,
        )

    @property
    def compared(self) -> Target:
        """What the student is compared with."""
        return Target()

    @property
    def needs(self) -> Needs:
        return Needs(views=self.compared.asks(self.loss))

    @property
    def required_views(self) -> tuple[str, ...]:
        return () if self.without_context == "dilute" else super().required_views

    @model_validator(mode="before")
    @classmethod
    def _belonging_keys_step_back(cls, keys: Any) -> Any:
        """A paper's default that belongs to another default (k to a top-k support) goes where that one is changed."""
        if not isinstance(keys, Mapping):
            return keys
        keys, fields = dict(keys), cls.model_fields
        if keys.get("divergence", fields["divergence"].default) != fields["divergence"].default:
            own = {"teacher_share": None, "jsd_scale": "continuous", "reverse_share": None, "order": None}
            keys = {**own, **keys}
        if keys.get("support", fields["support"].default) in ("full", "sampled"):
            keys = {"k": None, **keys}
        if keys.get("support", fields["support"].default) == "sampled":
            keys = {"clip": "none", **keys}
        return keys

    @model_validator(mode="after")
    def _loss_exists(self) -> Self:
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f'support = "sampled" estimates reverse_kl from one token, but divergence = "{self.divergence}"; '
                'use divergence = "reverse_kl", or a support with more entries'
            )
        if self.support == "sampled" and self.k is not None:
            raise ValueError(f'support = "sampled" has no k, but k = {self.k} was given; remove it')
        if self.support == "sampled" and self.clip != "none":
            raise ValueError(
                f'clip = "{self.clip}" caps a divergence, but support = "sampled" has only a surrogate of one; '
                'set clip = "none", or a support with more entries'
            )
        if self.without_context == "dilute" and self.reduction in ("sum", "constant"):
            raise ValueError(
                f'method.without_context = "dilute" counts rows without context in the denominator, but '
                f'method.reduction = "{self.reduction}" has none; use "token", "sequence" or "sequence_sum", or "leave"'
            )
        assert self.loss is not None and self.compared is not None  # building them refuses what has no meaning
        return self

    def coefficients(self, plan: PlanInputs, weight_N: Tensor | None = None) -> Tensor:
        """[N] of the method's mean; `weight_N` beside the recipe's own."""
        return plan.coefficients(
            self.reduction,
            weight_N=weight_N,
            divide_by=self.divide_by,
            views=self.compared.views,
            dilute=self.without_context == "dilute",
        )

    @property
    def estimates_from_samples(self) -> bool:
        return self.support == "sampled"

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        sampling = recipe.sampling
        moved = sampling.top_p < 1 or sampling.top_k or sampling.min_p or sampling.temperature != self.loss_temperature
        if self.estimates_from_samples and moved and not self.is_corrected(recipe):
            yield (
                'method.support = "sampled" estimates the divergence from tokens of the student at loss_temperature = '
                f"{self.loss_temperature}, but they are sampled at temperature = {sampling.temperature}, top_p = "
                f"{sampling.top_p}, top_k = {sampling.top_k}, min_p = {sampling.min_p}: the estimate is biased; sample "
                "from the whole distribution at that temperature, or add [weights] importance"
            )

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        for view in self.compared.views:
            if view in recipe.views and recipe.views[view].count > 1:
                yield (
                    f"views.{view}.count = {recipe.views[view].count}: the view repeats, and a target (method.target, "
                    "method.mixture) is of views with one reading each; set count = 1"
                )

    def term(self, plan: PlanInputs, name: str | None = None, weight_N: Tensor | None = None) -> Term:
        """The comparison with the target, under the method's mean."""
        coef_N = self.coefficients(plan, weight_N)
        return losses.Term(name=name or self.divergence, loss=self.loss, coef_N=coef_N, target=self.compared)

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [self.term(plan)]


class Distillation(DistillationBase):
    """A comparison whose target a recipe may choose."""

    # A weighted sum of the logits of views, renormalised (weights need not sum to one or be positive), or a mixture of
    # their probabilities. The view "teacher" is [teacher] and [context]; others are [views.NAME].
    target: Mapping[str, float] = TEACHER
    mixture: Mapping[str, float] | None = None  # the second of the two; takes the place of target

    @property
    def compared(self) -> Target:
        return Target.of(self.target) if self.mixture is None else Target.of(self.mixture, "mixture")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.mixture is not None and dict(self.target) != TEACHER:
            raise ValueError(
                f"method.target = {dict(self.target)} sums logits and method.mixture = {dict(self.mixture)} mixes "
                "probabilities: they are two targets for one loss; keep one of them"
            )
        return self
