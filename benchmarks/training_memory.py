"""Where the memory of full training in float32 goes: resident memory by part, in bytes for each trained parameter.

    python benchmarks/training_memory.py [--layers 30] [--teacher initial] [--checkpointing]

A random model of SmolLM2-135M's shape, 4 problems of 2 answers of 32 tokens, two steps on a CPU. Of each part: what the
process holds after it, what of that is in use and not only kept by the C library for later, and the most it held in
between, all without what the imports alone take. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from opdkit.engines.hf import HFEngine
from opdkit.engines.scratch import bpe_tokenizer
from opdkit.recipe import parse_recipe
from opdkit.training import loop, parts
from opdkit.training import step as training_step
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.saved import checkpoint


def resident(key: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since the last `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_use() -> int:
    """Bytes, once the C library has given back what it kept."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make_student(folder: Path, layers: int) -> int:
    """SmolLM2-135M's shape with so many layers and random weights; returns its parameters."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = LlamaForCausalLM(config)
    module.save_pretrained(folder)
    bpe_tokenizer(["0123456789+=; "], 300).save_pretrained(folder)
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--teacher", default="initial", choices=("initial", "ema"))
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again")
    asked = parser.parse_args()
    seen: list[tuple[str, int, int, int]] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            forget()
            try:
                return function(*args, **kwargs)
            finally:
                held, most = resident("VmRSS"), resident("VmHWM")
                seen.append((name, held, in_use(), most))

        return call

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "student"
        size = make_student(folder, asked.layers)
        raw = {
            "name": "memory",
            "runs_dir": name,
            "model": {
                "path": str(folder),
                "dtype": "float32",
                "device": "cpu",
                "gradient_checkpointing": asked.checkpointing,
            },
            "teacher": {
                "kind": "self",
                "weights": asked.teacher,
                **({"ema_rate": 0.05} if asked.teacher == "ema" else {}),
            },
            "context": {"kind": "peers"},
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic"},
            "sampling": {"max_answer_tokens": 32, "group_size": 2},
            "method": {"name": "opd", "support": "full"},
            "train": {"steps": 2, "problems_per_step": 4, "lr": 1e-6},
            "diagnostics": {"every": 0},
        }
        places: list[tuple[Any, str, str]] = [
            (parts, "load_student_on", "loading"),
            (parts, "make_viewers", "teacher's weights"),
            (Optimizer, "reserve", "optimizer's state"),
            (HFEngine, "sample", "sampling"),
            (HFEngine, "score", "scoring"),
            (training_step, "backward", "backward"),
            (Optimizer, "step", "optimizer's step"),
            (checkpoint, "save", "checkpoint"),
        ]
        for owner, attribute, label in places:
            stack.enter_context(mock.patch.object(owner, attribute, watched(label, getattr(owner, attribute))))
        base = in_use()
        loop.train(parse_recipe(raw), console=Console(quiet=True))
    print(f"{size:,} parameters; {base / 2**20:.0f} MiB before anything is loaded")
    print(f"{'bytes a parameter':20} {'held':>6} {'in use':>6} {'at most':>7}")
    for label, *values in seen:
        held, used, most = ((value - base) / size for value in values)
        print(f"{label:20} {held:6.1f} {used:6.1f} {most:7.1f}")
    print(f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
