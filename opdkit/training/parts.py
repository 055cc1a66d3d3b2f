"""What a run is made of."""

from __future__ import annotations

from datetime import datetime

from opdkit.engines.load import pick_device
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.side import student_reading
from opdkit.training.models.strategy import load_student_on, make_optimizer
from opdkit.training.models.viewers import load_state, make_viewers
from opdkit.training.saved import checkpoint
from opdkit.training.saved.saved_run import SavedRun


class Parts:
    """What a run is made of: the models, and what moves them."""

    def __init__(
        self, recipe: Recipe, saved: checkpoint.Saved | None, *, now: datetime | None = None, ranks: Ranks = ALONE
    ) -> None:
        """ranks: that keep what is trained together. now: the date for templates that print it; None: today's."""
        self.now, self._recipe = now, recipe
        self.student = load_student_on(ranks, recipe, resume_from=saved.model_path if saved else None)
        self.renderer = self.student.renderer(**student_reading(recipe, now))
        self.optimizer = make_optimizer(self.student, recipe, ranks)
        self.run = None if recipe.saved_run is None else SavedRun(recipe.saved_run, self.student)
        self.viewers = make_viewers(recipe, self.student, self.optimizer, now, self.run, ranks)
        if saved:
            rows_of = self.optimizer.rows_of
            self.optimizer.load_state(saved.tensors("optimizer", rows_of))
            load_state(self.viewers, saved.tensors("teacher", rows_of))

        # Of a prompt and its answer together: the student's positions, or what its engine is started with.
        rooms = (self.student.max_positions, recipe.sampling.vllm.max_model_len)
        self.room = min((room for room in rooms if room is not None), default=None)

    @property
    def teacher(self) -> Teacher | None:
        """Who reads the view "teacher"."""
        return self.viewers["teacher"].teacher if "teacher" in self.viewers else None

    def devices(self) -> list[str]:
        """Where the student and the other models are, the student's first."""
        named = [view.teacher.device for view in self._recipe.all_views.values() if view.teacher.device]
        return [str(self.student.device), *(str(pick_device(name)) for name in named)]

    def warnings(self) -> list[str]:
        """What loading the models found, of those that are loaded."""
        teachers = [sentence for viewer in self.viewers.values() for sentence in viewer.teacher.warnings]
        return [*self.student.warnings, *(sentence for sentence in teachers if sentence not in self.student.warnings)]

    def close(self) -> None:
        for viewer in self.viewers.values():
            viewer.teacher.close()
