"""Files of strangers: a set in two formats, compressed files and bombs, other encodings, links, odd Parquet.

Each is read, or refused in one sentence, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import GPQA, MBPP_FULL, jsonl, livecodebench, real, sciknoweval

from opdkit.data.files import formats
from opdkit.data.inspection import inspect_data
from opdkit.data.prepare import prepare
from opdkit.data.readers import load_problems
from opdkit.data.schemas.templates import INSTRUCTIONS
from opdkit.errors import UserError

VERL = [
    {
        "data_source": "aime25",
        "prompt": [
            {
                "role": "user",
                "content": f"{n}? {INSTRUCTIONS['boxed']}",
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(n)},
        "extra_info": {"index": n, "split": "test"},
    }
    for n in range(4)
]
ROW = {"question": "1+1?", "answer": "2"}
LINE = json.dumps(ROW).encode() + b"\n"


def parquet(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path)
    return path


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ({"test.parquet_first_row.json": json.dumps(VERL[0], indent=1)}, ["test.parquet_first_row.json"]),
        ({"test.json": json.dumps(VERL)}, ["test.json"]),
        ({"test.json": json.dumps(VERL), "test.jsonl": json.dumps(VERL[0])}, ["test.json", "test.jsonl"]),
        ({"test.csv": "question,answer\n1?,2\n", "test.parquet.json": "{"}, ["test.csv", "test.parquet.json"]),
    ],
)
def test_one_format_of_each_file(others: dict[str, str], left: list[str], tmp_path: Path) -> None:
    """As thunlp/OPD publishes its folders: the rows are there once, and what was not read is said by every reader."""
    folder = parquet(tmp_path / "AIME25" / "test.parquet", VERL).parent
    for name, text in others.items():
        (folder / name).write_text(text)
    card = prepare("aime25", source=str(folder), out=tmp_path / "out")
    data, found = load_problems(folder, task="math"), inspect_data(str(folder))
    assert card.splits["test"].rows == len(data.problems) == len(found.problems) == 4
    assert card.splits["test"].num_repeated_rows == 0
    said = [f.where for f in found.findings if f.kind == "file not read"]
    assert [Path(where).name for where in said] == left
    for sentences in (card.files_left_out, data.files_left_out):
        assert [Path(s.partition(" is not read")[0]).name for s in sentences] == left
        assert all("rows of test.parquet beside it; to read it instead, name it" in s for s in sentences)
    assert load_problems(folder / "test.parquet", task="math").files_left_out == []


def test_other_files_stay_apart(tmp_path: Path) -> None:
    """Splits, shards and folders are other files, whatever their formats."""
    jsonl(tmp_path / "d" / "test-1.jsonl", [ROW])
    jsonl(tmp_path / "d" / "test-10.jsonl", [ROW])
    parquet(tmp_path / "d" / "test-2.parquet", [ROW])
    jsonl(tmp_path / "d" / "sub" / "test-2.jsonl", [ROW])
    data = load_problems(tmp_path / "d", task="math")
    assert len(data.problems) == 4 and data.files_left_out == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_gzip(name: str, tmp_path: Path) -> None:
    """The same problems as unpacked; in a folder once."""
    texts = {"a.jsonl": LINE, "a.json": json.dumps([ROW]).encode(), "a.csv": b"question,answer\n1+1?,2\n"}
    (tmp_path / name).write_bytes(texts[name])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(texts[name]))
    whole, packed = (load_problems(tmp_path / n, task="math") for n in (name, f"{name}.gz"))
    assert packed.fingerprint == whole.fingerprint and len(packed.problems) == 1
    folder = load_problems(tmp_path, task="math")
    assert folder.fingerprint == whole.fingerprint and len(folder.files_left_out) == 1


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.gz": (gzip.compress(os.urandom(3000).hex().encode())[:900], "is not a complete gzip file"),
    "crc.jsonl.gz": (gzip.compress(LINE)[:-8] + b"12345678", "is not a complete gzip file"),
    "no.jsonl.gz": (LINE, "is not a complete gzip file"),
    "a.parquet.gz": (b"x", "unpack it first"),
    "a.jsonl.zst": (b"x", "unpack it first"),
    "utf16le.jsonl": ((LINE * 3).decode().encode("utf-16-le"), "holds NUL bytes: it may be UTF-16; convert"),
    "utf16.csv": ("question,answer\n1?,2\n".encode("utf-16"), "is not UTF-8 .*iconv -f UTF-16"),
    "utf16le.csv": ("question,answer\n1?,2\n".encode("utf-16-le"), "holds NUL bytes: it may be UTF-16"),
    "nul.jsonl": (LINE + bytes(500) + b"\n", r"nul\.jsonl:2 holds NUL bytes: it was not written completely"),
    "empty.jsonl": (b"\n" * 1_000_002, "has more than 1,000,000 empty lines"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_texts(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_problems(tmp_path / name, task="math")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["line.jsonl.gz", "rows.jsonl.gz", "list.json.gz", "field.csv.gz", "lying.jsonl.gz"])
def test_gzip_bombs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB from 40 kB, with a bound of 4 MB: refused before it is unpacked, also where its end lies about its size."""
    monkeypatch.setattr(formats, "UNPACKED_BYTES", 4 << 20)
    unit = {"list": b"[" + b" " * (1 << 20), "rows": LINE * 30_000}.get(name.partition(".")[0], b"a" * (1 << 20))
    packed = gzip.compress(unit * 40)
    (tmp_path / name).write_bytes(packed[:-4] + b"\1\0\0\0" if name.startswith("lying") else packed)
    started = time.process_time()
    with pytest.raises(UserError, match=r"over 50 times its size, as no data set does|is not valid JSON"):
        load_problems(tmp_path / name, task="math")
    assert time.process_time() - started < 3


def test_lines_and_lists_have_a_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(formats, "MAX_LIST_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(LINE + b"a" * (3 << 20))
    (tmp_path / "a.json").write_bytes(b"[" + b" " * (3 << 20) + b"]")
    with pytest.raises(UserError, match=r"a\.jsonl:2 has more than 1 MiB"):
        load_problems(tmp_path / "a.jsonl", task="math")
    with pytest.raises(UserError, match="is a JSON list of more than 1 MiB"):
        load_problems(tmp_path / "a.json", task="math")


def test_links_and_folders(tmp_path: Path) -> None:
    """Links in a circle or to nothing, folders and pipes with a file's name; a link to the folder itself ends."""
    (tmp_path / "one.jsonl").symlink_to("two.jsonl")
    (tmp_path / "two.jsonl").symlink_to("one.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, said in {
        "one.jsonl": "a link to nothing, or in a circle",
        "gone.jsonl": "a link to nothing",
        "folder.jsonl": "holds no .parquet, .jsonl",
        "pipe.jsonl": "^[^:]*pipe.jsonl is no file and no folder",
        "x" * 5000: "File name too long",
    }.items():
        with pytest.raises(UserError, match=said):
            load_problems(tmp_path / name, task="math")
    inner = tmp_path / "inner"
    jsonl(inner / "a.jsonl", [ROW])
    (inner / "self").symlink_to(".")
    (inner / "b.jsonl").mkdir()
    assert len(load_problems(inner, task="math").problems) == 1
    (inner / "c.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"c\.jsonl is no regular file"):
        load_problems(inner, task="math")


def test_odd_parquet(tmp_path: Path) -> None:
    """No rows, no columns, holes, other types, lists of millions, more rows than bytes, a dictionary of long texts."""
    text = pa.string()
    turns = pa.array([[{"role": "user", "content": "x"}] * 400_000])
    one_text = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * (1 << 20)]))
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["x"])).cast(text)
    tables = {
        "zero": (pa.table({"question": pa.array([], text)}), "holds no rows"),
        "bare": (pa.table({}), "holds no rows"),
        "null": (pa.table({"question": pa.nulls(9), "answer": pa.nulls(9)}), "none of its 9 rows.*question is empty"),
        "types": (pa.table({"question": [1, 2], "answer": [b"\xff", b"1"]}), "the prompt is int"),
        "turns": (pa.table({"prompt": turns}), r"row 1 holds 1,200,001 values .* as no problem does"),
        "rows": (pa.table({"question": many}), "says that it holds 1,000,000 rows"),
        "dictionary": (pa.table({"question": one_text, "answer": ["1"] * 3000}), "over 50 times its size"),
    }
    for name, (table, said) in tables.items():
        with pytest.raises(UserError, match=said) as caught:
            load_problems(parquet(tmp_path / f"{name}.parquet", table), task="math")
        assert "\n" not in str(caught.value)
    half = pa.table({"question": ["1?", None] * 5, "answer": ["1", "2"] * 5})
    data = load_problems(parquet(tmp_path / "half.parquet", half), task="math")
    assert len(data.problems) == 5 and len(data.dropped) == 5


def test_rows_nested_deeply(tmp_path: Path) -> None:
    """Deeper than Python's calls go, though not its JSON reader: dropped or read, never a traceback."""
    deep = "[" * 900 + "]" * 900
    lines = [f'{{"question": "q", "answer": "1", "{name}": {deep}}}' for name in ("x", "source", "solution", "prompt")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, LINE.decode()]))
    found = inspect_data(str(tmp_path / "a.jsonl"))
    assert found.num_rows == 5 and len(found.problems) >= 2
    assert len(load_problems(tmp_path / "a.jsonl", task="math").problems) >= 2


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (GPQA, "multiple_choice"),
        (sciknoweval(3), "multiple_choice"),
        (MBPP_FULL, "code"),
        (livecodebench(1), "code"),
    ],
)
def test_raw_benchmarks_are_inspected(row: dict[str, Any], task: str, tmp_path: Path) -> None:
    """As prepare reads them, with the same prompt."""
    found = inspect_data(jsonl(tmp_path / "a.jsonl", [row]))
    assert (found.task, found.is_guessed, len(found.problems)) == (task, False, 1) and found.findings == []
    assert found.columns[0].name.startswith("raw, read as opdkit data prepare")


def test_raw_humaneval_is_inspected(tmp_path: Path) -> None:
    found = inspect_data(real("humaneval"))
    card = prepare("humaneval", source=real("humaneval"), out=tmp_path / "out")
    prepared = load_problems(tmp_path / "out" / "test.parquet", task="code").problems
    assert found.task == "code" and len(found.problems) == card.splits["test"].rows == 82
    assert [(p.id, p.messages) for p in found.problems] == [(p.id, p.messages) for p in prepared]


def test_conversations(tmp_path: Path) -> None:
    """ShareGPT, OpenAI's messages and Alpaca: what is asked, and the answer behind it as solution."""
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "1?"},
                           {"from": "gpt", "value": "a"}, {"from": "human", "value": "2?"},
                           {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "3?"}], "system": "S"},
        {"instruction": "Add.", "input": "1+1", "output": "So \\boxed{2}", "history": [["0?", "0"]]},
        {"instruction": "Say hi.", "input": "", "output": ""},
    ]  # fmt: skip
    found = load_problems(jsonl(tmp_path / "a.jsonl", rows), task="none", require_gold=False).problems
    turns = [[(turn["role"][0], turn["content"]) for turn in problem.messages] for problem in found]
    assert turns == [
        [("s", "S"), ("u", "1?"), ("a", "a"), ("u", "2?")],
        [("s", "S"), ("u", "3?")],
        [("u", "0?"), ("a", "0"), ("u", "Add.\n1+1")],
        [("u", "Say hi.")],
    ]
    assert [(p.solution, p.gold) for p in found] == [("b", None), (None, None), ("So \\boxed{2}", "2"), (None, None)]
    bad = [
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]},
        {"messages": [{"role": "user", "content": "q"}], "tools": "[{}]"},
        {"instruction": "q", "history": "none"},
    ]
    data = load_problems(jsonl(tmp_path / "b.jsonl", [*rows, *bad]), task="none", require_gold=False)
    said = ["there is no turn", "the last turn is the function_call's", "has tools", "history is not a list of pairs"]
    assert all(part in why for part, (_, why) in zip(said, data.dropped, strict=True))


def test_prompts_alone_are_inspected(tmp_path: Path) -> None:
    """They are problems that nobody grades."""
    found = inspect_data(jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "r"}]))
    assert (found.task, found.is_guessed, len(found.problems)) == ("none", True, 2)
