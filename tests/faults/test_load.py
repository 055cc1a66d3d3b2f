"""A long run and a large evaluation: 3,000 steps, 20,000 answers. What shows them takes seconds of a processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Warm

from opdkit.run.rows import load_rows, save_rows
from opdkit.types import Example

pytestmark = pytest.mark.faults
STEPS, ANSWERS = 3_000, 20_000
SECONDS = 30.0


def repeated(rows: list[Example], count: int) -> Iterator[Example]:
    """Of problems of their own, eight answers each."""
    from dataclasses import replace

    for number in range(count):
        one = rows[number % len(rows)]
        problem = replace(one.problem, id=f"p{number // 8}")
        yield replace(one, problem=problem, rollout=replace(one.rollout, problem_id=problem.id, sample_id=number % 8))


@pytest.fixture(scope="module")
def world(warm: Warm, write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run and a real evaluation, made longer."""
    folder = tmp_path_factory.mktemp("load")
    write_recipe(folder)
    assert warm("train", "recipe.toml", cwd=folder).status == 0
    run = folder / "runs/run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = [line for line in lines if line["step"] == 2 and "train/loss" in line][-1]
    with (run / "metrics.jsonl").open("w") as file:
        for number in range(1, STEPS + 1):
            file.write(json.dumps({**step, "step": number, "time": step["time"] + number}) + "\n")
    rows = load_rows(run / "rows/step_000002.parquet")
    for path in (run / "rows").iterdir():
        path.unlink()
    (run / "sums.txt").unlink()  # it was changed on purpose
    save_rows(run / f"rows/step_{STEPS:06d}.parquet", list(repeated(rows, ANSWERS)))
    small = (run / f"rows/step_{STEPS:06d}.parquet").with_name("small")
    save_rows(small, rows)
    for number in range(1, STEPS):
        shutil.copy(small, run / f"rows/step_{number:06d}.parquet")
    small.unlink()
    evaluate = (
        "evaluate", "--model", "runs/run/checkpoints/step_000002/model", "--data", "arithmetic:merge-3:test",
        "--task", "arithmetic", "--limit", "5", "-n", "8", "--max-answer-tokens", "6", "--out", "a",
    )  # fmt: skip
    assert warm(*evaluate, cwd=folder).status == 0
    grow(folder / "a")
    shutil.copytree(folder / "a", folder / "b")
    return folder


def grow(out: Path) -> None:
    """2,500 problems of eight answers, from five of eight."""
    import gzip

    (answers,) = out.glob("*_test.jsonl")
    header, *lines = [json.loads(line) for line in answers.read_text().splitlines()]
    by_problem: dict[str, list[dict[str, object]]] = {}
    for line in lines:
        by_problem.setdefault(line["problem_id"], []).append(line)
    (problems,) = out.glob("*.problems.jsonl.gz")
    texts = [json.loads(line) for line in gzip.decompress(problems.read_bytes()).decode().splitlines()]
    many, grown = [], [header]
    for number in range(ANSWERS // 8):
        one = texts[number % len(texts)]
        many.append({**one, "id": f"{one['id']}-{number}"})
        grown += [{**line, "problem_id": f"{one['id']}-{number}"} for line in by_problem[one["id"]]]
    problems.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in many).encode()))
    answers.write_text("".join(json.dumps(one) + "\n" for one in grown))


@pytest.mark.parametrize(
    "argv",
    [
        ("report", "runs/run"),
        ("watch", "runs/run", "--once"),
        ("compare", "a", "b"),
        ("compare", "runs/run@rows", "runs/run@rows"),
        ("regrade", "a"),
    ],
    ids=lambda argv: " ".join(argv),
)
def test_seconds(argv: tuple[str, ...], warm: Warm, world: Path) -> None:
    done = warm(*argv, cwd=world)
    print(f"\n{' '.join(argv)}: {done.seconds:.1f} s of a processor")
    assert done.status == 0, done.said
    assert done.seconds < SECONDS
