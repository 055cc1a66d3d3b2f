"""What diagnostics cost of a step that they fall in: processor seconds, on a CPU.

    python benchmarks/diagnostics_cost.py [--problems 32]

Random models of 4 layers, width 128 and 2048 ids; 8 answers of 32 tokens to each problem, of which 16 are diagnosed.
The share is of sampling, scoring and learning together, and of the last two alone, in the cheaper of two steps; for a
loss that asks the teacher for distributions, and for one that asks for log-probs, whose pass keeps 16 answers' states.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from opdkit.engines.hf import HFEngine
from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training import loop
from opdkit.training.metrics.diagnose import Diagnosis
from opdkit.training.step import train_step

RARE = "".join(chr(0x4E00 + number) for number in range(2000))  # fills the vocabulary up


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose processor seconds are added under the name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - started

    return call


def shares(folder: Path, problems: int, support: str) -> tuple[float, float]:
    """Diagnostics' share of a whole step, and of it without sampling."""
    seconds: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    replaced: dict[tuple[Any, str], Callable[..., Any]] = {
        (Diagnosis, name): timed(seconds, "diagnostics", getattr(Diagnosis, name))
        for name in ("__init__", "heard", "saw", "compare", "metrics")
    }
    replaced[HFEngine, "sample"] = timed(seconds, "sampling", HFEngine.sample)
    step = timed(seconds, "step", train_step)

    def one(*args: Any) -> Any:
        seconds.clear()
        found = step(*args)
        steps.append(dict(seconds))
        return found

    replaced[loop, "train_step"] = one
    raw = {
        "name": f"diagnostics-{support}",
        "runs_dir": str(folder),
        "model": {"path": str(folder / "student"), "dtype": "float32", "device": "cpu"},
        "teacher": {"kind": "model", "path": str(folder / "teacher")},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic"},
        "sampling": {"max_answer_tokens": 32, "group_size": 8},
        "method": {"name": "opd", "support": support},
        "train": {"steps": 2, "problems_per_step": problems, "lr": 1e-6},
        "diagnostics": {"every": 1},
    }
    with ExitStack() as stack:
        for (owner, name), function in replaced.items():
            stack.enter_context(mock.patch.object(owner, name, function))
        loop.train(parse_recipe(raw), console=Console(quiet=True))
    least = min(steps, key=lambda found: found["step"])
    own = least["diagnostics"]
    return own / (least["step"] - own), own / (least["step"] - own - least["sampling"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=32)
    problems = parser.parse_args().problems
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("student", "teacher")):
            tokenizer = char_tokenizer(arithmetic.ALPHABET + "()" + RARE)
            make_model(folder / model, tokenizer=tokenizer, hidden_size=128, num_layers=4, seed=seed, max_positions=128)
        for support in ("full", "sampled"):
            whole, learning = shares(folder, problems, support)
            print(f"support = {support}: {whole:.1%} of a step, {learning:.1%} without sampling")
    print(
        f"{8 * problems} answers a step, 16 diagnosed; {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
