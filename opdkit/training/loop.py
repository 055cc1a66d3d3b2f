"""A whole run: load, evaluate, train, save, evaluate, report. Knows when; `step.py` knows what.

What can be refused is refused before a weight is loaded. Whatever happens afterwards (Ctrl-C, kill -9, a full disk)
leaves a run folder that `--resume` continues: to the same bits on a CPU, to within rounding on a GPU, whose kernels add
in no fixed order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from opdkit.contexts.render import long_prompts
from opdkit.data.readers import Dataset, fingerprint, load_problems
from opdkit.engines.load import check_model_path, model_digest
from opdkit.engines.memory import enough_memory
from opdkit.errors import Interrupted, UserError
from opdkit.measure.accuracy import Accuracy
from opdkit.metrics import Metric, MetricsLog, reduce_metrics
from opdkit.recipe import Recipe, check_sinks, needs_rewards, warnings
from opdkit.run.alarms import alarms
from opdkit.run.console import Bar, Interrupt
from opdkit.run.folder import RunFolder
from opdkit.run.rows import save_rows
from opdkit.tasks.guard import make_task_for, unknown_rewards
from opdkit.training import checkpoint
from opdkit.training.answers import Answers
from opdkit.training.evaluations import Evaluations
from opdkit.training.metrics.counters import count, lost_answers
from opdkit.training.models.sides import read_sides
from opdkit.training.models.viewers import state_of
from opdkit.training.order import problems_of_step
from opdkit.training.parts import Parts
from opdkit.training.pass_rates import measure_pass_rates
from opdkit.training.resume import going_on
from opdkit.training.stages import Stages
from opdkit.training.state import State
from opdkit.training.step import train_step
from opdkit.types import Problem


def train(
    recipe: Recipe,
    *,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    problems: Sequence[Problem] | None = None,
) -> dict[str, Any]:
    """Run the recipe; returns the summary. `problems` stands in for `data.train` (worlds made on the fly).

    Raises UserError for input that cannot work, Interrupted after Ctrl-C once everything is saved.
    """
    check_sinks(recipe)
    data = _load_data(recipe, problems)
    eval_sets = {
        source: load_problems(
            source,
            task=recipe.data.task.main.name,
            limit=recipe.eval.limit,
            instruction=recipe.data.instruction,
            require_gold=recipe.data.task.needs_gold_or_tests,
        )
        for source in recipe.eval.sources
    }
    for _, path in recipe.model_paths.items():
        check_model_path(path)
    # Everything that can fail comes before the folder is touched: --overwrite must not cost a run for a mistyped path.
    with RunFolder.locked(recipe.run_dir, resume=resume, overwrite=overwrite) as folder:
        saved, changed, said = going_on(folder, recipe) if resume else (None, {}, [])
        now = folder.clock(anew=overwrite)
        sides = read_sides(recipe, student=saved.model_path if saved else None, now=now)
        parts = Parts(recipe, saved, now=now)
        with closing(Run(recipe, parts, data, eval_sets, console, doubts=sides.warnings)) as run:
            for sentence in said:
                run.warn(sentence)
            folder.prepare(overwrite=overwrite)
            return run.go(folder, saved, changed)


class Run:
    """One run while it lasts."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        data: Dataset,
        eval_sets: dict[str, Dataset],
        console: Console,
        doubts: Sequence[str] = (),
    ) -> None:
        """doubts: what was found of the models before they were loaded (`sides.py`); told and kept."""
        self.recipe, self.parts, self.console = recipe, parts, console
        self.data, self.eval_sets = data, eval_sets
        self.interrupt = Interrupt(console)
        self.warnings: list[str] = []
        self.alarmed: set[str] = set()
        for sentence in [*warnings(recipe), *doubts, *parts.warnings()]:
            self.warn(sentence)
        for sentence in parts.student.notes:
            console.print(escape(sentence), highlight=False, soft_wrap=True)
        self.problems = self._fitting(data)
        problems_of_step(self.problems, step=0, per_step=recipe.train.problems_per_step, seed=recipe.seed)
        self._check_evaluations()
        if recipe.method.answer_source != "dataset" and (unknown := unknown_rewards(recipe.data.task, self.problems)):
            self.warn(f"{unknown}; {recipe.method.name} learns from them all the same")
        self.task = make_task_for(recipe.data.task, [self.problems, *(data.problems for data in eval_sets.values())])
        self.answers = Answers(recipe, parts.student, parts.renderer, parts.optimizer, parts.teacher, self.task)
        self.stages = Stages(recipe, console)
        self.state = State(
            student=parts.student,
            optimizer=parts.optimizer,
            viewers=parts.viewers,
            method=recipe.method,
            weights=recipe.weights,
            diagnostics=recipe.diagnostics,
            sample=self.answers,
            max_tokens_per_micro_batch=recipe.train.max_tokens_per_micro_batch,
            updates_per_step=recipe.train.updates_per_step,
            num_steps=recipe.train.steps,
            seed=recipe.seed,
            temperature=recipe.sampling.temperature,
        )

    def close(self) -> None:
        self.task.close()

    def go(
        self, folder: RunFolder, saved: checkpoint.Saved | None, changed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the run to `folder`, from the checkpoint it goes on from, with the recipe's keys that were changed."""
        recipe, state = self.recipe, self.state
        if saved:
            self._restore(saved)
        folder.discard_after(state.step)
        folder.write_recipe(recipe.as_dict())
        models = {key: model_digest(Path(path)) for key, path in recipe.model_paths.items()}
        for sentence in folder.write_environment(
            self._fingerprints(models),
            task=self.task.describe(),
            clock=self.parts.now,
            models=models,
            changed=changed,
        ):
            self.warn(sentence)
        self.folder, self.saved_step = folder, state.step
        self.evaluations = Evaluations(recipe, folder, self.eval_sets, self.task, self.console, self.interrupt)
        log = MetricsLog(
            folder.metrics,
            sinks=recipe.log.sinks,
            resume_at=state.step,
            run_name=recipe.name,
            config=recipe.as_dict(),
        )
        with closing(log), self.interrupt.listening():
            try:
                with enough_memory("making the optimizer's state", "train a smaller model, or [model.lora]"):
                    self.parts.optimizer.reserve()
                before, after, teacher = self._train(log)
            except Interrupted:
                if state.step > self.saved_step:
                    self._save()
                raise
        for sentence in lost_answers(state.counters):
            self.warn(sentence)
        summary = self._summary(before, after, teacher)
        folder.write_summary(summary)
        return summary

    def _train(self, log: MetricsLog) -> tuple[dict[str, Accuracy], dict[str, Accuracy], dict[str, Accuracy] | None]:
        recipe, state = self.recipe, self.state
        before = self._evaluate_before() if recipe.eval.before else {}
        teacher = self._evaluate_teacher()
        if not state.step:  # later the checkpoint has them: of the student as it began
            kept_in, data = self.folder.path / "eval/pass_rates.jsonl", (self.problems, self.data.fingerprint)
            state.pass_rates |= measure_pass_rates(recipe, *data, self.answers, kept_in, self.console, self.interrupt)
        with Bar(self.console, recipe.name, recipe.train.steps, done=state.step) as bar:
            while True:
                due = recipe.eval.every and 0 < state.step < recipe.train.steps and state.step % recipe.eval.every == 0
                if due:  # at the top, so that a resumed run makes up an evaluation it was stopped in
                    self._evaluate_student(state.step, f"student after {state.step} steps")
                if state.step >= recipe.train.steps:
                    break
                self.answers.progress = bar.activity
                self._one_step(bar, log)
                self.interrupt.check()
        return before, self._evaluate_student(state.step, "student after"), teacher

    def _one_step(self, bar: Bar, log: MetricsLog) -> None:
        train, state = self.recipe.train, self.state
        started = time.monotonic()
        chosen = problems_of_step(
            self.problems, step=state.step, per_step=train.problems_per_step, seed=self.recipe.seed
        )
        scheduled = self.stages.enter(state, self.answers)
        self.task.drain()  # what evaluations counted is theirs
        rows, metrics = train_step(state, chosen)
        metrics += self.task.drain()
        seconds = time.monotonic() - started
        seen = reduce_metrics(metrics)
        count(state.counters, seen, seconds)
        speed = (seen["rollout/tokens"] or 0.0) / seconds
        metrics += [*scheduled, Metric("time/step_s", seconds), Metric("time/tokens_per_s", speed)]
        if train.save_rows_every and state.step % train.save_rows_every == 0:
            save_rows(self.folder.rows(state.step), rows)
        log.write(state.step, metrics)
        if state.step == train.steps or (train.save_every and state.step % train.save_every == 0):
            self._save()
        self._warn_of_crashes()
        self._raise_alarms(seen)
        bar.update(state.step, note=_note(seen, speed))

    def _save(self) -> None:
        parts, state = self.parts, self.state
        checkpoint.save(
            self.folder.checkpoints,
            step=state.step,
            model=parts.student,
            optimizer=parts.optimizer.state(),
            teacher=state_of(parts.viewers),
            counters=state.counters,
            pass_rates=state.pass_rates,
            keep=self.recipe.train.keep_checkpoints,
        )
        self.saved_step = state.step

    def _restore(self, saved: checkpoint.Saved) -> None:
        self.state.step = saved.step
        self.state.counters.update(saved.counters)
        self.state.pass_rates.update(saved.pass_rates)
        done = " (all its steps are taken)" if saved.step >= self.recipe.train.steps else ""
        self.console.print(f"going on from {saved.path}{done}", highlight=False, soft_wrap=True)

    def _evaluate_before(self) -> dict[str, Accuracy]:
        if self.state.step and not self.folder.evaluation(0).exists():
            self.warn("the student was not evaluated before its first step, and no longer can be")
            return {}
        return self._evaluate_student(0, "student before")

    def _evaluate_student(self, step: int, label: str) -> dict[str, Accuracy]:
        try:
            return self.evaluations.measure(step, label, self.answers.student_engine(), self.parts.renderer)
        finally:
            self._warn_of_crashes()

    def _evaluate_teacher(self) -> dict[str, Accuracy] | None:
        """Another model is worth measuring; a self-teacher without its context is the student."""
        teacher = self.parts.teacher
        if teacher is None or self.recipe.teacher.kind != "model" or not self.recipe.eval.teacher:
            return None
        return self.evaluations.measure("teacher", "teacher", teacher.engine(), teacher.renderer)

    def _fingerprints(self, models: Mapping[str, str | None]) -> dict[str, str]:
        """What a resumed run must find as it was: data as loaded, and weights that checkpoints do not hold."""
        prints = {source: d.fingerprint for source, d in {self.recipe.data.train: self.data, **self.eval_sets}.items()}
        prints |= {f"task {name}": digest for name, digest in self.recipe.data.task.user_files.items()}
        own = None if self.recipe.model.lora else "model.path"  # checkpoints hold it
        prints |= {
            path: digest for key, path in self.recipe.model_paths.items() if (digest := models[key]) and key != own
        }
        return prints

    def _check_evaluations(self) -> None:
        """Raises UserError for an evaluation that would only fail after training."""
        room, render = self.parts.student.max_positions, self.parts.renderer.prompt_ids_within
        longest = self.recipe.eval.max_answer_tokens or self.recipe.sampling.max_answer_tokens
        for source, data in self.eval_sets.items():
            self._warn_of_rows(data)
            if room is None:
                continue
            most = room - longest
            long = long_prompts(((p.id, render(p.messages, most)) for p in data.problems), most)
            if long:
                raise UserError(
                    f"eval.data = {source}: {len(long)} prompts leave no room for {longest} answer tokens in the "
                    f"model's {room} positions (first: {long[0].problem_id}, {long[0].num_tokens} tokens); lower "
                    "eval.max_answer_tokens, or evaluate on other data"
                )

    def _fitting(self, data: Dataset) -> list[Problem]:
        """The problems whose prompt leaves room for an answer; the others are counted and named."""
        recipe, room = self.recipe, self.parts.student.max_positions
        limit = recipe.data.max_prompt_tokens
        if room is not None:
            limit = min(limit, room - recipe.sampling.max_answer_tokens)
        if limit < 1:
            raise UserError(
                f"sampling.max_answer_tokens = {recipe.sampling.max_answer_tokens} leaves no room for a prompt: "
                f"{recipe.model.path} has {room} positions; lower it"
            )
        render = self.parts.renderer.prompt_ids_within
        long = long_prompts(((p.id, render(p.messages, limit)) for p in data.problems), limit)
        if len(long) == len(data.problems):
            raise UserError(
                f"data.train = {data.source}: every prompt is longer than {limit} tokens "
                f"(the first: {long[0].num_tokens}); raise data.max_prompt_tokens, lower sampling.max_answer_tokens, "
                "or use a model with more positions"
            )
        if long:
            self.warn(
                f"{len(long)} of {len(data.problems)} problems are left out: their prompts are longer than {limit} "
                f"tokens (first: {long[0].problem_id}, {long[0].num_tokens})"
            )
        self._warn_of_rows(data)
        if recipe.context.needs_solutions and not any(p.solution for p in data.problems):
            raise UserError(
                f'context.kind = "{recipe.context.kind}" shows the teacher reference solutions, but no problem of '
                f"{data.source} has one; use data with a solution column, or another context"
            )
        left_out = {prompt.problem_id for prompt in long}
        return [p for p in data.problems if p.id not in left_out]

    def _warn_of_crashes(self) -> None:
        for sentence in self.task.new_crashes():
            self.warn(sentence)

    def _raise_alarms(self, seen: Mapping[str, float | None]) -> None:
        """Each kind once; how often it happened is in the metrics, and on the page."""
        for kind, sentence in alarms(seen, self.answers.recipe):
            if kind not in self.alarmed:
                self.alarmed.add(kind)
                self.warn(f"step {self.state.step}: {sentence}")

    def _warn_of_rows(self, data: Dataset) -> None:
        for sentence in data.files_left_out:
            self.warn(sentence)
        if data.dropped:
            where, why = data.dropped[0]
            self.warn(f"{len(data.dropped)} rows of {data.source} cannot be used (first: {where}: {why})")
        own = sum(any(turn["role"] == "system" for turn in problem.messages) for problem in data.problems)
        if self.recipe.model.system and own:
            self.warn(f"{own} problems of {data.source} have a system turn, which model.system takes the place of")
        if data.num_duplicate_ids:
            self.warn(
                f"{data.num_duplicate_ids} rows of {data.source} repeat an id; they are kept under ids of their own"
            )

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        self.console.print(f"[yellow]warning[/yellow] {escape(sentence)}", highlight=False, soft_wrap=True)

    def _summary(
        self, before: dict[str, Accuracy], after: dict[str, Accuracy], teacher: dict[str, Accuracy] | None
    ) -> dict[str, Any]:
        counters = dict(self.state.counters)
        return {
            "name": self.recipe.name,
            "method": self.recipe.method.name,
            "steps": self.state.step,
            "seconds": round(counters.pop("seconds", 0.0), 3),
            "tokens": {"answer": counters.pop("answer_tokens", 0.0), "teacher": counters.pop("teacher_tokens", 0.0)},
            "counts": counters,
            "eval": {"student_before": before, "student_after": after, "teacher": teacher},
            "model": f"checkpoints/step_{self.state.step:06d}/model",
            "warnings": self.warnings,
        }


def _load_data(recipe: Recipe, problems: Sequence[Problem] | None) -> Dataset:
    section = recipe.data
    if problems is not None:
        return Dataset(
            problems=list(problems),
            fingerprint=fingerprint(problems),
            dropped=[],
            num_duplicate_ids=0,
            source=section.train,
        )
    return load_problems(
        section.train,
        task=section.task.main.name,
        limit=section.limit,
        seed=recipe.seed,
        instruction=section.instruction,
        columns=section.columns or None,
        require_gold=needs_rewards(recipe) and section.task.needs_gold_or_tests,
    )


def _note(seen: Mapping[str, float | None], speed: float) -> str:
    parts = [f"loss {seen['train/loss']:.4f}"]
    if (reward := seen.get("rollout/reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    elif seen.get("rollout/num_ungraded"):
        parts.append("reward unknown")
    return "  ".join([*parts, f"{speed:,.0f} tok/s"])
