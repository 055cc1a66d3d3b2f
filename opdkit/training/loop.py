"""A whole run: load, evaluate, train, save, evaluate, report. Knows when; `step.py` knows what.

What can be refused is refused before a weight is loaded. Whatever happens afterwards (Ctrl-C, kill -9, a full disk)
leaves a run folder that `--resume` continues: to the same bits on a CPU, to within rounding on a GPU, whose kernels add
in no fixed order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from opdkit.data.readers import Dataset
from opdkit.engines.load import check_model_path, model_digest, pick_device
from opdkit.engines.memory import enough_memory
from opdkit.errors import Interrupted, Paused
from opdkit.evaluation.episodes import make_stage
from opdkit.hub import pinned
from opdkit.metrics import Metric, MetricsLog, reduce_metrics
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe, check_installed, warnings
from opdkit.recipe.rules.episode import check_environment
from opdkit.rollouts.stage import Stage
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.folder import RunFolder
from opdkit.run.rows import save_rows
from opdkit.run.sentinels import Verdict
from opdkit.run.sums import note_so_far
from opdkit.tasks.guard import make_task_for, unknown_rewards
from opdkit.training.answers import Answers
from opdkit.training.beside import beside_metrics, engine_beside, look_ahead
from opdkit.training.decisions import Decisions
from opdkit.training.evaluations import Evaluations
from opdkit.training.going_back import GoBack
from opdkit.training.measuring import Measuring
from opdkit.training.metrics.counters import count, lost_answers
from opdkit.training.models.sides import read_sides
from opdkit.training.parts import Parts
from opdkit.training.problems.data import (
    TrainProblems,
    by_task,
    check_evaluations,
    check_readable,
    evaluation_sets,
    training_data,
)
from opdkit.training.problems.pass_rates import measure_pass_rates
from opdkit.training.saved import checkpoint
from opdkit.training.saved.keeper import LESS_TO_KEEP, Keeper
from opdkit.training.saved.resume import commits_of, fingerprints, going_on
from opdkit.training.saved.summary import note_of, summary_of
from opdkit.training.stages import Stages
from opdkit.training.state import State
from opdkit.training.step import train_step
from opdkit.training.together import check_ranks, locked_by_first
from opdkit.training.views import spool_of
from opdkit.training.warned import Warned
from opdkit.types import Problem

OnStep = Callable[[int, Mapping[str, float | None]], object]


def train(
    recipe: Recipe,
    *,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    problems: Sequence[Problem] | Dataset | None = None,
    on_step: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run the recipe; returns the summary. `problems` stands in for `data.train` (generated ones). ranks: the processes
    that run it together, the first of which writes.

    on_step is told the steps taken and the last one's metrics, after each; what it raises ends the run, once the steps
    are saved. Raises UserError for input that cannot work, Interrupted after Ctrl-C once everything is saved.
    """
    check_installed(recipe)
    check_environment(recipe)
    recipe = recipe.on_device(pick_device(recipe.model.device).type)
    data = training_data(recipe, problems)
    check_readable(recipe, data)
    eval_sets = evaluation_sets(recipe)
    for _, path in recipe.model_paths.items():
        check_model_path(path)
    check_ranks(ranks, recipe, {**eval_sets, "training": data})
    # Everything that can fail comes before the folder is touched: --overwrite must not cost a run for a mistyped path.
    with locked_by_first(ranks, recipe.run_dir, resume=resume, overwrite=overwrite) as folder:
        saved, changed, said = ranks.from_first(lambda: going_on(folder, recipe) if resume else (None, {}, []))
        now = ranks.from_first(lambda: folder.clock(anew=overwrite))
        commits = ranks.from_first(lambda: commits_of(folder, recipe, is_resumed=resume))

        def attempt(saved: checkpoint.Saved | None, back: GoBack | None) -> dict[str, Any] | GoBack:
            """All that a try has loaded is gone when it is over."""
            sides = read_sides(recipe, student=saved.model_path if saved else None, now=now)
            parts = Parts(recipe, saved, now=now, ranks=ranks)
            with closing(TrainingRun(recipe, parts, data, eval_sets, console, sides.warnings, ranks)) as run:
                run.on_step, run.commits = on_step, commits
                if back is None:
                    for sentence in said:
                        run.warn(sentence)
                    ranks.from_first(lambda: folder.prepare(overwrite=overwrite))
                else:  # the page says so by metrics.jsonl, also of a run that was resumed since
                    say(console, back.sentence(saved.step if saved else 0), mark="warning")
                try:
                    with ranks.hearing():
                        return run.go(folder, saved, changed if back is None else None, back)
                except GoBack as wanted:
                    return wanted.with_traceback(None)

        with pinned(commits):
            done = attempt(saved, None)
            while isinstance(done, GoBack):
                back = done
                done = attempt(ranks.from_first(lambda back=back: back.saved(folder)), back)  # type: ignore[misc]
            return done


class TrainingRun:
    """One run while it lasts."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        data: Dataset,
        eval_sets: dict[str, Dataset],
        console: Console,
        doubts: Sequence[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        """doubts: what was found of the models before they were loaded (`sides.py`); told and kept."""
        recipe = recipe.on_device(parts.student.device.type)
        self.recipe, self.parts, self.console, self.ranks = recipe, parts, console, ranks
        self.on_step: OnStep | None = None
        self.commits: Mapping[str, str] = {}  # of models from a hub
        self.data, self.eval_sets = data, eval_sets
        self.interrupt = Interrupt(console)
        self.warn = Warned(console)
        self.decisions = Decisions(recipe, ranks)
        self.ended: str | None = None  # why no further step is taken, although some are left
        for sentence in [*warnings(recipe), *doubts]:
            self.warn(sentence)
        self.warn.of_models(parts)
        for sentence in parts.student.notes:
            say(console, sentence)
        self.problems = self.warn.fitting(recipe, data, parts)
        self.drawn = TrainProblems(recipe, data, self.problems)
        for evaluated in eval_sets.values():
            self.warn.of_rows(recipe, evaluated)
        check_evaluations(recipe, eval_sets, parts.renderer, parts.room)
        is_asked = recipe.method.answer_source != "dataset" and recipe.episode is None  # an environment may grade
        if is_asked and (unknown := unknown_rewards(recipe.data.grader, self.problems)):
            self.warn(f"{unknown}; {recipe.method.name} learns from them all the same")
        graded = [*by_task(self.problems), *(data.problems for data in eval_sets.values())]
        self.task = make_task_for(recipe.grader, graded)
        self.answers = Answers(
            recipe, parts.student, parts.renderer, parts.optimizer, parts.viewers, self.task, parts.run, ranks
        )
        self.answers.stage = self._stage()
        self.answers.ahead = look_ahead(recipe, self.answers, self.drawn.of_step)
        self.stages = Stages(recipe, console)
        self.state = State(
            student=parts.student,
            optimizer=parts.optimizer,
            viewers=parts.viewers,
            method=recipe.method,
            weights=recipe.weights,
            diagnostics=recipe.diagnostics,
            sample=self.answers,
            passes=recipe.train.passes(parts.student.device.type, learning=True),
            updates_per_step=recipe.train.updates_per_step,
            num_steps=recipe.train.steps,
            seed=recipe.seed,
            temperature=recipe.sampling.temperature,
            ranks=ranks,
            route=recipe.route,
            replays=parts.run is not None,
        )

    def _stage(self) -> Stage | None:
        """An engine beside this process, or a card, gives other last bits in any case: there nobody waits for all."""
        parts, asks_all = self.parts, self.recipe.sampling.engine == "hf" and self.parts.student.device.type == "cpu"
        if self.recipe.episode is None:
            return None
        return make_stage(
            self.recipe.episode,
            parts.renderer,
            parts.student.stop_ids,
            positions=parts.room,
            turn_tokens=self.recipe.longest_turn,
            go_ahead=not asks_all,
        )

    def close(self) -> None:
        if self.answers.ahead is not None:
            self.answers.ahead.close()
        if self.answers.stage is not None:
            self.answers.stage.pool.close()
        self.task.close()
        self.parts.close()

    def go(
        self,
        folder: RunFolder,
        saved: checkpoint.Saved | None,
        changed: Mapping[str, Any] | None = None,
        back: GoBack | None = None,
    ) -> dict[str, Any]:
        """Write the run to `folder`, from the checkpoint it goes on from, with the recipe's keys that were changed.

        back: why it goes on from there although it was further. Raises GoBack where it has to.
        """
        recipe, state = self.recipe, self.state
        self.keeper = Keeper(recipe, self.parts, state, folder, self.answers.ahead, self.ranks)
        if saved:
            self.keeper.restore(saved)
            done = " (all its steps are taken)" if saved.step >= recipe.train.steps else ""
            say(self.console, f"going on from {saved.path}{done}")
        if back:
            back.begin(state)
        for sentence in self.ranks.from_first(lambda: self._begin(folder, changed)):
            self.warn(sentence)
        self.folder = folder
        if recipe.spool is not None:
            state.spool = spool_of(state, folder.spool, recipe.spool)
        with ExitStack() as opened:
            log = opened.enter_context(closing(self._metrics_log(folder))) if self.ranks.is_first else None
            if log is not None:
                note_so_far(folder.metrics)
            asked = (self.eval_sets, self.task, self.console, self.interrupt, self.ranks, self.answers.stage)
            evaluations = Evaluations(recipe, folder, log, *asked)
            known = (evaluations, self.decisions, self.keeper, self.warn)
            self.measuring = Measuring(recipe, self.parts, state, self.answers, *known)
            self.decisions.go_on(folder, state.step)
            self.keeper.keep_best(self.decisions.best())
            if saved:
                self.keeper.remove_left_over()
            self.ended = self.decisions.has_stopped()
            opened.enter_context(self.interrupt.listening())
            try:
                with enough_memory("making the optimizer's state", "train a smaller model, or [model.lora]"):
                    self.parts.optimizer.reserve()
                beside = (recipe, self.parts, folder.path, self.console, self.interrupt, self.warn, self.ranks)
                if back:
                    self.keeper.save()
                with engine_beside(*beside) as self.answers.server:
                    results = self._train(log)
            except BaseException as stop:
                if isinstance(stop, Interrupted):
                    self.keeper.save_what_is_new()
                if self.ranks.size == 1 or isinstance(stop, Interrupted | GoBack):  # else the others may not be there
                    self.keeper.wait()
                raise
        for sentence in lost_answers(state.counters):
            self.warn(sentence)
        summary = summary_of(recipe, state, results, self.warn.said, self.ended)
        self.ranks.from_first(lambda: note_so_far(folder.metrics))
        self.ranks.from_first(lambda: folder.write_summary(summary))
        return summary

    def _begin(self, folder: RunFolder, changed: Mapping[str, Any] | None) -> list[str]:
        """Write what the run is; returns what is to be said of it."""
        folder.discard_after(self.state.step)
        folder.write_recipe(self.recipe.as_dict())
        models = {key: model_digest(Path(path)) for key, path in self.recipe.model_paths.items()}
        return folder.write_environment(
            fingerprints(self.recipe, self.data, self.eval_sets, models),
            task=self.task.describe(),
            clock=self.parts.now,
            models=models,
            commits=self.commits,
            changed=changed,
            devices=self.parts.devices(),
            ranks=self.ranks.size,
        )

    def _metrics_log(self, folder: RunFolder) -> MetricsLog:
        recipe = self.recipe
        return MetricsLog(
            folder.metrics,
            sinks=recipe.log.sinks,
            resume_at=self.state.step,
            attempt=self.state.attempt,
            run_name=recipe.name,
            project=recipe.log.project,
            config=recipe.as_dict(),
        )

    def _train(self, log: MetricsLog | None) -> dict[str, Any]:
        """Returns what summary.json says of evaluations."""
        recipe, state = self.recipe, self.state
        for sentence in self.answers.prove_episodes(self.problems, state.step):
            self.warn(sentence)
        before = self.measuring.before() if recipe.eval.before else {}
        teacher = self.measuring.teacher()
        if not state.step:  # later the checkpoint has them: of the student as it began
            kept_in, data = self.folder.path / "eval/pass_rates.jsonl", (self.problems, self.data.fingerprint)
            state.pass_rates |= measure_pass_rates(recipe, *data, self.answers, kept_in, self.console, self.interrupt)
        with Bar(self.console, recipe.name, recipe.train.steps, done=state.step) as bar:
            while True:
                due = recipe.eval.every and 0 < state.step < recipe.train.steps and state.step % recipe.eval.every == 0
                if due:  # at the top, so that a resumed run makes up an evaluation it was stopped in
                    self.measuring.student(state.step, f"student after {state.step} steps")
                if self.ended is None and 0 < state.step < recipe.train.steps:
                    self.ended = self.decisions.reached()
                if state.step >= recipe.train.steps or self.ended is not None:
                    self.keeper.save_what_is_new()
                    break
                self.answers.progress = bar.activity
                self._one_step(bar, log)
                self.interrupt.check(self.ranks)
        after = self.measuring.student(state.step, "student after")
        self.keeper.wait()
        for sentence in self.decisions.last_words():
            self.warn(sentence)
        evaluated = {"student_before": before, "student_after": after, "teacher": teacher}
        return {"eval": evaluated, **self.measuring.chosen()}

    def _one_step(self, bar: Bar, log: MetricsLog | None) -> None:
        train, state = self.recipe.train, self.state
        started = time.monotonic()
        chosen, drawn = self.drawn.of_step(state.step), self.drawn.metrics(state.step)
        scheduled = self.stages.enter(state, self.answers)
        self.task.drain()  # what evaluations counted is theirs
        with enough_memory("taking a step", LESS_TO_KEEP):
            rows, metrics = train_step(state, chosen)
        metrics += self.ranks.joined([*beside_metrics(self.answers), *self.answers.drain()])
        metrics += self.task.drain(self.ranks)  # nothing is graded beside the trainer any more
        seconds = time.monotonic() - started
        seen = reduce_metrics(metrics)
        count(state.counters, seen, seconds)
        speed = (seen["rollout/tokens"] or 0.0) / seconds
        metrics += [*drawn, *scheduled, Metric("time/step_s", seconds), Metric("time/tokens_per_s", speed)]
        now = reduce_metrics(metrics)
        verdict = self.decisions.after_step(state.step, now, self.answers.recipe, state.attempt)
        metrics += verdict.metrics()
        if log is not None:
            if train.save_rows_every and state.step % train.save_rows_every == 0:
                save_rows(self.folder.rows(state.step), rows)
            log.write(state.step, metrics)
        self._hear(seen, verdict)
        if state.step == train.steps or (train.save_every and state.step % train.save_every == 0):
            self.keeper.save()
        self.warn.of_crashes(self.task, self.answers.stage)
        self.warn.of_models(self.parts)
        bar.update(state.step, note=note_of(seen, speed))
        if self.on_step is not None:
            try:
                self.on_step(state.step, {**now, **reduce_metrics(verdict.metrics())})
            except BaseException:
                self.keeper.save_what_is_new()
                raise
        if verdict.action == "pause":
            raise Paused(f"step {state.step}: {verdict.why}")

    def _hear(self, seen: Mapping[str, float | None], verdict: Verdict) -> None:
        """What the step shows to be wrong; how often it happened is in the metrics, and on the page."""
        self.warn.of_step(self.state.step, seen, self.answers.recipe, verdict)
        if verdict.action == "stop":
            self.ended = verdict.why
            say(self.console, f"step {self.state.step}: {verdict.why}: the run ends here", mark="warning")
        if verdict.action == "rollback":
            raise GoBack.of(verdict, self.state, self.recipe.sentinels.lr_factor)
