"""What a method is: choices about the loss, and the numbers they are made from.

A method says what it must know (`needs`), where its answers come from (`answers`) and how every counted token is
scored and weighed (`terms`). It never sees a model, an engine or a file; the trainer never sees a method's name.

Letters: N counted answer tokens of the whole batch (all micro-batches), R rows (rollouts), G groups (problems).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opdkit.losses.names import Reduction
from opdkit.types import Needs

if TYPE_CHECKING:
    from opdkit.losses import Term
    from opdkit.methods.plan_inputs import PlanInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A method's own numbers of a batch, before the update.

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
        """Views that must have scored a token for it to be in any term or denominator. A row that lacks another view
        leaves the terms that need it (`PlanInputs.coefficients`), and stays in all others."""
        return tuple(self.needs.views)

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

    # Mean over tokens, mean of each row's mean, mean of each row's sum, the sum, or the sum over a constant.
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
