"""What a method is: choices about the loss, and the numbers they are made from.

A method says what it must be told (`needs`), where its answers come from (`answers`) and how every counted token is
scored and weighed (`terms`). It never sees a model, an engine or a file; the trainer never sees a method's name.

Letters: N counted answer tokens of the whole batch (all micro-batches), R rows (rollouts), G groups (problems).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opdkit import losses
from opdkit.losses.names import DivergenceKind, JsdScale, Reduction, SupportKind, TailKind
from opdkit.losses.spec import Divergence, Support, TeacherAdvantage
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


def _this_rank_only(counts: Tensor) -> Tensor:
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything known about the batch before the first backward. Flat, without padding."""

    row_N: Tensor  # long: which row the token belongs to
    index_N: Tensor  # long: position in its answer, from 0
    group_R: Tensor  # long: which problem the row answers
    reward_R: Tensor  # float64; only meaningful where graded_R
    graded_R: Tensor  # bool: the grader gave a score
    mask_N: Tensor  # bool: which tokens are counted at all ([weights] selection); changes denominators
    weight_N: Tensor  # how much each counts ([weights]); changes none
    sampled_logprob_N: Tensor | None  # nats, under the sampling distribution; None: the answers were not sampled
    # The rest is None unless the method's `needs` ask for it. Nats, at the loss temperature.
    teacher_logprob_N: Tensor | None  # of the sampled token
    teacher_entropy_N: Tensor | None
    student_logprob_N: Tensor | None  # of the sampled token, before this step's update
    student_entropy_N: Tensor | None
    step: int  # optimizer steps taken so far
    progress: float  # step / steps of the run, in [0, 1)
    total: Callable[[Tensor], Tensor] = field(default=_this_rank_only)  # sums counts over all ranks

    def coefficients(
        self,
        per: Reduction,
        *,
        mask_N: Tensor | None = None,
        weight_N: Tensor | None = None,
        divide_by: float | None = None,
    ) -> Tensor:
        """[N] coefficients of the method's own mask and weight together with those of the recipe's [weights]."""
        mask_N = self.mask_N if mask_N is None else self.mask_N & mask_N
        weight_N = self.weight_N if weight_N is None else self.weight_N * weight_N
        return losses.token_coefficients(mask_N, weight_N, self.row_N, per=per, divide_by=divide_by, total=self.total)


class Method(BaseModel, ABC):
    """Base of every method. The fields of a subclass are its recipe keys; their defaults are the paper's.

    `defaults` are the paper's choices outside the loss (teacher, context, sampling, optimisation): recipe sections that
    stand below the user's recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
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

    def faults(self, recipe: Any) -> Iterator[str]:
        """What cannot work for this method in a recipe whose keys are each legal; a sentence each, with the way out."""
        yield from ()

    def warnings(self, recipe: Any) -> Iterator[str]:
        """What works in a recipe and is probably not meant; a sentence each. `check` and `train` say it and go on."""
        yield from ()

    @abstractmethod
    def terms(self, plan: PlanInputs) -> list[Term]:
        """The loss of the batch: sum over terms, over tokens, of coef_N * token_loss_N."""


class Distillation(Method):
    """What all methods share in which a teacher's distribution is the target: direction, entries, tail, mean."""

    divergence: DivergenceKind = "reverse_kl"
    teacher_share: float | None = None  # of the mixture in jsd and the skewed forms
    jsd_scale: JsdScale = "continuous"
    support: SupportKind = "full"  # "sampled": the one-sample policy gradient of reverse_kl
    k: int | None = None  # length of a top-k list
    tail: TailKind = "bucket"
    reduction: Literal["token", "sequence"] = "token"

    @property
    def loss(self) -> Divergence | TeacherAdvantage:
        if self.support == "sampled":
            return TeacherAdvantage()
        support = Support(self.support, self.k)
        return Divergence(self.divergence, support, self.tail, self.teacher_share, self.jsd_scale)

    @property
    def needs(self) -> Needs:
        return self.loss.needs

    @model_validator(mode="after")
    def _loss_exists(self) -> Self:
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f'support = "sampled" estimates reverse_kl from one token, but divergence = "{self.divergence}"; '
                'use divergence = "reverse_kl", or a support with more entries'
            )
        assert self.loss is not None  # building it refuses what has no meaning
        return self

    def terms(self, plan: PlanInputs) -> list[Term]:
        return [losses.Term(name=self.divergence, loss=self.loss, coef_N=plan.coefficients(self.reduction))]
