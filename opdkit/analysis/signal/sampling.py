"""Answers for an analysis, sampled here: resumable, the same whatever the batches and wherever it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.analysis.signal.answers import line_of, row_of
from opdkit.contexts.render import Renderer
from opdkit.contexts.transcript import last_turn
from opdkit.data.readers import Dataset, load_problems
from opdkit.engines.base import Sampler, SamplingParams
from opdkit.errors import UserError
from opdkit.rollouts.single_turn import sample_rollouts
from opdkit.run.jsonl import append_lines, open_lines, put_in_order
from opdkit.tasks.guard import make_task, task_named
from opdkit.types import Rollout

ANSWERS_PER_BATCH = 256  # what a crash can cost


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Whose answers to what, and how they are drawn."""

    data: str
    task: str
    num_samples: int
    student: str | None  # None: the teacher answers itself
    params: SamplingParams
    instruction: str


def load_data(options: SamplingOptions, *, limit: int | None, seed: int) -> Dataset:
    """Raises UserError for a task or data set that is none, or a draw that cannot give different answers."""
    chosen = task_named(options.task)
    if options.num_samples < 2 or options.params.temperature == 0:
        raise UserError("an analysis ranks the answers to a problem: give -n of at least 2 and a --temperature above 0")
    return load_problems(
        options.data,
        task=chosen.main.name,
        limit=limit,
        seed=seed,
        instruction=options.instruction,
        require_gold=chosen.needs_gold_or_tests,
        asked=chosen.columns_asked,
    )


def sample_into(
    path: Path,
    header: Mapping[str, Any],
    data: Dataset,
    options: SamplingOptions,
    *,
    sampler: Sampler,
    renderer: Renderer,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    """Append the graded answers that are missing in `path`, each seeded by (seed, problem, sample)."""
    done = {(row["problem_id"], row["sample_id"]) for row in open_lines(path)[1:]}
    pairs = [(problem, sample_id) for problem in data.problems for sample_id in range(options.num_samples)]
    missing = [(problem, sample_id) for problem, sample_id in pairs if (problem.id, sample_id) not in done]
    problems = {problem.id: problem for problem in data.problems}
    task = make_task(task_named(options.task).main)
    try:
        for start in range(0, len(missing), ANSWERS_PER_BATCH):
            before = len(done) + start

            def keep(rollouts: list[Rollout]) -> None:
                lines = [
                    line_of(problems[rollout.problem_id], row_of(rollout, renderer.answer_text(last_turn(rollout))))
                    for rollout in rollouts
                ]
                append_lines(path, lines if path.exists() else [header, *lines])

            def heard(finished: int, total: int, before: int = before) -> None:
                progress(before + finished)

            sample_rollouts(
                missing[start : start + ANSWERS_PER_BATCH],
                sampler=sampler,
                renderer=renderer,
                task=task,
                params=options.params,
                identity=(seed, "signal"),
                policy_version=0,
                progress=heard,
                kept=keep,
            )
    finally:
        task.close()
    order = [(problem.id, sample_id) for problem, sample_id in pairs]
    put_in_order(path, order, lambda row: (row["problem_id"], row["sample_id"]), header=True)
