"""Every published schema becomes the same `Problem`, every broken source a sentence with its place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdkit.data.readers import Dataset, load_problems
from opdkit.data.schemas.templates import INSTRUCTIONS
from opdkit.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
BOX = "\n\n" + INSTRUCTIONS["boxed"]


def jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def real(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return str(SHARED / name)


def asked(data: Dataset) -> list[str]:
    return [problem.messages[-1]["content"] for problem in data.problems]


GSM8K = {"question": "6 and 7?", "answer": "It is 6+7 = <<6+7=13>>13.\n#### 13"}
MATH = {"problem": "1+1?", "solution": "So \\boxed{1} is wrong, \\boxed{2} is right.", "level": "Level 1"}
VERL = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    "reward_model": {"ground_truth": "\\boxed{4}", "style": "rule"},
    "extra_info": {"index": 17},
    "data_source": "sums",
}


def test_schemas_by_hand(tmp_path: Path) -> None:
    """One row of each published schema, in one file: question, gold, solution, id, meta as a person would say."""
    plain = {"prompt": "Which?\nA: x\nB: y", "system": "Pick one.", "answer": "A", "solution": "x, so A", "idx": 9}
    both = {"problem": "3?", "solution": "\\boxed{9}", "answer": 3.0, "unique_id": "u"}
    data = load_problems(jsonl(tmp_path / "d.jsonl", [GSM8K, MATH, VERL, plain, both]), task="math")
    gsm8k, math, verl, choice, answered = data.problems
    assert gsm8k.messages == ({"role": "user", "content": "6 and 7?" + BOX},)
    assert (gsm8k.gold, gsm8k.solution) == ("13", "It is 6+7 = 13.\n\\boxed{13}"), "no calculator marks; boxed as asked"
    assert (math.gold, math.solution, math.meta["level"]) == ("2", MATH["solution"], "Level 1")
    assert math.meta["instruction"] == BOX.strip()
    assert [turn["content"] for turn in verl.messages] == ["Be brief.", "2+2?" + BOX]
    assert (verl.id, verl.gold, verl.solution, verl.meta["data_source"]) == ("17", "4", None, "sums")
    assert choice.messages[0] == {"role": "system", "content": "Pick one."}
    assert (choice.id, choice.gold, choice.solution) == ("9", "A", "x, so A")
    assert (answered.id, answered.gold, answered.solution) == ("u", "3", "\\boxed{9}"), "an answer column wins"
    assert data.dropped == [] and data.num_duplicate_ids == 0 and all(p.task == "math" for p in data.problems)


def test_file_kinds_agree(tmp_path: Path) -> None:
    """The same rows as JSONL, a JSON list, Parquet, a folder and a saved dataset have one fingerprint."""
    import datasets

    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}", "level": n} for n in range(5)]
    sources = [jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.json"), str(tmp_path / "a.parquet")]
    Path(sources[1]).write_text(json.dumps(rows, indent=2))
    pq.write_table(pa.Table.from_pylist(rows), sources[2])
    folder = tmp_path / "folder" / "nested"
    folder.mkdir(parents=True)
    jsonl(folder / "test-1.jsonl", rows[:2])
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "test-2.parquet")
    jsonl(folder / "train.jsonl", [GSM8K])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"x": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dict")
    sources += [f"{tmp_path / 'folder'}:test", str(tmp_path / "saved"), f"{tmp_path / 'dict'}:x"]
    prints = {source: load_problems(source, task="math").fingerprint for source in sources}
    assert len(set(prints.values())) == 1, prints


def test_csv(tmp_path: Path) -> None:
    """Quotes, commas and line breaks in a field; an empty field is unknown, and its row named by its line."""
    (tmp_path / "a.csv").write_text('question,answer\n"1, 2\nand ""3""?",6\nnothing?,\n')
    data = load_problems(str(tmp_path / "a.csv"), task="t")
    assert [(p.messages[0]["content"], p.gold) for p in data.problems] == [('1, 2\nand "3"?', "6")]
    assert [Path(where).name for where, _ in data.dropped] == ["a.csv:4"]


def test_fingerprint_sees_what_matters(tmp_path: Path) -> None:
    """Another instruction, gold or order is another data set; the same file again is the same."""
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    base = load_problems(source, task="math").fingerprint
    assert load_problems(source, task="math").fingerprint == base
    changed = [
        load_problems(source, task="math", instruction="none"),
        load_problems(jsonl(tmp_path / "b.jsonl", rows[::-1]), task="math"),
        load_problems(jsonl(tmp_path / "c.jsonl", [rows[0], {"question": "b", "answer": "3"}]), task="math"),
    ]
    assert base not in {data.fingerprint for data in changed}


@pytest.mark.parametrize(
    ("task", "instruction", "question", "appended", "style"),
    [
        ("math", "auto", "1+1?", "boxed", None),
        ("math", "auto", "1+1? Put it in \\boxed{}.", None, None),
        ("math", "auto", "1+1? End with Answer: \\boxed{<final_answer>}", None, None),
        ("math", "auto", "1+1? Use `\\boxed`.", None, None),
        ("math", "auto", "1+1? Answer: on its own line", None, "answer_line"),
        ("math", "auto", "Which is in \\boxed{7}? Write Answer: $Answer", None, "answer_line"),
        ("math", "auto", "Add the boxes \\boxed{1} \\boxed{\\frac{1}{2}}", "boxed", None),
        ("math", "none", "1+1?", None, None),
        ("math", "boxed", "1+1? Answer: on its own line", "boxed", None),
        ("math", "boxed", "1+1? In \\boxed{}.", None, None),
        ("math", "answer_line", "1+1?", "answer_line", "answer_line"),
        ("multiple_choice", "auto", "A or B?", None, None),
    ],
)
def test_instruction(
    tmp_path: Path, task: str, instruction: str, question: str, appended: str | None, style: str | None
) -> None:
    """What is asked of the model, and how the grader is told. A box shown in the question is no request for one."""
    source = jsonl(tmp_path / "a.jsonl", [{"question": question, "answer": "2"}])
    problem = load_problems(source, task=task, instruction=instruction).problems[0]
    expected = question if appended is None else f"{question}\n\n{INSTRUCTIONS[appended]}"
    assert problem.messages[-1]["content"] == expected and problem.meta.get("answer_style") == style


def test_ids(tmp_path: Path) -> None:
    """Digest ids come from the question alone; duplicates become unique and are counted, even against a real `7#2`."""
    rows = [
        {"id": name, "question": f"q{place}", "answer": "1"} for place, name in enumerate(["7", "7#2", "7", 7, "8"])
    ]
    data = load_problems(jsonl(tmp_path / "a.jsonl", rows), task="math")
    assert [problem.id for problem in data.problems] == ["7", "7#2", "7#3", "7#4", "8"]
    assert data.num_duplicate_ids == 2
    unnamed = jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "1"}, {"question": "q", "answer": "2"}])
    first, again = (load_problems(unnamed, task="math", instruction=how) for how in ("boxed", "none"))
    assert [p.id for p in first.problems] == [p.id for p in again.problems]
    assert first.problems[1].id == first.problems[0].id + "#2"


def test_limit(tmp_path: Path) -> None:
    """A seeded draw in file order: the same for the same seed, another for another, not just the first rows; a problem
    keeps its place in the draw when rows are added or the limit grows."""
    rows = [{"id": n, "question": f"{n}?", "answer": "1"} for n in range(100)]
    source = jsonl(tmp_path / "a.jsonl", rows)

    def ids(limit: int, seed: int = 0, source: str = source) -> list[int]:
        return [int(p.id) for p in load_problems(source, task="math", limit=limit, seed=seed).problems]

    ten = ids(10)
    assert len(ten) == 10 and ten == sorted(ten) == ids(10) and ten != list(range(10)) and ten != ids(10, seed=1)
    assert set(ten) <= set(ids(20)) and ids(1000) == list(range(100))
    longer = jsonl(tmp_path / "b.jsonl", [*rows, *({"id": n, "question": "?", "answer": "1"} for n in range(100, 110))])
    assert len(set(ids(10, source=longer)) & set(ten)) >= 8


def test_unusable_rows_are_dropped_and_named(tmp_path: Path) -> None:
    """Each row that cannot be used is listed with its line and its reason; the good ones are read."""
    user = {"role": "user", "content": "q"}
    reasons = {
        "no answer: answer is empty": {"question": "q", "answer": " "},
        "no answer: answer is empty ": {"question": "q", "answer": None},
        "the solution holds no": {"problem": "q", "solution": "so it is two"},
        "no answer column among question, label": {"question": "q", "label": "1"},
        "no question: question is empty": {"question": "", "answer": "1"},
        "the prompt is blank": {"question": "  ", "answer": "1"},
        "no question column among text, answer": {"text": "q", "answer": "1"},
        "the answer is a list of 2": {"question": "q", "answer": ["1", "2"]},
        "the answer is bool": {"question": "q", "answer": True},
        "does not end with a user turn": {"prompt": [user, {"role": "assistant", "content": "a"}], "answer": "1"},
        "there is no turn": {"prompt": [], "answer": "1"},
        "a chat turn of the prompt is str": {"prompt": ["q"], "answer": "1"},
        "lacks a role or a content": {"prompt": [{"role": "user"}], "answer": "1"},
        "has tool_calls": {"prompt": [user | {"tool_calls": "[]"}], "answer": "1"},
        "the prompt is int": {"prompt": 5, "answer": "1"},
        "half a surrogate pair": {"question": "\ud800", "answer": "1"},
        "no answer: answer is empty  ": {"question": "q", "answer": float("nan")},
    }
    source = jsonl(tmp_path / "a.jsonl", [GSM8K, *reasons.values(), GSM8K])
    data = load_problems(source, task="math")
    assert len(data.problems) == 2 and len(data.dropped) == len(reasons)
    for line, ((where, why), reason) in enumerate(zip(data.dropped, reasons, strict=True), start=2):
        assert where == f"{source}:{line}" and reason.strip() in why, (line, why)


def test_gold_kinds(tmp_path: Path) -> None:
    """Numbers, lists of one, and (where the task reads it) JSON; an integer that pandas made a float is an integer."""
    answers: list[Any] = [42, 42.0, 0.5, ["\\sqrt{2}"], "$5$", "\\boxed{a}"]
    source = jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": answer} for answer in answers])
    golds = [problem.gold for problem in load_problems(source, task="math").problems]
    assert golds == ["42", "42", "0.5", "\\sqrt{2}", "$5$", "a"]
    calls = jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": [{"name": "f"}, {"name": "g"}]}])
    assert load_problems(calls, task="tool_use").problems[0].gold == '[{"name": "f"}, {"name": "g"}]'


def test_named_columns_and_no_gold(tmp_path: Path) -> None:
    """Any layout can be named, nested columns by dots; rows without an answer are kept when rewards are not needed."""
    row = {"x": {"text": "q"}, "y": "7", "z": 3, "who": "me", "problem": "not this"}
    source = jsonl(tmp_path / "a.jsonl", [row])
    columns = {"prompt": "x.text", "answer": "y", "id": "z", "meta": ["who"]}
    problem = load_problems(source, task="t", columns=columns).problems[0]
    assert (problem.messages[0]["content"], problem.gold, problem.id, problem.meta) == ("q", "7", "3", {"who": "me"})
    bare = jsonl(tmp_path / "b.jsonl", [{"prompt": "q"}, {"problem": "p", "solution": "no box"}])
    kept = load_problems(bare, task="math", require_gold=False).problems
    assert [(p.gold, p.solution) for p in kept] == [(None, None), (None, "no box")]


def test_parquet_values_become_plain(tmp_path: Path) -> None:
    """Dates and the like in meta become text that JSON (and saved rows) can hold; unused columns are not read."""
    import datetime

    table = pa.table(
        {"question": ["q"], "answer": ["1"], "source": [datetime.date(2024, 1, 2)], "r1_solution_1": ["long" * 1000]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.parquet"), task="t").problems[0].meta == {"source": "2024-01-02"}


BROKEN_BYTES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"question": "q", "answer": "1"}\n\n{"question": \n', r"a\.jsonl:3 is not valid JSON: .* at column"),
    ("a.jsonl", b'{"question": "q", "answer": "1"}\n[1]\n', r"a\.jsonl:2 holds a list where each line"),
    ("a.jsonl", b'{"question": "q", "answer": "1"}\nnull\n', r"a\.jsonl:2 holds null"),
    ("a.jsonl", '{"question": "café"}\n'.encode("latin-1"), r"a\.jsonl:1 is not UTF-8 .*0xe9.*latin-1"),
    ("a.jsonl", '{"question": "q"}\n'.encode("utf-16"), r"a\.jsonl:1 is not UTF-8 .*UTF-16"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON that can be read"),
    ("a.jsonl", b'{"answer": ' + b"1" * 5000 + b"}", r"a\.jsonl:1 is not JSON that can be read"),
    ("a.jsonl", b"", "holds no rows"),
    ("a.jsonl", b"\n\n", "holds no rows"),
    ("a.json", b'[{"question": "q",\n"answer" 1}]', r"a\.json line 2 is not valid JSON"),
    ("a.json", b'[{"question": "q", "answer": "1"}, 5]', r"a\.json item 2 is a number"),
    ("a.json", b'{"data": [\n', r"a\.json:1 is not valid JSON.*one list of objects, or one object a line"),
    ("a.parquet", b"", r"a\.parquet is not a complete Parquet file"),
    ("a.parquet", b"PAR1 no", r"a\.parquet is not a complete Parquet file"),
    ("a.tsv", b"question\tanswer\n", r"a\.tsv cannot be read: it should end in \.jsonl, \.json, \.parquet, \.csv"),
    ("a.csv", b"question,answer\nq,1,2\n", r"a\.csv:2 has not as many fields as the header"),
    ("a.csv", b'question,answer\n"q,1\n', r"a\.csv:\d is not CSV that can be read"),
    ("a.csv", "question,answer\ncafé,1\n".encode("latin-1"), r"a\.csv is not UTF-8"),
    ("a.csv", b"question,answer\n", "holds no rows"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_BYTES)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Broken content is refused with file and line in one sentence."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_problems(str(tmp_path / name), task="math")
    assert "\n" not in str(caught.value)


def test_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    """Files saved by Windows editors start with one."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GSM8K).encode() + b"\r\n")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GSM8K]).encode())
    assert len(load_problems(str(tmp_path / "a.jsonl"), task="math").problems) == 1
    assert len(load_problems(str(tmp_path / "a.json"), task="math").problems) == 1


@pytest.mark.parametrize("place", ["half", "middle"])
def test_damaged_parquet(tmp_path: Path, place: str) -> None:
    """Cut in half, and with a damaged page that only shows while reading."""
    path = tmp_path / "a.parquet"
    rows = [{"question": f"{n} " + "x" * 50, "answer": str(n)} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(whole[:half] if place == "half" else whole[:400] + b"\xff" * 200 + whole[600:])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        load_problems(str(path), task="math")


def test_parquet_with_wrong_encoding(tmp_path: Path) -> None:
    """A text column whose bytes are not UTF-8 (pyarrow only notices when the text is looked at)."""
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xe9\xe9")]
    )
    pq.write_table(pa.table({"question": broken, "answer": pa.array(["1"])}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_problems(str(tmp_path / "a.parquet"), task="math")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files suggest near names; folders want a split named rather than mixing train and test."""
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [GSM8K])
    jsonl(folder / "test.jsonl", [GSM8K])
    monkeypatch.chdir(tmp_path)
    cases = {
        "data/trian.jsonl": r"no data at data/trian\.jsonl.*did you mean data/train\.jsonl",
        "data/train.parquet": r"did you mean data/train\.jsonl",
        "dta/train.jsonl": "nor a folder dta",
        "gsm8k": "no data at gsm8k",
        "": "the data source is empty",
        "data": "holds the splits test, train: choose one",
        "data:validation": r"no file of the split 'validation'; it holds test\.jsonl, train\.jsonl",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message):
            load_problems(source, task="math")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder empty holds no"):
        load_problems("empty", task="math")
    with pytest.raises(UserError, match="is one file and has no split"):
        load_problems("data/train.jsonl", task="math", split="train")
    with pytest.raises(UserError, match="keep one of them"):
        load_problems("data:train", task="math", split="test")
    assert len(load_problems("data", task="math", split="train").problems) == 1


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names, configs and splits are passed on; being offline, or a wrong split, is one sentence."""
    import datasets

    made = datasets.Dataset.from_list([GSM8K])
    calls: list[Any] = []

    def load(name: str, config: str | None, split: str | None, revision: str | None) -> Any:
        calls.append((name, config, split) if revision is None else (name, revision, config, split))
        if name == "no/where":
            raise ConnectionError("Couldn't reach 'no/where'\non the Hub")
        return made if split else datasets.DatasetDict({"train": made, "test": made})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    for source in ("openai/gsm8k:main:train", "openai/gsm8k:train"):
        assert load_problems(source, task="math").problems[0].gold == "13"
    assert load_problems("openai/gsm8k", task="math", split="test").problems[0].gold == "13"
    assert calls == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", None, "train"), ("openai/gsm8k", None, "test")]
    assert load_problems("openai/gsm8k@refs/pr/6:main:test", task="math").problems[0].gold == "13"
    assert calls.pop() == ("openai/gsm8k", "refs/pr/6", "main", "test"), "one commit, branch or pull request"
    with pytest.raises(UserError, match=r"holds the splits test, train: choose one, e\.g\. openai/gsm8k:test"):
        load_problems("openai/gsm8k", task="math")
    with pytest.raises(UserError, match=r"the hub dataset no/where could not be loaded: Couldn't reach .* on the Hub"):
        load_problems("no/where", task="math")


def test_no_usable_row(tmp_path: Path) -> None:
    """A wrong schema says what was found and what is accepted."""
    source = jsonl(tmp_path / "a.jsonl", [{"frage": "q", "antwort": "1"}] * 3 + [{"question": "q"}])
    with pytest.raises(UserError) as caught:
        load_problems(source, task="math")
    said = str(caught.value)
    assert "none of its 4 rows" in said and "among frage, antwort (accepted: prompt, problem, question)" in said
    assert f"(first at {source}:1, 3 times)" in said


def test_wrong_arguments(tmp_path: Path) -> None:
    """Unknown instruction or role, a limit that loads nothing, options that a generated world does not have."""
    source = jsonl(tmp_path / "a.jsonl", [GSM8K])
    with pytest.raises(UserError, match="'box' is not known; did you mean 'boxed'"):
        load_problems(source, task="math", instruction="box")
    with pytest.raises(UserError, match="columns: 'anwser' is not known; did you mean 'answer'"):
        load_problems(source, task="math", columns={"anwser": "a"})
    with pytest.raises(UserError, match="limit = 0"):
        load_problems(source, task="math", limit=0)
    with pytest.raises(UserError, match="is generated: split"):
        load_problems("arithmetic:merge-2:train", task="arithmetic", split="train")
    with pytest.raises(UserError, match="is incomplete"):
        load_problems("arithmetic:merge-2", task="arithmetic")


def test_generated_world() -> None:
    """The built-in worlds come through the same door."""
    data = load_problems("arithmetic:merge-4:test", task="arithmetic", limit=5, seed=3)
    assert len(data.problems) == 5 and data.source == "arithmetic:merge-4:test" and len(data.fingerprint) == 64
    assert all(problem.gold and problem.solution for problem in data.problems)


def test_many_rows(tmp_path: Path) -> None:
    """30 000 rows in about a second of processor time: a million takes half a minute, not minutes."""
    rows = ({"problem": f"What is {n} + 1? " * 10, "solution": f"\\boxed{{{n + 1}}}"} for n in range(30_000))
    source = jsonl(tmp_path / "a.jsonl", rows)
    start = time.process_time()
    data = load_problems(source, task="math", limit=10)
    assert len(data.problems) == 10 and time.process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "count", "gold", "style", "boxed"),
    [
        ("gsm8k/train.jsonl", 2000, "72", 0, 2000),
        ("gsm8k:test", 300, "18", 0, 300),
        ("math500/test.parquet", 250, "\\left( 3, \\frac{\\pi}{2} \\right)", 0, 250),
        ("aime24", 30, "204", 0, 30),
        ("dapo_math/train.parquet", 6000, "34", 5980, 0),
        ("deepmath/train.parquet", 4000, "8", 0, 0),
    ],
)
def test_published_files(name: str, count: int, gold: str, style: int, boxed: int) -> None:
    """The real files: every row is read, the first gold is right, and each prompt asks for the answer in one way.

    20 of DAPO's questions (in Chinese) ask for `Answer: \\boxed{<final_answer>}` inside DAPO's own template.
    """
    path, colon, split = name.partition(":")
    data = load_problems(real(path) + colon + split, task="math")
    assert (len(data.problems), data.dropped, data.num_duplicate_ids) == (count, [], 0)
    assert data.problems[0].gold == gold and all(p.gold and "\\boxed" not in p.gold for p in data.problems)
    assert sum(p.meta.get("answer_style") == "answer_line" for p in data.problems) == style
    assert sum(text.endswith(BOX) for text in asked(data)) == boxed
    if name.startswith("gsm8k"):
        assert all(p.solution and "<<" not in p.solution for p in data.problems)


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [("sciknoweval_chemistry/train.jsonl", "multiple_choice", 600), ("tooluse/test.jsonl", "tool_use", 34)],
)
def test_published_files_of_other_tasks(name: str, task: str, count: int) -> None:
    """System prompts become system turns; nothing is appended to their questions."""
    data = load_problems(real(name), task=task)
    assert len(data.problems) == count and data.dropped == []
    assert not any(INSTRUCTIONS["boxed"] in text for text in asked(data))
    assert (len(data.problems[0].messages) == 2) == (task == "multiple_choice")
