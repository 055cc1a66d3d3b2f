"""The evaluations of a run: each one is made once and kept in eval/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console

from opdkit.contexts.render import Renderer
from opdkit.data.readers import Dataset
from opdkit.engines.base import Sampler
from opdkit.evaluation.evaluate import sample_answers
from opdkit.measure.accuracy import Accuracy
from opdkit.recipe import Recipe
from opdkit.run.console import Bar, Interrupt
from opdkit.run.folder import RunFolder
from opdkit.run.stored_answers import Store, StoredAnswer, measure, sentence, slug, write_run_answers
from opdkit.tasks.guard import GuardedTask


@dataclass(frozen=True, slots=True)
class Evaluations:
    recipe: Recipe
    folder: RunFolder
    sets: Mapping[str, Dataset]
    task: GuardedTask
    console: Console
    interrupt: Interrupt

    def measure(
        self, which: int | Literal["teacher"], label: str, sampler: Sampler, renderer: Renderer
    ) -> dict[str, Accuracy]:
        """Accuracy on every evaluation set; `which` is the student's step, or the teacher. Raises Interrupted.

        The answers are kept beside the numbers (eval/*.jsonl), so that two runs are compared problem by problem; until
        all are there, in files that a run which was stopped here goes on from.
        """
        path = self.folder.evaluation(which)
        if path.exists():  # a resumed run: the numbers would come out the same
            return self.folder.read_evaluation(path)
        section, sampling = self.recipe.eval, self.recipe.sampling
        results: dict[str, Accuracy] = {}
        stores: list[Store] = []
        answers: dict[str, list[StoredAnswer]] = {}
        for source, data in self.sets.items():
            with Bar(self.console, f"{label}: {source}", len(data.problems) * section.samples) as bar:

                def heard(done: int, total: int, bar: Bar = bar) -> None:
                    bar.update(done)
                    self.interrupt.check()

                begun = path.with_name(f"{path.stem}.{slug(source)}.begun")
                stores.append(Store(begun, self._asked()))
                answers[source] = sample_answers(
                    data.problems,
                    sampler=sampler,
                    renderer=renderer,
                    task=self.task.main,
                    params=section.params(sampling),
                    num_samples=section.samples,
                    seed=self.recipe.seed,
                    store=stores[-1],
                    progress=heard,
                )
            results[source], _ = measure(answers[source], task=self.task.main.name)
            self.console.print(f"{label}: {source}: {sentence(results[source])}", highlight=False, soft_wrap=True)
        if results:
            write_run_answers(path.with_suffix(".jsonl"), self._asked(), answers)
            self.folder.write_evaluation(path, results)  # with it, the evaluation is done
        for store in stores:
            store.path.unlink(missing_ok=True)
        return results

    def _asked(self) -> dict[str, Any]:
        """What the answers are answers to."""
        task, seed = self.task.main.options.text, self.recipe.seed
        sets = {source: {"fingerprint": data.fingerprint, "task": task} for source, data in self.sets.items()}
        return {**asdict(self.recipe.eval.params(self.recipe.sampling)), "seed": seed, "sets": sets}
