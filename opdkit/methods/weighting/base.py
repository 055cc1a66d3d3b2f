"""One way to weigh, whatever the method: what it must know, and what it makes of the plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from opdkit.losses.spec import LossSpec
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Weighting(BaseModel, ABC):
    """One way to weigh. Its fields are its recipe keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @property
    def needs(self) -> Needs:
        """What must be known beside what the method asks for."""
        return Needs()

    @property
    def scores(self) -> Mapping[str, LossSpec]:
        """Losses to be known of every token before the update, by name: `PlanInputs.student_scores`."""
        return {}

    def known_N(self, plan: PlanInputs) -> Tensor:
        """[N] bool: countable tokens of which all that is compared here is known. It leaves the others as they are."""
        return plan.countable_N & plan.said_by(*self.needs.views)

    @abstractmethod
    def apply(self, plan: PlanInputs) -> PlanInputs:
        """The plan with some of its mask or weight changed."""

    def faults(self, recipe: Any) -> Iterator[str]:
        """What cannot work in a recipe whose keys are each legal; a sentence each, with the way out."""
        yield from ()


class Named(Weighting, ABC):
    name: str
