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
from opdkit.run.stored_answers import StoredAnswer, measure, sentence, write_run_answers
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

        The answers are kept beside the numbers (eval/*.jsonl), so that two runs are compared problem by problem.
        """
        path = self.folder.evaluation(which)
        if path.exists():  # a resumed run: the numbers would come out the same
            return self.folder.read_evaluation(path)
        section = self.recipe.eval
        results: dict[str, Accuracy] = {}
        answers: dict[str, list[StoredAnswer]] = {}
        for source, data in self.sets.items():
            with Bar(self.console, f"{label}: {source}", len(data.problems) * section.samples) as bar:

                def heard(done: int, total: int, bar: Bar = bar) -> None:
                    bar.update(done)
                    self.interrupt.check()

                answers[source] = sample_answers(
                    data.problems,
                    sampler=sampler,
                    renderer=renderer,
                    task=self.task.main,
                    params=section.params(self.recipe.longest_answer),
                    num_samples=section.samples,
                    seed=self.recipe.seed,
                    progress=heard,
                )
            results[source], _ = measure(answers[source], task=self.recipe.data.task.main.name)
            self.console.print(f"{label}: {source}: {sentence(results[source])}", highlight=False, soft_wrap=True)
        if results:
            write_run_answers(path.with_suffix(".jsonl"), self._asked(), answers)
            self.folder.write_evaluation(path, results)  # last: with it, the evaluation is done
        return results

    def _asked(self) -> dict[str, Any]:
        """What the answers are answers to."""
        task, seed = self.recipe.data.task.main.text, self.recipe.seed
        sets = {source: {"fingerprint": data.fingerprint, "task": task} for source, data in self.sets.items()}
        return {**asdict(self.recipe.eval.params(self.recipe.longest_answer)), "seed": seed, "sets": sets}
