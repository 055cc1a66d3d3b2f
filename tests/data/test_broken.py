"""Broken data, as files come: every fault a sentence with its place, every good row kept, nothing half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import jsonl, livecodebench, real

from opdkit.data.inspection import Inspection, by_kind, gold_as_answer, grade_golds, inspect_data, lengths
from opdkit.data.prepare import PrepareOptions, prepare
from opdkit.data.readers import load_problems
from opdkit.data.schemas.templates import TEMPLATES
from opdkit.errors import UserError
from opdkit.tasks.math.task import MathTask
from opdkit.tasks.multiple_choice import MultipleChoiceTask
from opdkit.tasks.tool_use import ToolUseTask

GOOD = {"problem": "1+1?", "answer": "2", "id": "a"}


def inspected(path: Path, rows: list[Any], **options: Any) -> tuple[Inspection, dict[str, list[tuple[str, str]]]]:
    """The inspection of the rows as JSON lines, and its findings: kind -> (line, what)."""
    found = inspect_data(jsonl(path, rows), **options)
    kinds = by_kind(found.findings)
    return found, {kind: [(f.where.rpartition(":")[2], f.what) for f in members] for kind, members in kinds.items()}


def test_every_fault_is_listed_with_its_line(tmp_path: Path) -> None:
    """One file with all of them; the good rows are still problems."""
    rows = [
        GOOD,
        {"problem": "2+2?", "answer": 4, "id": "b"},
        {"problem": "3+3?", "id": "c"},
        {"answer": "5", "id": "d"},
        {"prompt": [{"role": "user", "content": "4+4?"}], "reward_model": {"ground_truth": "8"}, "id": "a"},
        {"problem": "5+5? Put it in \\boxed{{}}.", "answer": ["10", "11"], "id": "e"},
        {"problem": "1+1? ", "answer": "3", "id": "f"},
        {"problem": "6+6? Put it in \\boxed{{}}.", "answer": "12", "id": "g"},
    ]
    found, kinds = inspected(tmp_path / "a.jsonl", rows)
    path = tmp_path / "a.jsonl"
    assert (found.num_rows, len(found.problems), found.task, found.is_guessed) == (8, 5, "math", True)
    assert kinds["answer is no text"] == [("2", "the answer is int, and is read as the text '4'")]
    assert [line for line, _ in kinds["cannot be used"]] == ["3", "4", "6"]
    assert kinds["cannot be used"][0][1].startswith("no answer column among problem, id")
    assert kinds["cannot be used"][2][1] == "the answer is a list of 2, not one answer"
    assert kinds["id comes again"] == [("5", f"the id 'a' is also that of {path}:1")]
    assert kinds["answers contradict"] == [("1", f"the same question as {path}:7, with other answers: '2' and '3'")]
    assert kinds["unfilled box"][0][0] == "8"
    assert [line for line, _ in kinds["other columns"]] == ["3", "4", "5"]
    assert kinds["questions come again"] == [
        ("7", "1 rows have a question that came before; this is the first of them")
    ]


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    """Inspection goes on behind them; training and preparation stop there, in the same words."""
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(
        b"\n".join([good, b'{"problem": "cut', b"{'problem'}", good.replace(b"1+1", b"\xe4+1"), b"[1]", good])
    )
    found = inspect_data(str(path))
    assert found.num_rows == 2 == len(found.problems)
    said = {f.where.rpartition(":")[2]: f.what for f in found.findings if f.kind == "cannot be read"}
    assert set(said) == {"2", "3", "4", "5"} and said["2"].startswith("is not valid JSON: Unterminated string")
    assert said["4"] == "is not UTF-8 (byte 14 is 0xe4); convert the file first, e.g. iconv -f latin-1 -t UTF-8"
    for refused in (
        lambda: load_problems(path, task="math"),
        lambda: prepare("math500", source=str(path), out=tmp_path / "o"),
    ):
        with pytest.raises(UserError, match=r"a\.jsonl:2 is not valid JSON"):
            refused()
    assert not (tmp_path / "o").exists()


def test_golds_are_graded_by_their_own_task(tmp_path: Path) -> None:
    """A gold that no answer can match is found, whatever the task; the others are right."""
    rows = [GOOD, {"problem": "?", "answer": "\\boxed{"}, {"problem": "!", "answer": "1/2"}]
    found, _ = inspected(tmp_path / "a.jsonl", rows)
    task = MathTask(num_workers=1)
    assert grade_golds(found, task) == 3
    task.close()
    (wrong,) = by_kind(found.findings)["gold is not right"]
    assert wrong.where.endswith(":2") and "by the task's own measure" in wrong.what
    choice = {"kind": "mcq", "prompt": "Which?\nA: x\nB: y", "answer": "A"}
    found, _ = inspected(tmp_path / "b.jsonl", [choice, choice | {"prompt": "So?\nA: x\nB: y", "answer": "C"}])
    assert found.task == "multiple_choice" and grade_golds(found, MultipleChoiceTask()) == 2
    (wrong,) = by_kind(found.findings)["gold is not right"]
    assert "the gold answer 'C' is none of the options A, B" in wrong.what
    found = inspect_data(real("tooluse"))
    assert found.task == "tool_use" and grade_golds(found, ToolUseTask()) == 34 and found.findings == []


def test_gold_as_answer_reads_the_style(tmp_path: Path) -> None:
    """Where the prompt asks for an answer line, the gold is written on one."""
    found, _ = inspected(tmp_path / "a.jsonl", [{"problem": "1? End with Answer: $Answer", "answer": "2"}])
    assert gold_as_answer(found.problems[0]) == "Answer: 2"


def test_empty_tests(tmp_path: Path) -> None:
    """Of programs: dropped and listed, since every program would pass them."""
    rows = [livecodebench(n) for n in range(3)]
    rows += [livecodebench(7, tests=[]), livecodebench(8, tests=[{"input": "1", "testtype": "stdin"}])]
    rows += [
        livecodebench(9) | {"private_test_cases": "bm90IHpsaWI="},
        livecodebench(10) | {"private_test_cases": None},
    ]
    card = prepare("livecodebench", source=jsonl(tmp_path / "t.jsonl", rows), out=tmp_path / "out")
    assert sum(split.rows for split in card.splits.values()) == 3
    assert [why.partition(" (Error")[0] for _, why in card.dropped] == [
        "private_test_cases is empty: its answers could not be graded",
        "its tests cannot be run: meta.tests[0].output is missing or not text",
        "private_test_cases cannot be read: not base64 of zlib data",
        "no private_test_cases",
    ]
    empty = {"prompt": "Add.", "tests": '{"inputs": [], "outputs": [], "testtype": "stdin"}', "kind": "code"}
    _, kinds = inspected(tmp_path / "b.jsonl", [empty, {"prompt": "Add.", "kind": "code"}])
    assert [what for _, what in kinds["cannot be used"]] == [
        "its tests cannot be run: meta.tests is not a list of tests, or is empty",
        "no tests: prepare the file first (opdkit data prepare; docs/guides/data.md)",
    ]


@pytest.mark.parametrize("megabytes", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_huge_row(megabytes: int, tmp_path: Path) -> None:
    """Read, prepared and read again, in JSON lines and Parquet, and told; the rows around it are as they were."""
    rows = [GOOD, {"problem": "big " * (megabytes * 2**18), "answer": "1", "id": "big"}, GOOD | {"id": "z"}]
    found, kinds = inspected(tmp_path / "a.jsonl", rows)
    assert len(found.problems) == 3 and kinds["huge row"][0][0] == "2"
    assert kinds["huge row"][0][1].endswith("characters: no context window holds them, unless they are tests")
    card = prepare("math500", source=str(tmp_path / "a.jsonl"), out=tmp_path / "out")
    data = load_problems(tmp_path / "out" / "test.parquet", task="math")
    assert (
        data.fingerprint == card.splits["test"].fingerprint
        and len(data.problems[1].messages[0]["content"]) > megabytes * 2**20
    )
    longest = lengths(found, lambda problem: len(problem.messages[0]["content"]))
    assert longest is not None and longest.longest.endswith(":2") and longest.num == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_parquet_file(share: float, tmp_path: Path) -> None:
    """Wherever it is cut: one sentence from every command, and what was prepared before stays."""
    whole = pa.Table.from_pylist([{"problem": f"{n}?", "answer": str(n)} for n in range(3000)])
    path = tmp_path / "a.parquet"
    pq.write_table(whole, path, row_group_size=500)
    prepare("math500", source=str(path), out=tmp_path / "out")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()}
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    options = PrepareOptions(overwrite=True)
    for command in (
        lambda: prepare("math500", source=str(path), out=tmp_path / "out", options=options),
        lambda: inspect_data(str(path)),
        lambda: load_problems(path, task="math"),
    ):
        with pytest.raises(
            UserError, match=r"a\.parquet is not a complete Parquet file \(.*\); copy or download it again"
        ):
            command()
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()} == before


def test_a_damaged_middle_of_a_parquet_file(tmp_path: Path) -> None:
    """The end is whole and promises rows that cannot be read: a sentence, not half a data set."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": f"{n}?" * 50, "answer": str(n)} for n in range(5000)]), path)
    raw = bytearray(path.read_bytes())
    raw[200:2000] = bytes(1800)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="is not a complete Parquet file"):
        prepare("math500", source=str(path), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"meta": "{"}, "meta is not JSON"),
        ({"meta": "[]"}, "meta is not a JSON object"),
        ({"task": "code"}, "the row was prepared for the task 'code', not 'math'"),
        ({"gold": None}, "no answer: gold is empty"),
        ({"id": None}, "the id is missing"),
        ({"prompt": []}, "no question: prompt is empty|there is no turn"),
    ],
)
def test_prepared_rows_that_were_changed_by_hand(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """One sentence each, and the untouched row is used."""
    row = {"id": "1", "task": "math", "gold": "2", "solution": None, "question": "1+1?", "meta": "{}"}
    row["prompt"] = [dict(turn) for turn in TEMPLATES["boxed"].messages("1+1?")]
    data = load_problems(jsonl(tmp_path / "a.jsonl", [row, {**row, **changes}]), task="math")
    assert len(data.problems) == 1 and len(data.dropped) == 1
    assert len(load_problems(jsonl(tmp_path / "b.jsonl", [row]), task="format").problems) == 1, "grades anything"
    assert any(part in data.dropped[0][1] for part in said.split("|"))


def test_verl_rows_that_were_changed_by_hand(tmp_path: Path) -> None:
    """`extra_info.opdkit` that is no longer what was written is told, and the row is not guessed at."""
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    broken = [row | {"extra_info": {"index": "1", "opdkit": text}} for text in ("{", "[]", '{"task": "math"}')]
    data = load_problems(jsonl(tmp_path / "a.jsonl", [row, *broken]), task="math")
    assert len(data.problems) == 1 and all("extra_info.opdkit is not what" in why for _, why in data.dropped)
