"""What several ranks keep and spend, beside one process: bytes, seconds a step, shares of gathering and summing.

    python benchmarks/parallel.py [--hidden-size 256] [--num-layers 6] [--ranks 1 2 4]

Steps of a Qwen3 with random weights over 16 x 128 random tokens in float32, with AdamW; on CPU ranks of this machine,
one thread each; several keep the weights gathered or sharded (docs/guides/parallel.md). "Kept" is what stays between
steps: weights, gradients and moments. Asserted: on 4 ranks at most 0.35 of one process. No time is asserted: ranks of
one machine share its cores. Gathering and summing inside the passes of sharded layers is in none of the shares.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.launch import HOST, environment_of
from opdkit.ranks.base import ALONE
from opdkit.ranks.join import NUM_RANKS, join, leave
from opdkit.recipe import Recipe, parse_recipe
from opdkit.run.console import Table, say
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.strategy import load_student_on, make_optimizer

ROWS, TOKENS, STEPS = 16, 128, 3
MOST_KEPT_ON_4 = 0.35  # of what one process keeps


def recipe_of(model: str, strategy: str) -> Recipe:
    return parse_recipe(
        {
            "parallel": {"strategy": strategy},
            "name": "parallel",
            "model": {"path": model, "dtype": "float32", "device": "cpu"},
            "data": {"train": "arithmetic:add-3:train", "task": "arithmetic"},
            "method": {"name": "sft"},
            "train": {"steps": STEPS, "lr": 1e-5},
        }
    )


def kept_bytes(module: torch.nn.Module, optimizer: Optimizer) -> int:
    """Of storages, each once: parameters of the module may be views of one number."""

    def tensors() -> Iterator[Tensor]:
        for parameter in (*module.parameters(), *optimizer.weights.values()):
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from optimizer.state().values()

    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in own)}.values())


def measure(model: str, strategy: str) -> dict[str, Any]:
    """On this rank: seconds of a step and of its parts (the fastest of the steps), and bytes kept after them."""
    ranks = ALONE if os.environ[NUM_RANKS] == "1" else join(device="cpu", timeout_minutes=5)
    recipe = recipe_of(model, strategy)
    student = load_student_on(ranks, recipe)
    optimizer = make_optimizer(student, recipe, ranks)
    ids = torch.randint(5, 15, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    times = []
    for step in range(STEPS):
        started = time.monotonic()
        optimizer.make_ready()
        gathered = time.monotonic()
        for row in ranks.share(ids):
            weights = optimizer.compute_weights()
            hidden_NH = student.hidden([row[:1]], [row[1:]], weights=weights)
            (hidden_NH @ student.head(weights).weight_VH.T).square().mean().div(ROWS).backward()
        passed = time.monotonic()
        optimizer.collect()
        summed = time.monotonic()
        optimizer.step(step)
        times.append((time.monotonic() - started, gathered - started, summed - passed))
    told = ranks.gather(kept_bytes(student.module, optimizer))
    seconds, gather_s, sum_s = min(times)
    return {"seconds": seconds, "gather": gather_s / seconds, "sum": sum_s / seconds, "kept": max(told)}


def on_ranks(num_ranks: int, strategy: str, model: Path) -> dict[str, Any]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(num_ranks)
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", str(model), "--strategy", strategy],
                env={**environment_of(rank, num_ranks, listener), "OMP_NUM_THREADS": "1"},
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]
    said = [process.communicate()[0] for process in processes]
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank-of", type=str)
    parser.add_argument("--strategy", type=str, default="gathered")
    asked = parser.parse_args()
    if asked.rank_of:
        found = measure(asked.rank_of, asked.strategy)
        os.write(1, (json.dumps(found) + "\n").encode())
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        tokenizer = char_tokenizer("0123456789+=")
        make_model(
            model, tokenizer=tokenizer, hidden_size=asked.hidden_size, num_layers=asked.num_layers, seed=0,
            max_positions=TOKENS,
        )  # fmt: skip
        hows = [(num, how) for num in asked.ranks for how in (("gathered", "sharded") if num > 1 else ("gathered",))]
        results = {(num, how): on_ranks(num, how, model) for num, how in hows}
    table = Table("ranks", "weights", "s / step", "gathering", "summing", "kept a rank, MB", "of one process")
    first = results[min(results)]["kept"]
    for (num, how), one in results.items():
        table.add_row(
            str(num), how if num > 1 else "", f"{one['seconds']:.2f}", f"{one['gather']:.1%}", f"{one['sum']:.1%}",
            f"{one['kept'] / 1e6:.1f}", f"{one['kept'] / first:.2f}",
        )  # fmt: skip
    say(Console(), table)
    for (num, _), one in results.items():
        if num == 4 and min(results)[0] == 1:
            assert one["kept"] <= MOST_KEPT_ON_4 * first


if __name__ == "__main__":
    main()
