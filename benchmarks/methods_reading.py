"""What the frozen student can do with what a teacher reads: the most that a privileged method can hand on.

The student answers held-out problems, 8 times each, exactly as in a training step; from these answers the contexts of
the methods are built. What the student then says, reading them:

    accuracy      of one answer sampled after the context
    right_token   its probability of the right next token where a wrong answer first goes wrong: what the loss can teach
                  there (each problem has one right answer, so the right next token is known)

A teacher that copies whatever it is shown has a high accuracy after right answers and is harmful after wrong ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkit.contexts import Context, build_views
from opdkit.contexts.render import Renderer
from opdkit.data.readers import load_problems
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.recipe import Recipe
from opdkit.rollouts.single_turn import groups_of, sample_share
from opdkit.tasks.base import Task
from opdkit.tasks.guard import make_task
from opdkit.types import Asked, Group, Problem, Rollout, seed_from

NUM_PROBLEMS = 96


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer of the student, and what a teacher would read for it."""

    problem: Problem
    rollout: Rollout
    shown: str  # e.g. "right, right, wrong"
    context_ids: tuple[int, ...]


def measure_reading(peers: Recipe, solution: Recipe) -> list[dict[str, Any]]:
    """A row for everything a context of these recipes shows: {"shown", "share", "accuracy", "right_token"}, and the
    last two also "..._alone": of the same problems and answers, reading nothing (what is shown depends on how hard they
    are).

    share: of the answers of the student, those for which the context of `peers` shows just that; None for the others.
    """
    model = LanguageModel.load(Path(peers.model.path), dtype=torch.float32, device="cpu")
    engine = HFEngine(model, max_tokens_per_batch=peers.sampling.max_tokens_per_batch)
    renderer = Renderer(model.tokenizer, chat_template=model.chat_template)
    task = make_task(peers.data.task)
    (source,) = peers.eval.sources
    problems = load_problems(source, task=peers.data.task.main.name, limit=NUM_PROBLEMS).problems
    answers = sample_share(
        problems,
        sampler=engine,
        renderer=renderer,
        task=task,
        params=peers.sampling.params,
        group_size=peers.sampling.group_size,
        identity=(peers.seed, "reading"),
        policy_version=0,
    )
    groups = groups_of(problems, answers)
    rows = []
    for context, name in ((solution.context, "the reference solution"), (peers.context, None)):
        readings = _readings(groups, context, renderer, name, peers.seed)
        for shown in sorted({reading.shown for reading in readings}):
            those = [reading for reading in readings if reading.shown == shown]
            rows.append(
                {
                    "shown": shown,
                    "share": None if name else len(those) / sum(len(group.rollouts) for group in groups),
                    "accuracy": _accuracy(those, engine, renderer, task, peers),
                    "right_token": _right_token(those, engine, renderer),
                    "accuracy_alone": _accuracy(_alone(those), engine, renderer, task, peers),
                    "right_token_alone": _right_token(_alone(those), engine, renderer),
                }
            )
    return rows


def _readings(
    groups: Sequence[Group], context: Context, renderer: Renderer, name: str | None, seed: int
) -> list[Reading]:
    """What the context shows each answer; `name` says it where it is not peers."""
    asked = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    verdicts = {rollout.key: "right" if rollout.reward else "wrong" for _, rollout in asked}
    views = build_views(groups, context, renderer, identity=(seed, "reading", "context"))
    return [
        Reading(problem, rollout, name or ", ".join(verdicts[key] for key in view.sources), view.context_ids)
        for (problem, rollout), view in zip(asked, views, strict=True)
        if view is not None
    ]


def _alone(readings: Sequence[Reading]) -> list[Reading]:
    return [replace(reading, context_ids=reading.rollout.prompt_ids) for reading in readings]


def _accuracy(readings: Sequence[Reading], engine: HFEngine, renderer: Renderer, task: Task, recipe: Recipe) -> float:
    answers = engine.sample(
        [reading.context_ids for reading in readings],
        [seed_from(recipe.seed, "reading", "answer", *reading.rollout.key) for reading in readings],
        recipe.sampling.params,
    )
    grades = task.grade(
        [(r.problem, renderer.answer_text(a.answer_ids)) for r, a in zip(readings, answers, strict=True)]
    )
    return float(np.mean([grade.score or 0.0 for grade in grades]))


def _right_token(readings: Sequence[Reading], engine: HFEngine, renderer: Renderer) -> float | None:
    """None: no answer among these leaves the right path."""
    contexts, beginnings = [], []
    for reading in readings:
        assert reading.problem.solution is not None
        right_ids = renderer.encode(reading.problem.solution)
        pairs = enumerate(zip(right_ids, reading.rollout.answer_ids, strict=False))  # a wrong one may be shorter
        error = next((place for place, (right, said) in pairs if right != said), None)
        if error is not None:
            contexts.append(reading.context_ids)
            beginnings.append(right_ids[: error + 1])
    if not contexts:
        return None
    signals = engine.score(contexts, beginnings, Asked("sampled"))
    return float(np.mean([np.exp(s.sampled_logprob_T[-1]) for s in signals if s.sampled_logprob_T is not None]))
