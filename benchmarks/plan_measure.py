"""One step of a run, measured by its moments: live tensor bytes at each moment's peak, and processor seconds.

    python benchmarks/plan_measure.py '{"student": ...}'    # as plan_check.py calls it, a process for each setting

Bytes are those of torch's allocator, every allocation and release in order, on top of what is alive before the step
(weights, optimizer, teacher): what `torch.cuda.max_memory_allocated` counts on a GPU. What a BLAS library holds for
itself and what the C library keeps of released memory is not in them. Seconds are taken in steps without the tracing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise

import torch
from rich.console import Console

from opdkit.engines.scratch import char_tokenizer
from opdkit.engines.scratch import make_model as write_model
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import TrainingRun
from opdkit.training.metrics.resources import Resources
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step

MOMENTS = {"sample": "sampling", "score": "scoring", "update": "update"}


def make_models(setting: dict[str, Any], folder: Path) -> None:
    """Random Qwen3 models over a vocabulary of so many tokens: hardly an answer stops before its limit."""
    for name in ("student", "teacher"):
        if shape := setting.get(name):
            tokenizer = char_tokenizer(arithmetic.ALPHABET + "()")
            missing = setting["vocabulary"] - len(tokenizer)
            tokenizer.add_tokens([f"<word-{number}>" for number in range(missing)])
            write_model(folder / name, tokenizer=tokenizer, seed=len(name), max_positions=4096, **shape)


def recipe_of(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    raw = json.loads(json.dumps(setting["recipe"]))
    raw["model"] = {"path": str(folder / "student"), "device": "cpu", **raw.get("model", {})}
    if "teacher" in setting:
        raw["teacher"] = {"kind": "model", "path": str(folder / "teacher"), **raw.get("teacher", {})}
    if "average" in setting:
        raw["teacher"] = setting["average"]
    raw["data"] = {"train": "arithmetic:merge-4:train", "task": "arithmetic", "limit": 256}
    raw |= {"name": "plan", "runs_dir": str(folder / "runs"), "diagnostics": {"every": 0}}
    return raw


def live_bytes() -> int:
    """Of all tensors there are, each memory once."""
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Clock:
    """When each moment began and ended, in the profiler's clock, and its processor seconds."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def during(self, resources: Resources, part: str) -> Iterator[None]:
        start, cpu = time.time_ns(), time.process_time()
        yield
        self.spans[part] = (start, time.time_ns())
        self.seconds[part] = time.process_time() - cpu


def measure(setting: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    torch.set_num_threads(1)
    clock = Clock()
    Resources.during = lambda self, part, models=None: clock.during(self, part)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(setting, folder)
        recipe = parse_recipe(recipe_of(setting, folder))
        run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, Console(quiet=True))
        try:
            run.state.optimizer.reserve()
            problems = list(run.problems)[: recipe.train.problems_per_step]
            seconds: dict[str, list[float]] = {part: [] for part in MOMENTS}
            for _ in range(steps):
                rows, _ = train_step(run.state, problems)
                for part in MOMENTS:
                    seconds[part].append(clock.seconds.get(part, 0.0))
            del rows
            gc.collect()
            base = live_bytes()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                rows, _ = train_step(run.state, problems)
            answers = [len(row.rollout.answer_ids) for row in rows]
            prompts = [len(row.rollout.prompt_ids) for row in rows]
            contexts = [len(view.context_ids) for row in rows for view in row.views.values()]
            return {
                "base": base,
                "peaks": peaks(profile, clock, base),
                "seconds": {MOMENTS[part]: min(values) for part, values in seconds.items()},
                "answer_tokens": sum(answers) / len(answers),
                "prompt_tokens": sum(prompts) / len(prompts),
                "context_tokens": sum(contexts) / len(contexts) if contexts else 0,
                "longest": max(prompts) + max(answers),
            }
        finally:
            run.close()


def peaks(profile: torch.profiler.profile, clock: Clock, base: int) -> dict[str, int]:
    """Live bytes at the peak of each moment."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    found = dict.fromkeys(MOMENTS.values(), 0)
    live = base
    for event in events:
        live += event.nbytes()
        for part, (start, end) in clock.spans.items():
            if start <= event.start_ns() <= end:
                found[MOMENTS[part]] = max(found[MOMENTS[part]], live)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
