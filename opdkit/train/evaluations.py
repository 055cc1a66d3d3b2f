"""The evaluations of a run: each one is made once and kept in eval/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from opdkit.contexts.render import Renderer
from opdkit.data.readers import Dataset
from opdkit.engines.base import Sampler
from opdkit.measure.accuracy import Accuracy
from opdkit.recipe import Recipe
from opdkit.tasks.base import Task
from opdkit.train.console import Bar, Interrupt
from opdkit.train.evaluate import evaluate, sentence
from opdkit.train.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Evaluations:
    recipe: Recipe
    folder: RunFolder
    sets: Mapping[str, Dataset]
    task: Task
    console: Console
    interrupt: Interrupt

    def measure(
        self, which: int | Literal["teacher"], label: str, sampler: Sampler, renderer: Renderer
    ) -> dict[str, Accuracy]:
        """Accuracy on every evaluation set; `which` is the student's step, or the teacher. Raises Interrupted."""
        path = self.folder.evaluation(which)
        if path.exists():  # a resumed run: the numbers would come out the same
            return dict(json.loads(path.read_text(encoding="utf-8")))
        section, sampling = self.recipe.eval, self.recipe.sampling
        results: dict[str, Accuracy] = {}
        for source, data in self.sets.items():
            with Bar(self.console, f"{label}: {source}", len(data.problems) * section.samples) as bar:

                def heard(done: int, total: int, bar: Bar = bar) -> None:
                    bar.update(done)
                    self.interrupt.check()

                results[source] = evaluate(
                    data.problems,
                    sampler=sampler,
                    renderer=renderer,
                    task=self.task,
                    params=section.params(sampling),
                    num_samples=section.samples,
                    seed=self.recipe.seed,
                    progress=heard,
                )
            self.console.print(f"{label}: {source}: {sentence(results[source])}", highlight=False, soft_wrap=True)
        if results:
            self.folder.write_evaluation(path, results)
        return results
