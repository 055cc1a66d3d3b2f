"""`opdkit analyse diversity`: the same problems and numbers of answers in every run; files that hold hostile text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.analysis.diversity import DiversityOptions, measure_runs, write_diversity
from opdkit.cli.tables import diversity_tables
from opdkit.errors import UserError
from opdkit.measure.diversity import NGrams, tokens
from opdkit.run.stored_answers import Store, StoredAnswer, problems_path, write_problems
from opdkit.types import Problem

HOSTILE = "<script>alert(1)</script> \x1b[2J [red]"


def result(folder: Path, answers: dict[str, list[tuple[str, float | None]]], task: str = "math", **asked: Any) -> str:
    store = Store(folder / "set.jsonl", {"data": ["set"], "task": task, **asked})
    store.append(
        [
            StoredAnswer(problem_id=p, sample_id=i, reward=reward, parsed="1", finish="stop", num_tokens=3, text=text)
            for p, found in answers.items()
            for i, (text, reward) in enumerate(found)
        ]
    )
    messages = ({"role": "user", "content": HOSTILE},)
    write_problems(problems_path(folder, "set"), [Problem(id=p, task=task, messages=messages) for p in answers])
    return str(folder)


def test_by_hand(tmp_path: Path) -> None:
    """Run A repeats itself, run B does not; only p is in both with two answers; B's third answer is not used."""
    a = result(tmp_path / "a", {"p": [("x y", 1.0), ("x y", 0.0)], "q": [("x", 1.0)], "r": [("x", 1.0), ("y", 1.0)]})
    b = result(tmp_path / "b", {"p": [("x y", 1.0), ("u v", 1.0), ("w", 0.0)], "q": [("x", 1.0), ("y", 0.0)]})
    found = measure_runs([a, f"other={b}"], options=DiversityOptions())["set"]
    assert found["problems"] == 1 and found["answers_each"] == 2 and found["left_out"] == {"a": 2, "other": 1}
    rows = found["per_problem"]["p"]
    assert rows["a"]["distance"] == 0.0 and rows["other"]["distance"] == 1.0
    assert rows["a"]["self_bleu"] == 1.0 and rows["a"]["unique_ratio"] == 0.5
    assert rows["a"]["success_distance"] is None and rows["other"]["success_distance"] == 1.0
    assert rows["other"]["pass@2"] == 1.0 and rows["a"]["pass@1"] == 0.5
    assert rows["other"]["self_bleu"] == NGrams([tokens("x y"), tokens("u v")]).self_bleu([0, 1])
    difference = found["runs"]["other"]["difference"]
    assert difference is not None and difference["distance"]["value"] == 1.0
    assert difference["success_distance"]["problems"] == 0, "undefined on one side: no difference"
    assert found["runs"]["a"]["difference"] is None


def test_programs(tmp_path: Path) -> None:
    """The program of an answer is measured, not the words around it; what does not parse has no tree and is counted."""
    program = "Here:\n```python\nx = {}\n```\nDone, {}."
    broken = "```python\nif True print(1)\n```"
    a = result(
        tmp_path / "a",
        {"p": [(program.format(1, "a"), 1.0), (program.format("[1]", "b"), 1.0), (broken, 0.0)]},
        task="code",
    )
    found = measure_runs([a], options=DiversityOptions(text_distance=True))["set"]
    row = found["per_problem"]["p"]["a"]
    # Module Assign Name Store Constant, and with [1] also List and Load: 5 of 7 nodes are shared
    assert row["tree_distance"] == pytest.approx(1 - 5 / 7) and row["success_unique_ratio"] == 1.0
    assert row["text_distance"] is not None and row["text_distance"] > 0
    assert found["runs"]["a"]["num_unparsed_programs"] == 1


def test_files_are_complete_and_harmless(tmp_path: Path) -> None:
    """Valid JSON without NaN, a page in which model text is text, a table that sends no commands to the terminal."""
    a = result(tmp_path / "a", {p: [(f"{HOSTILE} {p}", 1.0), (f"{p} b", 0.0)] for p in "pqrs"})
    b = result(tmp_path / "b", {p: [(f"{HOSTILE} {p}", 1.0), (f"c {p}", None)] for p in "pqrs"})
    results = measure_runs([a, b], options=DiversityOptions())
    paths = write_diversity(tmp_path / "out" / "deep", results)
    for path in paths[:3]:
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    page = paths[3].read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;" in page and "\x1b" not in page
    console = Console(width=70, record=True, force_terminal=False)
    for part in diversity_tables(results):
        console.print(part)
    assert "success_self_bleu" in console.export_text()


def test_refusals(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"p": [("x", 1.0)]})
    with pytest.raises(UserError, match="no problem has two answers in every one of a"):
        measure_runs([a], options=DiversityOptions())
    with pytest.raises(UserError, match="two runs are called a"):
        measure_runs([a, a], options=DiversityOptions())
    other = Store(tmp_path / "b" / "else.jsonl", {"data": ["else"], "task": "math"})
    other.append([StoredAnswer(problem_id="p", sample_id=0, reward=1.0, parsed="1", finish="stop", text="x")])
    with pytest.raises(UserError, match="no data set is in all of the runs"):
        measure_runs([a, str(tmp_path / "b")], options=DiversityOptions())


@pytest.mark.slow
def test_300_problems_of_8_answers_take_seconds(tmp_path: Path) -> None:
    """2400 answers of 2000 characters in less than 15 s of this process's CPU time (3 s on an idle core)."""
    words = [f"w{i * i % 997}" for i in range(5000)]
    answers = {
        f"p{p}": [(" ".join(words[p * 7 + s * 13 : p * 7 + s * 13 + 400]), float(s % 2)) for s in range(8)]
        for p in range(300)
    }
    a = result(tmp_path / "a", answers)
    start = time.process_time()
    measure_runs([a], options=DiversityOptions())
    assert time.process_time() - start < 15
