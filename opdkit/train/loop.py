"""A whole run: load, evaluate, train, save, evaluate, report. Knows when; `step.py` knows what.

What can be refused is refused before a weight is loaded. Whatever happens afterwards (Ctrl-C, kill -9, a full disk)
leaves a run folder that `--resume` continues to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from opdkit.contexts.render import Renderer, long_prompts
from opdkit.data.readers import Dataset, fingerprint, load_problems
from opdkit.engines.load import check_model_path
from opdkit.errors import Interrupted, UserError
from opdkit.evaluation.evaluate import model_digest
from opdkit.measure.accuracy import Accuracy
from opdkit.metrics import Metric, MetricsLog
from opdkit.recipe import Recipe, check_sinks, warnings
from opdkit.tasks.guard import make_task
from opdkit.train import checkpoint
from opdkit.train.answers import Answers
from opdkit.train.console import Bar, Interrupt
from opdkit.train.evaluations import Evaluations
from opdkit.train.optimizer import Optimizer
from opdkit.train.order import problems_of_step
from opdkit.train.pass_rates import grades_the_student, measure_pass_rates
from opdkit.train.resume import going_on, model_paths
from opdkit.train.rows import save_rows
from opdkit.train.run_folder import RunFolder
from opdkit.train.stages import Stages
from opdkit.train.step import State, train_step
from opdkit.train.student import load_student
from opdkit.train.teacher import make_teacher
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
            require_gold=recipe.data.task.needs_gold,
        )
        for source in recipe.eval.sources
    }
    for _, path in model_paths(recipe):
        check_model_path(path)
    # Everything that can fail comes before the folder is touched: --overwrite must not cost a run for a mistyped path.
    with RunFolder.locked(recipe.run_dir, resume=resume, overwrite=overwrite) as folder:
        saved, changed, said = going_on(folder, recipe) if resume else (None, {}, [])
        with closing(Run(recipe, Parts(recipe, saved), data, eval_sets, console)) as run:
            for sentence in said:
                run.warn(sentence)
            folder.prepare(overwrite=overwrite)
            return run.go(folder, saved, changed)


LOST_SHARE = 0.2  # of the answers; from here on the summary says so


class Parts:
    """What a run is made of: the models, and what moves them."""

    def __init__(self, recipe: Recipe, saved: checkpoint.Saved | None) -> None:
        self.student = load_student(recipe, resume_from=saved.model_path if saved else None)
        self.renderer = Renderer(
            self.student.tokenizer,
            chat_template=self.student.chat_template,
            template_kwargs=recipe.model.template_kwargs,
            close_thinking=recipe.model.close_thinking,
        )
        self.optimizer = Optimizer(self.student.module, recipe.train, compute_dtype=getattr(torch, recipe.model.dtype))
        self.teacher = make_teacher(recipe, self.student, self.optimizer)
        if saved:
            self.optimizer.load_state(saved.tensors("optimizer"))
            if self.teacher:
                self.teacher.load_state(saved.tensors("teacher"))


class Run:
    """One run while it lasts."""

    def __init__(
        self, recipe: Recipe, parts: Parts, data: Dataset, eval_sets: dict[str, Dataset], console: Console
    ) -> None:
        self.recipe, self.parts, self.console = recipe, parts, console
        self.data, self.eval_sets = data, eval_sets
        self.interrupt = Interrupt(console)
        self.warnings: list[str] = []
        for sentence in warnings(recipe):
            self.warn(sentence)
        self.problems = self._fitting(data)
        problems_of_step(self.problems, step=0, per_step=recipe.train.problems_per_step, seed=recipe.seed)
        self._check_evaluations()
        first_ones = [self.problems[0], *(data.problems[0] for data in eval_sets.values())]
        self.task = make_task(recipe.data.task, first_ones)
        self.answers = Answers(recipe, parts.student, parts.renderer, parts.optimizer, parts.teacher, self.task)
        self.stages = Stages(recipe, console)
        self.state = State(
            student=parts.student,
            optimizer=parts.optimizer,
            teacher=parts.teacher,
            method=recipe.method,
            weights=recipe.weights,
            diagnostics=recipe.diagnostics,
            context=recipe.context,
            sample=self.answers,
            max_tokens_per_micro_batch=recipe.train.max_tokens_per_micro_batch,
            updates_per_step=recipe.train.updates_per_step,
            num_steps=recipe.train.steps,
            seed=recipe.seed,
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
        models = {key: model_digest(Path(path)) for key, path in model_paths(recipe)}
        for sentence in folder.write_environment(
            self._fingerprints(models), task=self.task.describe(), models=models, changed=changed
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
                before, after, teacher = self._train(log)
            except Interrupted:
                if state.step > self.saved_step:
                    self._save()
                raise
        self._warn_of_lost_answers()
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
        seen = {metric.name: metric.value for metric in metrics}
        self._count(seen, seconds)
        speed = (seen["rollout/tokens"] or 0.0) / seconds
        metrics += [*scheduled, Metric("time/step_s", seconds), Metric("time/tokens_per_s", speed)]
        if train.save_rows_every and state.step % train.save_rows_every == 0:
            save_rows(self.folder.rows(state.step), rows)
        log.write(state.step, metrics)
        if state.step == train.steps or (train.save_every and state.step % train.save_every == 0):
            self._save()
        self._warn_of_crashes()
        bar.update(state.step, note=_note(seen, speed))

    def _count(self, seen: Mapping[str, float | None], seconds: float) -> None:
        counters = self.state.counters
        for name, value in (
            ("seconds", seconds),
            ("answer_tokens", seen["rollout/tokens"]),
            ("teacher_tokens", seen.get("teacher/tokens", 0.0)),
            ("answers", seen["rollout/num_rows"]),
            ("truncated_answers", seen["rollout/num_truncated"]),
            ("ungraded_answers", seen["rollout/num_ungraded"]),
            ("answers_without_context", seen.get("teacher/num_rows_without_view", 0.0)),
            ("answers_too_long_for_teacher", seen.get("teacher/num_rows_too_long", 0.0)),
            ("grader_crashes", seen.get("grading/num_crashes", 0.0)),
            ("skipped_steps", seen["train/num_skipped_steps"]),
        ):
            assert value is not None
            counters[name] = counters.get(name, 0.0) + value

    def _save(self) -> None:
        parts, state = self.parts, self.state
        checkpoint.save(
            self.folder.checkpoints,
            step=state.step,
            model=parts.student,
            optimizer=parts.optimizer.state(),
            teacher=parts.teacher.state() if parts.teacher else {},
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
        not_saved = ("teacher.path", "model.path") if self.recipe.model.lora else ("teacher.path",)
        prints |= {
            path: digest for key, path in model_paths(self.recipe) if (digest := models[key]) and key in not_saved
        }
        return prints

    def _check_evaluations(self) -> None:
        """Raises UserError for an evaluation that would only fail after training."""
        room = self.parts.student.max_positions
        longest = self.recipe.eval.max_answer_tokens or self.recipe.sampling.max_answer_tokens
        for source, data in self.eval_sets.items():
            self._warn_of_rows(data)
            if room is None:
                continue
            render = self.parts.renderer.prompt_ids
            long = long_prompts(((p.id, render(p.messages)) for p in data.problems), room - longest)
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
        long = long_prompts(((p.id, self.parts.renderer.prompt_ids(p.messages)) for p in data.problems), limit)
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

    def _warn_of_lost_answers(self) -> None:
        counters = self.state.counters
        for name, why in (
            ("answers_without_context", "gave the teacher nothing to read"),
            ("answers_too_long_for_teacher", "were longer, with their context, than the teacher's positions"),
            ("truncated_answers", "ran into sampling.max_answer_tokens"),
            ("ungraded_answers", "could not be graded"),
        ):
            share = counters.get(name, 0.0) / max(1.0, counters.get("answers", 0.0))
            if share > LOST_SHARE:
                self.warn(f"{share:.0%} of the answers {why}")
        if crashes := counters.get("grader_crashes"):
            self.warn(f"the grader failed on {crashes:.0f} answers, which stayed ungraded")

    def _warn_of_crashes(self) -> None:
        for sentence in self.task.new_crashes():
            self.warn(sentence)

    def _warn_of_rows(self, data: Dataset) -> None:
        if data.dropped:
            where, why = data.dropped[0]
            self.warn(f"{len(data.dropped)} rows of {data.source} cannot be used (first: {where}: {why})")
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
        require_gold=grades_the_student(recipe) and section.task.needs_gold,
    )


def _note(seen: Mapping[str, float | None], speed: float) -> str:
    parts = [f"loss {seen['train/loss']:.4f}"]
    if seen.get("rollout/reward") is not None:
        parts.append(f"reward {seen['rollout/reward']:.3f}")
    return "  ".join([*parts, f"{speed:,.0f} tok/s"])
