"""Evaluation: sample, grade, write, summarise. What is written is never sampled again.

Every answer goes to a JSONL file as soon as its batch is graded, under its (problem, sample) key. The seed of an answer
is (seed, "evaluate", problem id, sample id) whatever the model: before, after and teacher are compared on the same draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Sampler, SamplingParams
from opdkit.errors import UserError
from opdkit.measure.accuracy import Sample, summarise
from opdkit.tasks.base import Task
from opdkit.train.rollouts import sample_groups
from opdkit.types import Problem

ANSWERS_PER_BATCH = 512  # what a crash can cost


def evaluate(
    problems: Sequence[Problem],
    *,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    num_samples: int,
    seed: int,
    store: Path | None = None,
    identity: dict[str, object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """E of the run-folder contract for `num_samples` answers to every problem.

    store     JSONL of the answers; what it already holds is kept (resume)
    identity  what makes answers comparable (model, data, sampling); a store with another identity is refused
    """
    samples = _resume(store, identity or {}) if store else []
    have = {(s.problem_id, s.sample_id) for s in samples}
    todo = [p for p in problems if any((p.id, i) not in have for i in range(num_samples))]
    # A problem is sampled whole, so a half-written one is sampled anew and its old lines are dropped.
    redo = {p.id for p in todo}
    wanted = {p.id for p in problems}
    samples = [s for s in samples if s.problem_id in wanted - redo and s.sample_id < num_samples]
    per_batch = max(1, ANSWERS_PER_BATCH // num_samples)
    for start in range(0, len(todo), per_batch):
        groups = sample_groups(
            todo[start : start + per_batch],
            sampler=sampler,
            renderer=renderer,
            task=task,
            params=params,
            group_size=num_samples,
            identity=(seed, "evaluate"),
            policy_version=0,
        )
        fresh = [
            Sample(
                problem_id=r.problem_id,
                sample_id=r.sample_id,
                reward=r.reward,
                parsed=r.parsed,
                finish=r.finish,
                num_tokens=len(r.answer_ids),
            )
            for group in groups
            for r in group.rollouts
        ]
        texts = [renderer.answer_text(r.answer_ids) for group in groups for r in group.rollouts]
        if store:
            _append(store, [{**_as_dict(s), "text": t} for s, t in zip(fresh, texts, strict=True)])
        samples += fresh
        if progress:
            progress(len(samples), len(problems) * num_samples)
    return summarise(samples, seed=seed)
