"""What a step reads and changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opdkit.contexts import Context
from opdkit.engines.model import LanguageModel
from opdkit.methods.base import Method
from opdkit.methods.weighting import Weights
from opdkit.recipe import DiagnosticsSection
from opdkit.train.optimizer import Optimizer
from opdkit.train.teacher import Teacher
from opdkit.types import Group, Needs, Problem

Sample = Callable[[Sequence[Problem], int], list[Group]]  # (problems, step) -> graded groups


@dataclass(slots=True)
class State:
    """What a step reads and changes."""

    student: LanguageModel
    optimizer: Optimizer
    teacher: Teacher | None
    method: Method
    context: Context
    sample: Sample
    max_tokens_per_micro_batch: int
    updates_per_step: int
    num_steps: int
    seed: int
    temperature: float  # that answers are sampled at
    weights: Weights = field(default_factory=Weights)
    diagnostics: DiagnosticsSection | None = None
    step: int = 0  # steps taken
    # Since the run began, saved in checkpoints:
    counters: dict[str, float] = field(default_factory=dict)
    pass_rates: dict[str, float] = field(default_factory=dict)  # of problems whose first one is kept

    @property
    def needs(self) -> Needs:
        return self.method.needs | self.weights.needs
