"""Steps of many settings, in one process or, as `python step_on_ranks.py <job.json>`, on each of several ranks, the
first of which writes what became of them to `<job>.pt`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from opdkit.metrics import reduce_metrics
from opdkit.ranks.base import Ranks
from opdkit.ranks.join import join, leave
from opdkit.recipe import Recipe, parse_recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step

OF_THE_SPLIT = ("time/", "memory/", "rollout/occupancy", "rollout/rows_together", "rollout/evictions")


def step(recipe: Recipe, ranks: Ranks, num_steps: int) -> dict[str, Any]:
    """What the steps saw and did. Rewards are the samples' numbers: a random student earns none."""
    parts = Parts(recipe, None, ranks=ranks)
    run = TrainingRun(recipe, parts, training_data(recipe, None), {}, Console(quiet=True), ranks=ranks)
    sample = run.state.sample
    if run.state.needs.reward:
        run.state.sample = lambda problems, number: [
            replace(g, rollouts=tuple(replace(r, reward=float(r.sample_id)) for r in g.rollouts))
            for g in sample(problems, number)
        ]
    optimizer = parts.optimizer
    seen: list[dict[str, Any]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    move = optimizer.step

    def caught(number: int) -> StepResult:
        own = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in optimizer.weights.items()}
        gradients.append(dict(optimizer.whole(own)))
        return move(number)

    optimizer.step = caught  # type: ignore[method-assign]
    for number in range(num_steps):
        run.stages.enter(run.state, run.answers)
        rows, metrics = train_step(run.state, run.drawn.of_step(number))
        metrics += ranks.joined(run.answers.drain())
        answers = [(row.rollout.key, row.rollout.answer_ids, row.rollout.reward) for row in rows]
        kept = {name: value for name, value in reduce_metrics(metrics).items() if not name.startswith(OF_THE_SPLIT)}
        seen.append({"answers": answers, "metrics": kept})
    after = optimizer.for_saving() or {name: weight.detach().clone() for name, weight in optimizer.weights.items()}
    averages = {}
    for number, teacher in enumerate(run.state.teachers):
        averages |= {f"{number}/{name}": whole for name, whole in optimizer.whole(teacher.state()).items()}
    run.close()
    in_parts = 0 if parts.student.shards is None else sum(name in parts.student.shards for name in optimizer.weights)
    return {"steps": seen, "gradients": gradients, "after": after, "averages": averages, "in_parts": in_parts}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    ranks = join(device="cpu", timeout_minutes=1)
    found = {name: step(parse_recipe(raw, overrides), ranks, num) for name, (raw, overrides, num) in job.items()}
    ranks.wait()
    if ranks.is_first:
        torch.save(found, path.with_suffix(".pt"))
    leave(0)
