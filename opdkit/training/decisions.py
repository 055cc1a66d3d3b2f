"""What a run decides by its own numbers, after a step or an evaluation: the first rank has them and decides for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opdkit.metric_lines import read_metrics
from opdkit.metrics import Metric, reduce_metrics
from opdkit.ranks.base import Ranks
from opdkit.recipe import Recipe
from opdkit.recipe.stop_when import condition, is_more_better
from opdkit.run.folder import RunFolder
from opdkit.run.history import History, Point
from opdkit.run.sentinels import WATCHED, Verdict, find, judge

Seen = Mapping[str, float | None]


@dataclass(slots=True)
class Decisions:
    recipe: Recipe
    ranks: Ranks
    _history: History = field(default_factory=History)  # of the first rank

    def go_on(self, folder: RunFolder, step: int) -> None:
        """Behind what the run in `folder` has measured up to that step."""
        names = WATCHED | {condition(text).name for text in self.recipe.train.stop_when}
        lines = read_metrics(folder.metrics) if self.ranks.is_first and folder.metrics.exists() else []
        self._history = History.of(lines, step, names)

    def after_step(self, step: int, seen: Seen, recipe: Recipe, attempt: int) -> Verdict:
        """recipe: of this step. attempt: the try that it belongs to."""

        def decide() -> Verdict:
            self._history.add({"step": step, "attempt": attempt, **seen})
            verdict = judge(self._history, recipe, num_rollbacks=attempt - 1)
            self._history.steps[-1] |= reduce_metrics(verdict.metrics())
            return verdict

        return self.ranks.from_first(decide)

    def after_evaluation(self, step: int, metrics: list[Metric]) -> None:
        known = {line["step"] for line in self._history.evaluations}
        if self.ranks.is_first and step not in known:
            self._history.add({"step": step, **reduce_metrics(metrics)})

    def has_stopped(self) -> str | None:
        """Why a run that is resumed goes no further: its last step ended it."""

        def decide() -> str | None:
            if not self._history.steps:
                return None
            verdict = judge(self._history, self.recipe, num_rollbacks=self._history.num_rollbacks)
            return verdict.why if verdict.action == "stop" else None

        return self.ranks.from_first(decide)

    def reached(self) -> str | None:
        """The condition of `train.stop_when` that holds now."""
        found = [condition(text) for text in self.recipe.train.stop_when]

        def decide() -> str | None:
            for one in found:
                values = self._history.newest(one.name, one.times if one.sign else len(self._history.evaluations))
                if one.holds(values):
                    return f"train.stop_when: {one.text}"
            return None

        return self.ranks.from_first(decide) if found else None

    def best(self) -> Point | None:
        """The evaluation that `train.keep_best` chooses so far: the first of equally good ones."""
        name = self.recipe.train.keep_best

        def decide() -> Point | None:
            points = self._history.points(name or "")
            sign = 1 if is_more_better(name or "") else -1
            return max(points, key=lambda point: sign * point.value, default=None)

        return None if name is None else self.ranks.from_first(decide)

    def last_words(self) -> list[str]:
        """What the last evaluation shows, behind which no step comes, and what no line of the run has."""

        def decide() -> list[str]:
            names = [condition(text).name for text in self.recipe.train.stop_when]
            absent = [name for name in names if not self._history.newest(name, 1)]
            said = [f.named for f in find(self._history, self.recipe) if f.name == "pass_at_k"]
            return said + [f"train.stop_when names {name}, of which the run had no value" for name in absent]

        return self.ranks.from_first(decide)
