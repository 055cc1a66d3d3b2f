"""The recipe's [weights]: which tokens count, and how much, whatever the method.

    tokens      one of TOKEN_WEIGHTS: a selection (a mask: the loss is the mean over kept tokens), or `position`
    problems    one of PROBLEM_WEIGHTS: weights by how often a problem is solved, or which answers were rewarded
    turns       one of TURN_WEIGHTS: turns of an episode, by their place or by what the teacher says of them
    importance  truncated importance weights: the policy that is trained over the distribution that was sampled
    prefix      early tokens count more, by how much of the answer's disagreement still lies ahead (IW-OPD)

They act on the plan before the method makes its terms, and multiply. What a selection must know of the student and the
teacher comes from a pass without gradient before the update, which is made only if needed; a token that is not
kept then forms no logits with gradient. The formulas are in `losses/weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from functools import reduce
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from opdkit.losses.spec import LossSpec
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.base import Named, Weighting
from opdkit.methods.weighting.problems import PROBLEM_WEIGHTS, Paced
from opdkit.methods.weighting.ratios import Importance, Prefix
from opdkit.methods.weighting.tokens import TOKEN_WEIGHTS
from opdkit.methods.weighting.turns import TURN_WEIGHTS
from opdkit.types import Group, Needs

__all__ = ["PROBLEM_WEIGHTS", "TOKEN_WEIGHTS", "TURN_WEIGHTS", "Paced", "Weights"]


class Weights(BaseModel):
    """The section [weights]."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: SerializeAsAny[Named] | None = None  # which tokens count, or how much; chosen by its name
    problems: SerializeAsAny[Named] | None = None  # how much a problem or answer counts; chosen by its name
    turns: SerializeAsAny[Named] | None = None  # how much a turn of an episode counts; chosen by its name
    importance: Importance | None = None  # truncated importance weights
    prefix: Prefix | None = None  # early tokens count more

    @property
    def chosen(self) -> tuple[Named, ...]:
        """Those that a name chooses."""
        return tuple(part for part in (self.tokens, self.problems, self.turns) if part is not None)

    @property
    def parts(self) -> tuple[Weighting, ...]:
        return (*self.chosen, *(part for part in (self.importance, self.prefix) if part is not None))

    @property
    def needs(self) -> Needs:
        return reduce(Needs.__or__, (part.needs for part in self.parts), Needs())

    @property
    def scores(self) -> dict[str, LossSpec]:
        return {name: score for part in self.parts for name, score in part.scores.items()}

    def pass_rates(self, groups: Sequence[Group], known: MutableMapping[str, float]) -> dict[str, float | None]:
        return self.problems.pass_rates(groups, known) if isinstance(self.problems, Paced) else {}

    def apply(self, plan: PlanInputs) -> PlanInputs:
        for part in self.parts:
            if part.known_N(plan).any():
                plan = part.apply(plan)
        return plan

    def faults(self, recipe: Any) -> Iterator[str]:
        for part in self.parts:
            yield from part.faults(recipe)
