"""Real gold answers graded against themselves, rewritten, and corrupted. The data lie beside the repository."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from opdkit.tasks.math.task import MathTask
from opdkit.types import Problem

DATA = Path(__file__).parents[2].parent / "shared" / "data"
NAMES = ["math500/test", "aime24/test", "dapo_math/train", "deepmath/train", "gsm8k/train", "gsm8k/test"]
NUM_SAMPLED = 40  # golds per data set in the quick tests; the slow ones take all


def golds(name: str) -> list[str]:
    parquet, lines = DATA / f"{name}.parquet", DATA / f"{name}.jsonl"
    if parquet.exists():
        return [row["reward_model"]["ground_truth"] for row in pq.read_table(parquet).to_pylist()]
    if lines.exists():
        return [json.loads(line)["answer"].split("####")[1].strip() for line in lines.read_text().splitlines()]
    pytest.skip(f"{parquet.parent} is absent: the data sets are not part of the repository")


def distinct(name: str, limit: int | None) -> list[str]:
    """Golds without a box, each once; a seeded sample, without those for which no variant can be written down."""
    unboxed = sorted({re.sub(r"^\\boxed\{(.*)\}$", r"\1", gold) for gold in golds(name)} - {"+"})
    return unboxed if limit is None else random.Random(0).sample(unboxed, min(limit, len(unboxed)))


def scores(task: MathTask, pairs: list[tuple[str, str]]) -> list[float | None]:
    items = [(Problem(id="p", task="math", messages=(), gold=g), f"Thus \\boxed{{{a}}}.") for g, a in pairs]
    return [grade.score for grade in task.grade(items)]


def rewritten(gold: str) -> Iterator[str]:
    """The same answer as another hand would write it."""
    yield re.sub(r"\\[dt]?frac", r"\\tfrac", gold)
    yield re.sub(r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\)([)\]])", r"\\right\1", gold))
    yield "$ " + gold.replace("+", " + ").replace(",", ", ") + " .$"
    if (
        re.fullmatch(r"[-+0-9a-z\\{}^ ]*", gold)
        and re.search(r"\d", gold)
        and not re.search("text|circ|_|begin|mod", gold)
    ):
        yield f"{gold}+0"  # forces algebra
        yield f"z = {gold}"


def corrupted(gold: str) -> Iterator[str]:
    """Every digit changed, the first and last number off by one, every sign flipped."""
    for match in re.finditer(r"\d", gold):
        yield gold[: match.start()] + str((int(match[0]) + 1) % 10) + gold[match.end() :]
    for match in [*re.finditer(r"\d+", gold)][:: max(1, len(re.findall(r"\d+", gold)) - 1)]:
        yield gold[: match.start()] + str(int(match[0]) + 1) + gold[match.end() :]
    for match in re.finditer(r"(?<!\\)-", gold):
        yield gold[: match.start()] + "+" + gold[match.end() :]
    if re.match(r"[1-9]|\\d?frac|\\sqrt|\\pi|\\ln", gold) and not re.search(r"[,=<>]|\\le|\\ge|\\ne", gold):
        yield "-" + gold


@pytest.mark.parametrize("name", NAMES)
def test_every_gold_is_accepted_against_itself(math_task: MathTask, name: str) -> None:
    """100 %: a gold that is refused its own text cannot be won by any answer."""
    everything = golds(name)
    answers = [re.sub(r"^\\boxed\{(.*)\}$", r"\1", gold) for gold in everything]
    refused = [
        gold
        for gold, score in zip(everything, scores(math_task, list(zip(everything, answers, strict=True))), strict=True)
        if score != 1.0
    ]
    assert not refused


@pytest.mark.parametrize("limit", [NUM_SAMPLED, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_rewritten_golds_are_accepted(math_task: MathTask, name: str, limit: int | None) -> None:
    """Other spellings, and harmless algebra on plain expressions. Not shown: every form a model may choose."""
    pairs = [(gold, answer) for gold in distinct(name, limit) for answer in rewritten(gold)]
    refused = [pair for pair, score in zip(pairs, scores(math_task, pairs), strict=True) if score != 1.0]
    assert not refused


@pytest.mark.parametrize("limit", [NUM_SAMPLED, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_corrupted_golds_are_refused(math_task: MathTask, name: str, limit: int | None) -> None:
    """One digit, one sign or one unit off is wrong. Not shown: that subtler errors are seen."""
    pairs = [(gold, answer) for gold in distinct(name, limit) for answer in corrupted(gold)]
    accepted = [pair for pair, score in zip(pairs, scores(math_task, pairs), strict=True) if score != 0.0]
    assert not accepted
