"""What a method is: choices about the loss, and the numbers they are made from.

A method says what it must be told (`needs`), where its answers come from (`answers`) and how every counted token is
scored and weighed (`terms`). It never sees a model, an engine or a file; the trainer never sees a method's name.

Letters: N counted answer tokens of the whole batch (all micro-batches), R rows (rollouts), G groups (problems).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opdkit import losses
from opdkit.losses.names import ClipKind, DivergenceKind, JsdScale, Reduction, SupportKind, TailKind
from opdkit.losses.spec import Divergence, LossSpec, Support, TeacherAdvantage
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything known about the batch before the first backward. Flat, without padding."""

    row_N: Tensor  # long: which row the token belongs to
    index_N: Tensor  # long: position in its answer, from 0
    group_R: Tensor  # long: which problem the row answers
    reward_R: Tensor  # float64; only meaningful where graded_R
    graded_R: Tensor  # bool: the grader gave a score
    mask_N: Tensor  # bool: which tokens are counted at all; changes denominators. At first `countable_N`
    weight_N: Tensor  # how much each counts ([weights]); changes none
    # What of weight_N belongs to whole answers ([weights] problems), and what is left of it; None: nothing, all of it.
    weight_R: Tensor | None = None
    within_N: Tensor | None = None
    sampled_logprob_N: Tensor | None  # nats, under the sampling distribution; None: the answers were not sampled
    # The rest is None unless the method's `needs` ask for it. Nats, at the loss temperature.
    teacher_logprob_N: Tensor | None  # of the sampled token
    teacher_entropy_N: Tensor | None
    student_logprob_N: Tensor | None  # of the sampled token, before this step's update
    student_entropy_N: Tensor | None
    student_scores: Mapping[str, Tensor] = field(default_factory=dict)  # [N] each: losses that [weights] asked for
    pass_rate_R: Tensor | None = None  # float64, of the row's problem, if [weights] asked; NaN: no answer is graded
    seed_R: Sequence[int] = ()  # one a row, from identity
    num_ids: int | None = None  # of the vocabulary
    step: int  # optimizer steps taken so far
    progress: float  # step / steps of the run, in [0, 1)
    # [N] bool by name: which tokens a view says something of; of the others its numbers are NaN. Not listed: of all.
    has_view: Mapping[str, Tensor] = field(default_factory=dict)
    required_views: tuple[str, ...] = ()  # `Method.required_views`
    total: Callable[[Tensor], Tensor] = lambda counts: counts  # sums counts over all ranks
    gather: Callable[[Tensor], Tensor] = lambda values: values  # the values of all ranks, one after the other

    def said_by(self, view: str) -> Tensor:
        """[N] bool: the tokens that a view says something of."""
        return self.has_view[view] if view in self.has_view else self.mask_N.new_ones(len(self.mask_N))

    @property
    def countable_N(self) -> Tensor:
        """[N] bool: the tokens that some term can count. Of the others nobody asks what the student says."""
        countable_N = self.mask_N.new_ones(len(self.mask_N))
        for view in self.required_views:
            countable_N = countable_N & self.said_by(view)
        return countable_N

    def take(self, keep_N: Tensor) -> PlanInputs:
        """The same rows with only these of their tokens: what a view said nothing of must be in no sum over tokens."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_N")}
        taken: dict[str, Any] = {name: None if x_N is None else x_N[keep_N] for name, x_N in arrays.items()}
        scores, views = ({name: x_N[keep_N] for name, x_N in d.items()} for d in (self.student_scores, self.has_view))
        return replace(self, **taken, student_scores=scores, has_view=views)

    def weighed(self, weight_N: Tensor | None = None, *, weight_R: Tensor | None = None) -> PlanInputs:
        """With every token, or every answer as a whole, counting so much more."""
        within_N, rows_R, all_N = self.tokens_within_N, self.weight_R, self.weight_N
        if weight_N is not None:
            within_N, all_N = within_N * weight_N, all_N * weight_N
        if weight_R is not None:
            rows_R, all_N = (
                weight_R if rows_R is None else rows_R * weight_R,
                all_N * weight_R[self.row_N].to(all_N.dtype),
            )
        return replace(self, weight_N=all_N, weight_R=rows_R, within_N=None if rows_R is None else within_N)

    @property
    def tokens_within_N(self) -> Tensor:
        """[N] how much each token counts inside its answer, whatever the answer counts."""
        return self.weight_N if self.within_N is None else self.within_N

    def coefficients(
        self,
        per: Reduction,
        *,
        mask_N: Tensor | None = None,
        weight_N: Tensor | None = None,
        divide_by: float | None = None,
        view: str | None = None,
        dilute: bool = False,
    ) -> Tensor:
        """[N] coefficients of the method's own mask and weight together with those of the recipe's [weights].

        view    the one whose word the term needs: tokens without it leave the term, and its mean
        dilute  they leave the term but stay in the denominator, as if their loss were 0
        """
        mask_N = self.mask_N if mask_N is None else self.mask_N & mask_N
        weight_N = self.weight_N if weight_N is None else self.weight_N * weight_N
        if view is not None and dilute:
            weight_N = weight_N.masked_fill(~self.said_by(view), 0.0)
        elif view is not None:
            mask_N = mask_N & self.said_by(view)
        return losses.token_coefficients(mask_N, weight_N, self.row_N, per=per, divide_by=divide_by, total=self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A method's own words about a batch, before the update.

    loss     the loss itself, where the sum of terms has its gradient but not its value; None: that sum is the loss
    numbers  shown as the metrics `method/<name>`; None where a number is not defined
    """

    loss: float | None = None
    numbers: Mapping[str, float | None] = field(default_factory=dict)


class Method(BaseModel, ABC):
    """Base of every method. The fields of a subclass are its recipe keys; their defaults are the paper's.

    `defaults` are the paper's choices outside the loss (teacher, context, sampling, optimisation): recipe sections that
    stand below the user's recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    weighs_position: ClassVar[bool] = False  # what [weights] would then do a second time
    corrects_for_sampler: ClassVar[bool] = False  # likewise
    compares_rewards: ClassVar[bool] = False  # answers to one problem, by reward: equal rewards teach nothing
    name: str
    loss_temperature: float = Field(
        1.0, gt=0
    )  # divides both sides' logits inside the loss; not the sampling temperature

    @property
    def answer_source(self) -> Literal["student", "dataset", "teacher"]:
        """Who wrote the answers that are trained on. Everything but a cold start is on-policy."""
        return "student"

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the teacher and the grader must provide."""

    @property
    def required_views(self) -> tuple[str, ...]:
        """Views without whose word a token is in no term of the loss and in no denominator. A row that lacks another
        view leaves the terms that need it (`PlanInputs.coefficients`), and stays in all others."""
        return () if self.needs.teacher == "none" else ("teacher",)

    def faults(self, recipe: Any) -> Iterator[str]:
        """What cannot work for this method in a recipe whose keys are each legal; a sentence each, with the way out."""
        yield from ()

    def warnings(self, recipe: Any) -> Iterator[str]:
        """What works in a recipe and is probably not meant; a sentence each. `check` and `train` say it and go on."""
        yield from ()

    @abstractmethod
    def terms(self, plan: PlanInputs) -> list[Term]:
        """The loss of the batch: sum over terms, over tokens, of coef_N * token_loss_N."""

    def report(self, plan: PlanInputs) -> Report:
        """Numbers of the method's own, beside those that every method has."""
        return Report()


class Averaged(Method):
    """What methods share whose loss is a mean of token losses: over tokens, over rows, or a sum over a constant."""

    reduction: Reduction = "token"
    divide_by: float | None = Field(None, gt=0)  # reduction = "constant": the sum over tokens is divided by this

    @model_validator(mode="after")
    def _divided_once(self) -> Self:
        if (self.divide_by is None) == (self.reduction == "constant"):
            raise ValueError(
                f'method.reduction = "{self.reduction}" and method.divide_by = {self.divide_by}: "constant" divides by '
                "a number fixed in advance (Dr. GRPO: rows of a step * max_answer_tokens), the others by counts; "
                "set both or neither"
            )
        return self

    @property
    def estimates_from_samples(self) -> bool:
        """Whether a divergence is estimated from the sampled tokens alone, so that it matters who drew them."""
        return False

    def is_corrected(self, recipe: Any) -> bool:
        """Whether a ratio to the sampler makes up for who drew the tokens, and how."""
        return recipe.weights.importance is not None

    def warnings(self, recipe: Any) -> Iterator[str]:
        if self.estimates_from_samples and not self.is_corrected(recipe) and recipe.train.updates_per_step > 1:
            yield (
                f'method.name = "{self.name}" estimates a divergence from tokens of the student, but with '
                f"train.updates_per_step = {recipe.train.updates_per_step} an earlier student drew most of them: the "
                "estimate is biased; set it to 1, or add [weights] importance"
            )


class Distillation(Averaged):
    """What all methods share in which a teacher's distribution is the target: direction, entries, tail, mean."""

    divergence: DivergenceKind = "reverse_kl"
    teacher_share: float | None = None  # of the mixture in jsd and the skewed forms
    jsd_scale: JsdScale = "continuous"
    support: SupportKind = "full"  # "sampled": the one-sample policy gradient of reverse_kl
    k: int | None = None  # length of a top-k list
    tail: TailKind = "bucket"
    clip: ClipKind = "none"  # token: no token's loss above clip_at, its gradient never turned; entry: as OPSD published
    clip_at: float = Field(0.05, gt=0)  # nats
    # Rows the teacher says nothing of: they leave the mean, or stay in its denominator (as SDPO published).
    without_context: Literal["leave", "dilute"] = "leave"

    @property
    def loss(self) -> LossSpec:
        if self.support == "sampled":
            return TeacherAdvantage()
        support = Support(self.support, self.k)
        clips = {f"{self.clip}_clip": self.clip_at} if self.clip != "none" else {}
        return Divergence(self.divergence, support, self.tail, self.teacher_share, self.jsd_scale, **clips)

    @property
    def needs(self) -> Needs:
        return self.loss.needs

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
            keys = {"teacher_share": None, "jsd_scale": "continuous", **keys}
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
                f'method.without_context = "dilute" keeps absent rows in a count, but method.reduction = '
                f'"{self.reduction}" divides by none; use "token", "sequence" or "sequence_sum", or "leave"'
            )
        assert self.loss is not None  # building it refuses what has no meaning
        return self

    def coefficients(self, plan: PlanInputs, weight_N: Tensor | None = None) -> Tensor:
        """[N] of the method's mean; `weight_N` beside the recipe's own."""
        return plan.coefficients(
            self.reduction,
            weight_N=weight_N,
            divide_by=self.divide_by,
            view="teacher",
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

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [losses.Term(name=self.divergence, loss=self.loss, coef_N=self.coefficients(plan))]
