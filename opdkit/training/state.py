"""What a step reads and changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opdkit.contexts import Context
from opdkit.engines.forward.passes import Passes
from opdkit.engines.model import LanguageModel
from opdkit.methods.base import Method
from opdkit.methods.weighting import Weights
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import DiagnosticsSection
from opdkit.recipe.data import RouteSection
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.saved.spool import Spool
from opdkit.types import Asked, Example, Group, Needs, Problem, reading_names

Sample = Callable[[Sequence[Problem], int], list[Group]]  # (problems, step) -> graded groups


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who reads a view, and what: up to `count` readings of each answer, with other evidence in each."""

    teacher: Teacher
    context: Context
    count: int = 1


@dataclass(slots=True)
class State:
    """What a step reads and changes."""

    student: LanguageModel
    optimizer: Optimizer
    viewers: Mapping[str, Viewer]  # by the recipe's views; none where the method asks nobody
    method: Method
    sample: Sample
    passes: Passes  # of rows that are learned from
    updates_per_step: int
    num_steps: int
    seed: int
    temperature: float  # that answers are sampled at
    weights: Weights = field(default_factory=Weights)
    diagnostics: DiagnosticsSection | None = None
    ranks: Ranks = ALONE  # the processes of the run
    replays: bool = False  # answers are an earlier run's, which another student gave
    spool: Spool | None = None  # where what the views say is kept; None: nowhere
    route: RouteSection | None = None  # who reads the view "teacher", problem by problem
    step: int = 0  # steps taken
    attempt: int = 1  # the try at the steps to come: more in a run that went back to a checkpoint
    # Since the run began, saved in checkpoints:
    counters: dict[str, float] = field(default_factory=dict)
    pass_rates: dict[str, float] = field(default_factory=dict)  # of problems whose first one is kept

    @property
    def needs(self) -> Needs:
        return self.method.needs | self.weights.needs

    @property
    def asked(self) -> dict[str, Asked]:
        """What each reading of a view is asked."""
        return {reading: asked for view, asked in self.needs.views.items() for reading in self.readings(view)}

    def readings(self, view: str) -> list[str]:
        return reading_names(view, self.viewers[self.readers(view)[0]].count)

    def readers(self, view: str) -> tuple[str, ...]:
        """The viewers that may read a view: itself, or those of a route."""
        return self.route.readers if self.route is not None and view == "teacher" else (view,)

    def reader(self, view: str, problem: Problem) -> str:
        """The viewer that reads the answers to a problem."""
        return self.route.view_of(problem) if self.route is not None and view == "teacher" else view

    @property
    def teachers(self) -> list[Teacher]:
        """Every reader once."""
        return list(dict.fromkeys(viewer.teacher for viewer in self.viewers.values()))

    @property
    def models(self) -> list[LanguageModel]:
        """Those that are loaded, once."""
        loaded = [self.student, *(teacher.loaded_model for teacher in self.teachers)]
        return [model for model in dict.fromkeys(loaded) if model is not None]

    def teacher_of(self, row: Example) -> Teacher:
        """Who read the view "teacher" of a row."""
        return self.viewers[self.reader("teacher", row.problem)].teacher
