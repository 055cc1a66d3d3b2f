"""The evaluations of a run: each one is made once, kept in eval/, and told to metrics.jsonl and the sinks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from opdkit.contexts.render import Renderer
from opdkit.data.files.names import metric_names, slug
from opdkit.data.readers import Dataset
from opdkit.engines.base import Sampler
from opdkit.errors import UserError
from opdkit.evaluation.evaluate import sample_answers
from opdkit.measure.accuracy import Accuracy
from opdkit.measure.held_out import KINDS, HeldOut, in_words
from opdkit.metrics import Metric, MetricsLog
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe
from opdkit.rollouts.stage import Stage
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.folder import RunFolder
from opdkit.run.stored_answers import Store, StoredAnswer, measure, question_of, sentence, write_run_answers
from opdkit.tasks.guard import GuardedTask
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.state import Viewer
from opdkit.types import Problem

# Who answers a set, for the length of the block; a model that teaches may be loaded for it.
Reader = Callable[[], AbstractContextManager[tuple[Sampler, Renderer]]]


Beside = Callable[[Sequence[Problem]], HeldOut]  # what else is measured on a set's problems
ENDS: tuple[tuple[str, Literal["value", "low", "high"]], ...] = (("", "value"), ("_low", "low"), ("_high", "high"))


@dataclass(frozen=True, slots=True)
class Evaluations:
    recipe: Recipe
    folder: RunFolder
    log: MetricsLog | None  # None: another rank writes
    sets: Mapping[str, Dataset]
    task: GuardedTask
    console: Console
    interrupt: Interrupt
    ranks: Ranks = ALONE
    stage: Stage | None = None  # where answers are episodes

    def measure(
        self, which: int | str, label: str, readers: Mapping[str, Reader], beside: Beside | None = None
    ) -> dict[str, Accuracy]:
        """Accuracy on every evaluation set that somebody of `readers` answers (by source); `which` is the student's
        step, the teacher, or another model's name. Raises Interrupted.

        The answers are kept beside the numbers (eval/*.jsonl), so that two runs are compared problem by problem; until
        all are there, in files that a run which was stopped here goes on from.
        """
        path = self.folder.evaluation(which)
        # By the run that is resumed: the numbers would come out the same.
        made = self.ranks.from_first(lambda: self.folder.read_evaluation(path) if path.exists() else None)
        results = self._measure(path, label, readers, beside) if made is None else made
        told = ("eval_teacher", 0) if which == "teacher" else ("eval", which) if isinstance(which, int) else None
        if results and self.log is not None and told is not None:
            area, step = told
            try:
                metrics = as_metrics(area, results)
            except (KeyError, TypeError, AttributeError, ValueError):
                raise UserError(f"{path} holds no evaluation; restore it from a copy, or delete it") from None
            self.log.write_evaluation(step, metrics)
        return results

    def _measure(
        self, path: Path, label: str, readers: Mapping[str, Reader], beside: Beside | None
    ) -> dict[str, Accuracy]:
        section, tasks, asked = self.recipe.eval, self.recipe.eval_tasks, self._asked(readers)
        results: dict[str, Accuracy] = {}
        stores: list[Store] = []
        answers: dict[str, list[StoredAnswer]] = {}
        for source, data in self.sets.items():
            if source not in readers:
                continue
            num_answers = len(data.problems) * section.samples
            with (
                readers[source]() as (sampler, renderer),
                Bar(self.console, f"{label}: {source}", num_answers) as bar,
            ):

                def heard(done: int, total: int, bar: Bar = bar) -> None:
                    bar.update(done)
                    self.interrupt.check()

                begun = path.with_name(f"{path.stem}.{slug(source)}.begun")
                stores += [Store(begun, asked)] if self.ranks.is_first else []
                answers[source] = sample_answers(
                    data.problems,
                    sampler=sampler,
                    renderer=renderer,
                    task=self.task.main,
                    params=section.params(self.recipe.longest_turn),
                    num_samples=section.samples,
                    seed=self.recipe.seed,
                    store=stores[-1] if stores else None,
                    progress=heard,
                    ranks=self.ranks,
                    stage=self.stage,
                )
            finals = self.stage is None or not self.stage.pool.grades
            results[source], _ = measure(answers[source], task=tasks[source].main.name, has_finals=finals)
            say(self.console, f"{label}: {source}: {sentence(results[source])}")
            if beside is not None:
                apart = results[source]["divergence"] = beside(data.problems)
                say(self.console, f"{label}: {source}: {in_words(apart)}")
        if results and self.ranks.is_first:
            write_run_answers(path.with_suffix(".jsonl"), asked, answers)
            self.folder.write_evaluation(path, results)  # with it, the evaluation is done
        for store in stores:
            store.path.unlink(missing_ok=True)
        return results

    def _asked(self, sources: Collection[str]) -> dict[str, Any]:
        """What the answers are answers to, of those sets."""
        tasks, seed = self.recipe.eval_tasks, self.recipe.seed
        sets = {
            source: {"fingerprint": data.fingerprint, "task": tasks[source].main.text}
            for source, data in self.sets.items()
            if source in sources
        }
        episode, sampled = self.recipe.episode, self.recipe.eval.params(self.recipe.longest_turn).identity
        played = None if episode is None else episode.model_dump(mode="json")
        return question_of({**sampled, "seed": seed, "sets": sets, "episode": played})


def teachers_of_sets(recipe: Recipe, viewers: Mapping[str, Viewer]) -> dict[str, Reader]:
    """By source: the teacher that is measured on it, of the set's domain where there is [route]."""
    found: dict[str, Reader] = {}
    for one in recipe.eval.sets if recipe.eval.teacher else ():
        name = recipe.route.views.get(one.domain or "", "") if recipe.route else "teacher"
        if name in recipe.answering and recipe.answering[name].teacher.kind == "model":
            found[one.path] = partial(_reading, viewers[name].teacher)
    return found


@contextmanager
def _reading(teacher: Teacher) -> Iterator[tuple[Sampler, Renderer]]:
    with teacher.active():
        yield teacher.engine(), teacher.renderer


def as_metrics(area: str, results: Mapping[str, Accuracy]) -> list[Metric]:
    """`area/<data set>/avg_at_n` and so on, each with its 95 % interval, `_low` and `_high`; pass@k of k = 1, 2, 4, ...
    and n. The data set is named as a file would be (`slug`); two of one name are told apart by a number."""
    found, names = [], metric_names(results)
    for source, accuracy in results.items():
        within = f"{area}/{names[source]}"
        passes = {int(k): estimate for k, estimate in accuracy["pass_at_k"].items()}
        estimates = {
            "avg_at_n": accuracy["avg_at_n"],
            **{f"pass_at_{k}": passes[k] for k in sorted(passes) if k & (k - 1) == 0 or k == max(passes)},
            "maj_at_n": accuracy["maj_at_n"],
            "format_rate": accuracy["format_rate"],
            "answer_tokens": accuracy["answer_tokens"],
        }
        for quantity, estimate in estimates.items():
            for end, key in ENDS:
                value = estimate[key]
                found.append(Metric(f"{within}/{quantity}{end}", None if value is None else float(value), "last"))
        for kind in KINDS if "divergence" in accuracy else ():
            estimate = accuracy["divergence"][kind]
            found += [Metric(f"{within}/{kind}{end}", estimate[key], "last") for end, key in ENDS]
        counts = ("problems", "samples", "num_truncated", "num_no_answer", "num_ungraded")
        found += [Metric(f"{within}/{key}", accuracy[key], "last") for key in counts]  # type: ignore[literal-required]
    return found
