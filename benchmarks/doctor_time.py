"""What `opdkit doctor` takes of a pair of SmolLM2-135M's shape: seconds on the clock and of the processors.

    python benchmarks/doctor_time.py [--dtype bfloat16] [--layers 30] [--page]

Random weights, a vocabulary of 49152 tokens of which every one is known, word problems of about 100 tokens, answers of
up to 512 (doctor cuts them), groups of 4, exact reverse KL from the other model. Seconds on the clock mean something on
an idle machine alone; those of the processors are the work. --page prints the page too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opdkit import toml
from opdkit.engines.scratch import char_tokenizer

VOCABULARY = 49152
SPECIALS = 5  # of the tokenizer, beside its characters


def make_model(folder: Path, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=4,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    others = VOCABULARY - SPECIALS - len(string.printable)
    tokenizer = char_tokenizer(string.printable + "".join(chr(0x10000 + number) for number in range(others)))
    tokenizer.save_pretrained(folder)


def problems(num: int) -> list[dict[str, str]]:
    return [
        {
            "problem": f"Ann has {n} apples and buys {n % 7} bags of {n % 5 + 2} each. How many are there now?",
            "answer": str(n + n % 7 * (n % 5 + 2)),
        }
        for n in range(num)
    ]


def recipe(folder: Path, dtype: str) -> dict[str, Any]:
    return {
        "name": "doctor",
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(folder / "student"), "dtype": dtype, "device": "cpu"},
        "teacher": {"kind": "model", "path": str(folder / "teacher")},
        "data": {"train": str(folder / "problems.jsonl"), "task": "math"},
        "sampling": {"group_size": 4, "max_answer_tokens": 512},
        "method": {"name": "opd"},
        "train": {"steps": 100, "problems_per_step": 8, "lr": 1e-6},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("student", "teacher")):
            make_model(folder / model, asked.layers, seed)
        lines = "".join(json.dumps(problem) + "\n" for problem in problems(64))
        (folder / "problems.jsonl").write_text(lines)
        file = folder / "recipe.toml"
        file.write_text(toml.dumps(recipe(folder, asked.dtype)))
        print(f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), torch {torch.__version__}, "
              f"{asked.dtype}, {asked.layers} layers")  # fmt: skip
        for how in (["--quick"], []):
            measure(file, how, asked.page)


def measure(file: Path, how: list[str], page: bool) -> None:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "opdkit", "doctor", str(file), *how, *([] if page else ["--json"])]
    threads = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # busy-waiting ones are counted as work
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=threads)
    took, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{' '.join(['doctor', *how])}: {took:.0f} s, {processors:.0f} s of the processors, status {done.returncode}")
    if page:
        print(done.stdout)
        return
    found = json.loads(done.stdout)
    slow = sorted(found["checks"], key=lambda one: -one["seconds"])[:6]
    print("  longest:", ", ".join(f"{one['check']} {one['seconds']:.0f} s" for one in slow))
    print(
        "  ",
        found["counts"],
        [(c["check"], c["sentence"]) for c in found["checks"] if c["level"] in ("failed", "warned")],
    )


if __name__ == "__main__":
    main()
