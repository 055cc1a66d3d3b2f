"""`opdkit data ...` as a person types it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_sets import jsonl
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.errors import UserError


def run(*words: object) -> str:
    """What a command prints, its lines joined to one. A refusal is raised."""
    done = CliRunner().invoke(app, ["data", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_list() -> None:
    """Every set, with where it comes from and whether that is pinned."""
    said = run("list")
    assert "livecodebench code coding_expert livecodebench/code_generation_lite @ refs/pr/6" in said
    assert "deepmath math boxed_inline zwhe99/DeepMath-103K @ main (not pinned)" in said
    assert "tooluse tool_use none no hub; give --source" in said


def test_prepare_dedup_inspect(tmp_path: Path) -> None:
    """The three in a row, each on what the one before wrote."""
    rows = [{"question": f"Find the sum of {n} and {n + 1}?", "answer": f"It is.\n#### {2 * n + 1}"} for n in range(9)]
    for split, chosen in (("train", [*rows, rows[0] | {"answer": "#### 7"}]), ("test", rows[8:])):
        jsonl(tmp_path / "raw" / f"{split}.jsonl", chosen)
    out = tmp_path / "out"
    said = run("prepare", "gsm8k", "--source", tmp_path / "raw", "--out", out, "--instruction", "answer_line")
    assert f"{out}/train.parquet: 10 problems (train), prompt 'answer_line'" in said
    assert "train: contradictory answers '1' and '7' to: Find the sum of 0 and 1?" in said
    assert "1 questions are in more than one split: their evaluation measures memory" in said
    clean = tmp_path / "clean.parquet"
    report = tmp_path / "report.json"
    said = run("dedup", out / "train.parquet", "--against", out / "test.parquet", "--out", clean, "--report", report,
               "--threshold", 0.9)  # fmt: skip
    assert "1 questions; 1 rows are alike" in said and f"1 of 10 rows of {out}/train.parquet are in another set" in said
    assert json.loads(report.read_text())["num_removed"] == 1
    again = ("dedup", out / "train.parquet", "--against", out / "test.parquet", "--dry-run", "--report")
    before = (out / "train.parquet").read_bytes()
    for place, flags, why in (
        (report, (), "exists already; name another --report"),
        (out / "train.parquet", ("--overwrite",), "is also the file to compare or --out"),
        (tmp_path / "none" / "report.json", (), "is not a file in a folder that exists"),
    ):
        with pytest.raises(UserError, match=why):
            run(*again, place, *flags)
    assert (out / "train.parquet").read_bytes() == before, "a report never replaces data"
    run(*again, report, "--overwrite")
    said = run("inspect", clean, "--row", 2, "--problems", 1)
    assert "9 rows, 9 of them problems for the task math 9 rows of the schema 'opdkit data prepare'" in said
    assert "gold graded against itself: 9 of 9 right" in said
    assert "as the student reads it [user] Find the sum of 1 and 2? Please reason step by step. The last" in said
    assert "=== Reference Solution Begin === It is. Answer: 3 ===" in said, "as the prompt wants it"
    assert "answers contradict: 1 times" in said and "--- gold: 3" in said


def test_a_row_cannot_command_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in a question are shown as they are spelled."""
    said = run("inspect", jsonl(tmp_path / "a.jsonl", [{"problem": "\x1b[31mred\x1b]0;title\x07 1+1?", "answer": "2"}]))
    assert r"[user] \x1b[31mred\x1b]0;title\x07 1+1?" in said and "\x1b" not in said


def test_inspect_with_a_tokenizer(tmp_path: Path, tiny_tokenizer: Callable[[], Any]) -> None:
    """Lengths in tokens, and the chat template's own marks around the row."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    source = jsonl(tmp_path / "a.jsonl", [{"problem": "1+2=", "answer": "3"}, {"problem": "12+34=", "answer": "46"}])
    said = run("inspect", source, "--task", "arithmetic", "--model", tmp_path / "model", "--no-grade")
    assert f"prompt, tokens: 6 to 8 (median 7, 95 % up to 7), in 2 rows; the longest is {source}:2" in said
    assert "as the student reads it <u>1+2=<a>" in said and "gold graded" not in said


def test_refusals(tmp_path: Path) -> None:
    """A sentence that names the flag."""
    source = jsonl(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "2"}])
    cases: list[tuple[tuple[object, ...], str]] = [
        (("dedup", source, "--against", source), "give either --out FILE, to write what is left, or --dry-run"),
        (("inspect", source, "--row", 2), "--row 2: only 1 rows can be used"),
        (("inspect", source, "--task", "maths"), "--task maths"),
        (("inspect", source, "--template", "a=1"), "render with a tokenizer: give --model as well"),
        (("inspect", source, "--model", "./nix"), "--model ./nix: there is no such folder"),
        (("inspect", jsonl(tmp_path / "b.jsonl", [])), "b.jsonl holds no row that can be read"),
        (("inspect", tmp_path / "c.jsonl"), "no data at"),
    ]
    for words, said in cases:
        with pytest.raises(UserError, match=said):
            run(*words)
