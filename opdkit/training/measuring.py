"""What a run measures of its models, and what it keeps for it: the student, its teacher, the mean of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from opdkit.measure.accuracy import Accuracy
from opdkit.measure.held_out import HeldOut
from opdkit.recipe import Recipe
from opdkit.run.console import say
from opdkit.training.answers import Answers
from opdkit.training.decisions import Decisions
from opdkit.training.evaluations import Evaluations, Reader, as_metrics, teachers_of_sets
from opdkit.training.held_out import held_out
from opdkit.training.parts import Parts
from opdkit.training.saved.average import average, weights_of
from opdkit.training.saved.keeper import Keeper
from opdkit.training.saved.summary import best_of
from opdkit.training.state import State
from opdkit.types import Problem


@dataclass(frozen=True, slots=True)
class Measuring:
    recipe: Recipe
    parts: Parts
    state: State
    answers: Answers
    evaluations: Evaluations
    decisions: Decisions
    keeper: Keeper
    warn: Callable[[str], None]

    def before(self) -> dict[str, Accuracy]:
        """The student as it began."""
        evaluations = self.evaluations
        began = evaluations.ranks.from_first(lambda: evaluations.folder.evaluation(0).exists())
        if evaluations.sets and self.state.step and not began:
            self.warn("the student was not evaluated before its first step, and no longer can be")
            return {}
        return self.student(0, "student before")

    def student(self, step: int, label: str) -> dict[str, Accuracy]:
        if not self.evaluations.sets:
            return {}
        try:
            reading = nullcontext((self.answers.student_engine(self.state.step), self.parts.renderer))
            readers: dict[str, Reader] = dict.fromkeys(self.evaluations.sets, lambda: reading)
            found = self.evaluations.measure(step, label, readers, self._apart if self.recipe.eval.divergence else None)
        finally:
            for sentence in self.evaluations.task.new_crashes():
                self.warn(sentence)
        self.decisions.after_evaluation(step, as_metrics("eval", found))
        self.keeper.keep_best(self.decisions.best())
        return found

    def _apart(self, problems: Sequence[Problem]) -> HeldOut:
        return held_out(self.state, self.answers, problems, most=self.recipe.eval.divergence)

    def teacher(self) -> dict[str, Accuracy] | None:
        """Another model is worth measuring; a self-teacher without its context is the student."""
        readers = teachers_of_sets(self.recipe, self.parts.viewers)
        return self.evaluations.measure("teacher", "teacher", readers) if readers else None

    def chosen(self) -> dict[str, Any]:
        """The best step and the mean of the last checkpoints, for summary.json."""
        evaluations = self.evaluations
        best = evaluations.ranks.from_first(lambda: best_of(self.recipe, evaluations.folder, self.decisions.best()))
        if best:
            told = "step {step} by {chosen_on}, {value:.3g}: {model}".format(**best["best"])
            say(evaluations.console, f"best: {told}")
        return {**best, **self._averaged()}

    def _averaged(self) -> dict[str, Any]:
        folder, num = self.keeper.folder, self.recipe.train.average_last
        if num is None:
            return {}
        model, steps = self.evaluations.ranks.from_first(lambda: average(folder.checkpoints, num))
        weights, found = weights_of(model), None
        if self.answers.can_read(weights):
            reading = nullcontext((self.answers.engine_of(weights), self.parts.renderer))
            readers: dict[str, Reader] = dict.fromkeys(self.evaluations.sets, lambda: reading)
            label = f"mean of the checkpoints of steps {', '.join(map(str, steps))}"
            found = self.evaluations.measure(f"average_{self.state.step:06d}", label, readers)
        else:
            self.warn(f"the mean of the last checkpoints is not evaluated here: opdkit evaluate --model {model}")
        return {"average": {"steps": steps, "model": str(model.relative_to(folder.path)), "eval": found}}
