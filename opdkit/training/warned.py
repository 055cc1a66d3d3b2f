"""What a run warns of: said when it is seen, and kept for summary.json and the page."""

from __future__ import annotations

from collections.abc import Mapping

from opdkit.data.readers import Dataset
from opdkit.recipe import Recipe
from opdkit.rollouts.stage import Stage
from opdkit.run.alarms import alarms
from opdkit.run.console import Console, say
from opdkit.run.sentinels import Verdict
from opdkit.tasks.guard import GuardedTask
from opdkit.training.parts import Parts
from opdkit.training.problems.data import fitting, row_doubts
from opdkit.types import Problem


class Warned:
    """The warnings of a run so far, in `said`. Called with a sentence it says one more."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.said: list[str] = []
        self._alarmed: set[str] = set()

    def __call__(self, sentence: str) -> None:
        self.said.append(sentence)
        say(self._console, sentence, mark="warning")

    def fitting(self, recipe: Recipe, data: Dataset, parts: Parts) -> list[Problem]:
        """The problems whose prompt leaves room for an answer; the others are counted and named."""
        found = fitting(recipe, data, parts.renderer, parts.room)
        if found.long:
            self(
                f"{len(found.long)} of {len(data.problems)} problems are left out: their prompts are longer than "
                f"{found.limit} tokens (first: {found.long[0].problem_id}, {found.long[0].num_tokens})"
            )
        sets = data.parts.values() or (data,)
        for part in sets:
            self.of_rows(recipe, part)
        if again := data.num_duplicate_ids - sum(part.num_duplicate_ids for part in sets):
            self(f"{again} ids are in two sets of data.train; the later ones are kept under ids of their own")
        return found.problems

    def of_rows(self, recipe: Recipe, data: Dataset) -> None:
        for sentence in row_doubts(recipe, data):
            self(sentence)

    def of_models(self, parts: Parts) -> None:
        """What loading them found; a routed teacher is loaded when its first row comes."""
        for sentence in parts.warnings():
            if sentence not in self.said:
                self(sentence)

    def of_crashes(self, task: GuardedTask, stage: Stage | None) -> None:
        for sentence in [*task.new_crashes(), *([] if stage is None else stage.new_failures())]:
            self(sentence)

    def of_step(self, step: int, seen: Mapping[str, float | None], recipe: Recipe, verdict: Verdict) -> None:
        """What its metrics show to be wrong, each kind once a run."""
        new = [(one.name, one.named) for one in verdict.new if one not in verdict.because]
        for kind, sentence in [*alarms(seen, recipe), *new]:
            if kind not in self._alarmed:
                self._alarmed.add(kind)
                self(f"step {step}: {sentence}")
