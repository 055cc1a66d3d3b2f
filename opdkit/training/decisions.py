"""What a run decides by its own numbers, after a step or an evaluation: the first rank has them and decides for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opdkit.metric_lines import read_metrics
from opdkit.metrics import Metric, reduce_metrics
from opdkit.ranks.base import Ranks
from opdkit.recipe import Recipe
from opdkit.run.folder import RunFolder
from opdkit.run.history import History
from opdkit.run.sentinels import Verdict, find, judge

Seen = Mapping[str, float | None]


@dataclass(slots=True)
class Decisions:
    recipe: Recipe
    ranks: Ranks
    _history: History = field(default_factory=History)  # of the first rank

    def go_on(self, folder: RunFolder, step: int) -> None:
        """Behind what the run in `folder` has measured up to that step."""
        if self.ranks.is_first and folder.metrics.exists():
            self._history = History.of(read_metrics(folder.metrics), step)

    def after_step(self, step: int, seen: Seen, recipe: Recipe, attempt: int) -> Verdict:
        """recipe: of this step. attempt: the try that it belongs to."""

        def decide() -> Verdict:
            line = {"step": step, **seen}
            self._history.add(line)
            verdict = judge(self._history, recipe, num_rollbacks=attempt - 1)
            line |= reduce_metrics(verdict.metrics())
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

    def last_words(self) -> list[str]:
        """What the last evaluation shows, behind which no step comes."""
        return self.ranks.from_first(
            lambda: [f.named for f in find(self._history, self.recipe) if f.name == "pass_at_k"]
        )
