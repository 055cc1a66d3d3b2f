"""`opdkit make-model`: a tiny test model with its own tokenizer, taught a little by the ordinary trainer (`sft`)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from opdkit.data.readers import load_problems
from opdkit.engines.scratch import bpe_tokenizer, char_tokenizer
from opdkit.engines.scratch import make_model as make_untrained
from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe
from opdkit.run.console import Console, say
from opdkit.tasks import arithmetic
from opdkit.training.loop import train
from opdkit.training.problems.demonstrations import MARKS, demonstration_lessons, rounds
from opdkit.types import Problem

BATCH = 64
TEXT_POSITIONS = 4096  # room for a problem, its reference solution and an answer
WORLD_POSITIONS, READING_POSITIONS = 128, 512  # the second with three demonstrations of the longest problems


def make_model(
    out: Path,
    *,
    data: str,
    hidden_size: int,
    num_layers: int,
    steps: int,
    seed: int,
    console: Console,
    vocab_size: int = 2048,
    limit: int | None = None,
    reads_demonstrations: bool = False,
    digits_per_token: int = 1,
    train_overrides: dict[str, Any] | None = None,
    name: str = "lessons",
    problems: Sequence[Problem] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_positions: int | None = None,
) -> None:
    """Write a model to the folder `out`. Raises UserError if `out` exists or the data cannot be read.

    The tokenizer knows the characters of the arithmetic task, or is a byte-level BPE trained on the data's text.
    limit: teach only so many problems, again and again: a model that is good at them and half-way on others.
    digits_per_token: how many digits side by side are one token; a teacher of another number has another tokenizer.
    reads_demonstrations: also teach arithmetic with worked answers in front of the question (`demonstrations.py`).
    `problems`, `tokenizer` and `max_positions` stand in for the lessons that `data` would give, and what fits them.
    """
    if out.exists():
        raise UserError(f"{out} already exists; remove it, or choose another folder")
    is_generated = data.startswith("arithmetic:")
    if reads_demonstrations and not is_generated:
        raise UserError(
            f"--reads-demonstrations needs generated problems, but --data is {data}; use arithmetic:add-3:train"
        )
    if problems is None:
        problems = _lessons(data, steps * BATCH, limit, seed, reads_demonstrations)
    if tokenizer is None and is_generated:
        multiplied = arithmetic.MULTIPLIED if ":multiply-" in data else ""
        alphabet = arithmetic.ALPHABET + multiplied + (MARKS if reads_demonstrations else "")
        tokenizer = char_tokenizer(alphabet, digits_per_token=digits_per_token)
    elif tokenizer is None:
        texts = (text for p in problems for text in _texts(p))
        tokenizer = bpe_tokenizer(texts, vocab_size, digits_per_token=digits_per_token)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch_folder = tempfile.TemporaryDirectory(prefix=".opdkit-make-model-", dir=out.parent)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent} ({error.strerror}); choose another folder") from error
    with scratch_folder as scratch:  # beside `out`, so that the finished model moves there whole
        untrained = Path(scratch) / "untrained"
        make_untrained(
            untrained,
            tokenizer=tokenizer,
            hidden_size=hidden_size,
            num_layers=num_layers,
            seed=seed,
            max_positions=max_positions or _positions(is_generated, reads_demonstrations),
        )
        made = untrained
        if steps:
            summary = train(
                _recipe(untrained, scratch, name, data, is_generated, steps, seed, train_overrides),
                console=console,
                problems=problems,
            )
            made = Path(scratch) / name / summary["model"]
        made.rename(out)
    say(console, f"made {out}")


def lessons(data: str, *, num: int, seed: int, limit: int | None = None) -> list[Problem]:
    """`num` lessons: the first `limit` generated problems again and again, with a new solution each time."""
    return [
        replace(p, id=f"{p.id}/{epoch}", solution=arithmetic.random_solution(p, seed + epoch))
        for epoch, p in islice(rounds(data, limit, seed), num)
    ]


def _lessons(data: str, num: int, limit: int | None, seed: int, reads_demonstrations: bool) -> list[Problem]:
    if not data.startswith("arithmetic:"):
        return load_problems(data, task="math", limit=limit, seed=seed).problems
    if reads_demonstrations:
        return demonstration_lessons(data, num=num, pool=limit, seed=seed)
    return lessons(data, num=num, seed=seed, limit=limit)


def _positions(is_generated: bool, reads_demonstrations: bool) -> int:
    if not is_generated:
        return TEXT_POSITIONS
    return READING_POSITIONS if reads_demonstrations else WORLD_POSITIONS


def _recipe(
    model: Path,
    scratch: str,
    name: str,
    data: str,
    is_generated: bool,
    steps: int,
    seed: int,
    overrides: dict[str, Any] | None,
) -> Recipe:
    return parse_recipe(
        {
            "name": name,
            "seed": seed,
            "runs_dir": scratch,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": data, "task": "arithmetic" if is_generated else "math"},
            "sampling": {"max_answer_tokens": 64 if is_generated else 512},
            "method": {"name": "sft"},
            "train": {
                "steps": steps,
                "problems_per_step": BATCH if is_generated else 16,
                "optimizer": "muon",
                "lr": 8e-3,
                "schedule": "linear",
                "save_every": 0,
                "save_rows_every": 0,
                **(overrides or {}),
            },
        }
    )


def _texts(problem: Problem) -> list[str]:
    return [message["content"] for message in problem.messages] + [problem.solution or ""]
