"""Whole training steps of real shapes with random weights, beside what `opdkit plan` says of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_models import built, write_shape
from rich.console import Console

from opdkit.cost.devices import FLOPS_REACHED, GPUS, Device
from opdkit.cost.plan import Sizes, plan
from opdkit.cost.seconds import update_flops
from opdkit.cost.work import Lengths
from opdkit.engines.model import LanguageModel
from opdkit.recipe import Recipe, parse_recipe
from opdkit.training.loop import TrainingRun
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step

STEPS = 2


def recipe_of(folder: Path, student: str, teacher: str, device: torch.device, tiny: bool) -> Recipe:
    return parse_recipe({
        "name": "step", "runs_dir": str(folder / "runs"),
        "model": {
            "path": str(write_shape(folder / f"student-{student}", student, tiny)), "device": str(device),
            "gradient_checkpointing": student != "0.6B",
        },
        "teacher": {"kind": "model", "path": str(write_shape(folder / f"teacher-{teacher}", teacher, tiny))},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 64},
        "sampling": {"group_size": 4, "max_answer_tokens": 12 if tiny else 256},
        "method": {"name": "opd"}, "diagnostics": {"every": 0},
        "train": {
            "steps": 10, "problems_per_step": 4 if tiny else 16, "lr": 1e-6, "max_tokens_per_micro_batch": 8192,
        },
    })  # fmt: skip


def step_figures(
    folder: Path, student: str, teacher: str, device: torch.device, tiny: bool
) -> Iterator[dict[str, Any]]:
    """What a step took, by parts, and what the plan says; a figure a step, and one of medians."""
    recipe = recipe_of(folder, student, teacher, device, tiny)
    with mock.patch.object(LanguageModel, "load", built):
        run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, Console(quiet=True))
    gpu = _this_gpu(device)
    try:
        run.state.optimizer.reserve()
        problems, seen = list(run.problems)[: recipe.train.problems_per_step], []
        for _ in range(1 if tiny else 1 + STEPS):
            rows, metrics = train_step(run.state, problems)
            told = {one.name: one.value for one in metrics if one.name.startswith(("time/", "memory/"))}
            seen.append({name: value for name, value in told.items() if value is not None})
        seen = seen[1:] or seen  # the first one starts kernels
        took = {name: statistics.median(one[name] for one in seen) for name in seen[0]}
        answers = sum(len(row.rollout.answer_ids) for row in rows)
        lengths = Lengths(prompt=len(rows[0].rollout.prompt_ids), answer=round(answers / len(rows)))
        said = plan(recipe, Sizes(), device=gpu, lengths=lengths)
        times = {part: took[f"time/{part}_s"] for part in ("sample", "score", "update")}
        whole = sum(times.values())
        figure: dict[str, Any] = {
            "rows": len(rows), "answer_tokens": answers, "seconds": round(whole, 3),
            **{f"share_{part}": round(value / whole, 3) for part, value in times.items()},
            "update_tokens_a_second": round(answers / times["update"]), "peak_gib": took.get("memory/peak_gib"),
            "plan_peak_gib": round(said.peak / 2**30, 2), "plan_peak_moment": said.peak_moment,
        }  # fmt: skip
        if gpu is not None and gpu.flops is not None and said.seconds is not None:
            rate = gpu.flops[recipe.model.dtype] / FLOPS_REACHED
            figure["mfu"] = round(update_flops(said.work) / times["update"] / rate, 4)
            figure["plan_seconds"] = {name: round(value, 3) for name, value in said.seconds.items()}
        yield figure
    finally:
        run.close()


def _this_gpu(device: torch.device) -> Device | None:
    """The device of the table whose name is in this one's."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_properties(device)
    words = own.name.lower().replace(" ", "").replace("geforce", "")
    found = next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in words), None)
    return found or Device(name=own.name, capacity=own.total_memory)
