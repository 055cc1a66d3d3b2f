"""Published data sets in, problems out: the prompts to the letter, the golds and the splits of the published work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from published_sets import (
    GPQA,
    MATH_ROWS,
    MBPP_FULL,
    MBPP_SANITIZED,
    jsonl,
    livecodebench,
    real,
    sciknoweval,
)

from opdkit.data.prepare import Card, PrepareOptions, hub_commit, prepare
from opdkit.data.prepared import FORMATS
from opdkit.data.readers import fingerprint, load_problems
from opdkit.data.schemas.templates import INSTRUCTIONS, TEMPLATES, bare_question, spaceless
from opdkit.data.sets import DATA_SETS, Hub
from opdkit.errors import UserError
from opdkit.types import Problem

# Real samples in their published format: set -> split -> rows.
SAMPLES = {
    "dapo_math": {"train": 6000},
    "deepmath": {"train": 4000},
    "math500": {"test": 250},
    "aime24": {"test": 30},
    "gsm8k": {"test": 300, "train": 2000},
    "humaneval": {"test": 82},
    "tooluse": {"test": 34},
    "sciknoweval_chemistry": {"test": 210, "train": 600},
}


Sample = Callable[[str], tuple[Card, dict[str, list[Problem]]]]


def made(name: str, source: str, out: Path, **options: Any) -> tuple[Card, dict[str, list[Problem]]]:
    card = prepare(name, source=source, out=out, options=PrepareOptions(**options))
    return card, {
        split: load_problems(out / f"{split}.parquet", task=card.task, instruction="none").problems
        for split in card.splits
    }


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A real sample, prepared with the defaults; once for all tests."""

    @cache
    def sample(name: str) -> tuple[Card, dict[str, list[Problem]]]:
        return made(name, real(name), tmp_path_factory.mktemp(name))

    return sample


@pytest.mark.parametrize("name", SAMPLES)
def test_real_samples(sample: Sample, name: str) -> None:
    """Every row of every sample is used, and the file reads back as what was prepared."""
    card, problems = sample(name)
    assert card.dropped == [] and {split: found.rows for split, found in card.splits.items()} == SAMPLES[name]
    for split, written in card.splits.items():
        assert fingerprint(problems[split]) == written.fingerprint
    saved = json.loads((Path(card.splits[split].path).parent / "prepared.json").read_text())
    assert {split: entry["rows"] for split, entry in saved["splits"].items()} == SAMPLES[name]


@pytest.mark.parametrize("name", ["aime24", "humaneval", "tooluse", "sciknoweval_chemistry"])
@pytest.mark.parametrize("format", FORMATS)
def test_both_formats_read_back(sample: Sample, name: str, format: str, tmp_path: Path) -> None:
    """With nothing lost and nothing added: the template already asks for what the task needs."""
    card, _ = sample(name)
    prepare(name, source=real(name), out=tmp_path, options=PrepareOptions(format=format))
    for split, written in card.splits.items():
        data = load_problems(tmp_path / f"{split}.parquet", task=card.task)
        assert (data.dropped, data.num_duplicate_ids, data.fingerprint) == ([], 0, written.fingerprint)


@pytest.mark.parametrize("name", ["dapo_math", "deepmath", "tooluse", "sciknoweval_chemistry"])
def test_published_prompts_to_the_letter(sample: Sample, name: str) -> None:
    """The default template gives back the published prompts, character by character; system turns too."""
    _, problems = sample(name)
    for split, found in problems.items():
        path = Path(real(name)) / f"{split}.parquet"
        if path.exists():
            rows = pq.read_table(path).to_pylist()
            prompts = [row["prompt"][-1]["content"] for row in rows]
            systems: list[str | None] = [None] * len(rows)
        else:
            rows = [json.loads(line) for line in (Path(real(name)) / f"{split}.jsonl").read_text().splitlines()]
            prompts, systems = [row["prompt"] for row in rows], [row["system"] for row in rows]
        ours = [problem.messages[-1]["content"] for problem in found]
        assert ours == prompts
        assert [p.messages[0]["content"] if len(p.messages) == 2 else None for p in found] == systems


def test_one_template_for_all_splits(tmp_path: Path) -> None:
    """Every template is written around the bare question, in every split alike, and is found and taken off again."""
    source = real("gsm8k") + "/test.jsonl"
    both = tmp_path / "gsm8k"
    both.mkdir()
    for split in ("train", "test"):
        (both / f"{split}.jsonl").write_text("".join(Path(source).read_text().splitlines(keepends=True)[:40]))
    source = str(both)
    bare = made("gsm8k", source, tmp_path / "bare", instruction="none")[1]
    for name in DATA_SETS["gsm8k"].templates:
        template = TEMPLATES[name]
        _, problems = made("gsm8k", source, tmp_path / name, instruction=name)
        for split, found in problems.items():
            for problem, plain in zip(found, bare[split], strict=True):
                question = plain.messages[0]["content"]
                assert problem.messages == template.messages(question) and problem.id == plain.id
                assert bare_question(problem.messages[0]["content"]).question == question
                assert problem.meta.get("answer_style", "boxed") == (template.answer_style or "boxed")


def test_unfilled_box(tmp_path: Path) -> None:
    """DAPO-Math-17k-processed asks for a literal `\\boxed{{}}` in every row: it is mended and counted, and the
    question is the one of the original file."""
    asked = INSTRUCTIONS["boxed"].replace("{}", "{{}}")
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n}? {asked}"}], "reward_model": {"ground_truth": str(n)}}
        for n in range(3)
    ]
    card, problems = made("dapo_math", jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", instruction="boxed_inline")
    assert card.num_unfilled_boxes == 3
    assert problems["train"][2].messages[0]["content"] == f"What is 2? {INSTRUCTIONS['boxed']}"


def test_repeats_and_contradictions(sample: Sample, tmp_path: Path) -> None:
    """The sample of DAPO-Math: 194 rows repeat a question, white space aside, and one question has the golds 64 and 6.
    On demand one row of each is kept, and none of the contradictory one. Equal numbers do not contradict."""
    card, _ = sample("dapo_math")
    written = card.splits["train"]
    assert (written.rows, written.num_repeated_rows, written.num_repeated_questions) == (6000, 194, 193)
    assert [found["golds"] for found in written.contradictions] == [("64", "6")]
    card, problems = made("dapo_math", real("dapo_math"), tmp_path / "once", drop_repeats=True)
    assert (
        card.splits["train"].rows
        == 6000 - 195
        == len({spaceless(problem.messages[0]["content"]) for problem in problems["train"]})
    )
    rows = [{"problem": "q?", "answer": gold} for gold in ("1/2", "0.5", "\\frac{1}{2}")] + [{"problem": " q?\n"}]
    card, _ = made("deepmath", jsonl(tmp_path / "a.jsonl", rows), tmp_path / "same")
    assert card.splits["train"].num_repeated_rows == 2 and card.splits["train"].contradictions == []
    assert card.dropped[0][0].endswith("a.jsonl:4")


@pytest.mark.parametrize("name", MATH_ROWS)
def test_raw_mathematical_rows(name: str, tmp_path: Path) -> None:
    """One row in each set's documented hub schema. Proves nothing of the other rows on the hub."""
    row, gold, solution = MATH_ROWS[name]
    card, problems = made(name, jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "out")
    (problem,) = problems[DATA_SETS[name].split]
    question = row.get("problem") or row["question"]
    assert problem.messages == TEMPLATES[DATA_SETS[name].template].messages(question)
    assert (problem.gold, problem.solution, card.dropped) == (gold, solution, [])


def test_sciknoweval_is_split_as_published(sample: Sample, tmp_path: Path) -> None:
    """The real test set is the first 210 of numpy's permutation of 2100 with seed 42, in that order, and the real
    training rows follow in order: SDPO's 90/10 split. The preparer makes that split of raw rows, and its filter takes
    level 3 of one domain."""
    order = np.random.default_rng(42).permutation(2100)
    _, real_problems = sample("sciknoweval_chemistry")
    assert [int(problem.id) for problem in real_problems["test"]] == order[:210].tolist()
    places = {number: place for place, number in enumerate(order[210:].tolist())}
    trained = [places[int(problem.id)] for problem in real_problems["train"]]
    assert trained == sorted(trained)
    rows = [sciknoweval(n) for n in range(935)]
    other = [
        sciknoweval(0, domain="Biology"),
        sciknoweval(0, type="open-ended-qa"),
        sciknoweval(0, details={"level": "L1"}),
    ]
    card, problems = made("sciknoweval_physics", jsonl(tmp_path / "rows.jsonl", other + rows), tmp_path / "out")
    assert (len(problems["train"]), len(problems["test"]), card.num_left_out) == (841, 94, 3), "the published sizes"
    order = np.random.default_rng(42).permutation(935)
    assert [int(problem.id) for problem in problems["test"]] == order[:94].tolist()
    first = problems["test"][0]
    number = int(first.id)
    assert first.messages[-1]["content"].startswith(f"Which is {number}?\n\nA: {number}\nB: {number + 1}\n")
    assert first.messages[-1]["content"].endswith("\nPlease reason step by step.") and first.gold == "A"
    assert first.meta["options"] == {letter: str(number + n) for n, letter in enumerate("ABCD")}


def test_a_copy_of_the_hub_has_the_hubs_names(tmp_path: Path) -> None:
    """AIME24's only file is called train there, and is a test all the same; training sets stay what they are."""
    for name, split in (("aime24", "test"), ("gsm8k", "train")):
        row = {"problem": "1+1?", "question": "1+1?", "answer": "#### 2"}
        jsonl(tmp_path / "copies" / name / "train-00000-of-00001.jsonl", [row])
        assert list(made(name, str(tmp_path / "copies" / name), tmp_path / name)[1]) == [split]


def test_gpqa_options_are_drawn_once(tmp_path: Path) -> None:
    """The right answer, always first in the file, stands at a place drawn from the record's id: the same each time,
    and each letter comes up."""
    rows = [GPQA | {"Record ID": f"rec{n}", "Question": f"Which, {n}?"} for n in range(60)]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    problems, again = (made("gpqa", source, tmp_path / folder)[1]["test"] for folder in ("one", "two"))
    assert problems == again and all(p.meta["options"][p.gold] == "right" for p in problems if p.gold)
    assert {problem.gold for problem in problems} == set("ABCD")
    assert f"\n{problems[0].gold}: right" in problems[0].messages[-1]["content"]


def test_livecodebench(tmp_path: Path) -> None:
    """Dates, packed tests, signature without self; by default no problem is in both splits, and the published split
    trains on half of the tests of every problem it evaluates."""
    rows = [livecodebench(n, functional=n % 2 == 0) for n in range(10)]
    rows += [livecodebench(90, date="2025-01-31"), livecodebench(91, date="2025-05-01"), livecodebench(92, tests=[])]
    source = jsonl(tmp_path / "test6.jsonl", rows)
    card, problems = made("livecodebench", source, tmp_path / "problem")
    train, test = ({problem.id for problem in problems[split]} for split in ("train", "test"))
    assert (card.num_outside_dates, len(train | test), train & test) == (
        2,
        10,
        set(),
    ) and card.num_shared_questions == 0
    assert [why for _, why in card.dropped] == ["private_test_cases is empty: its answers could not be graded"]
    functional = next(p for p in problems["train"] + problems["test"] if p.meta["style"] == "functional")
    assert "```python\ndef plus(n: int) -> int:\n```" in functional.messages[0]["content"]
    assert (functional.meta["entry_point"], functional.meta["time_limit_s"], functional.gold) == ("plus", 6.0, None)
    assert functional.messages[0]["content"].startswith("You are a coding expert.")
    card, problems = made("livecodebench", source, tmp_path / "shared", split="shared", format="verl")
    assert [p.id for p in problems["train"]] == [p.id for p in problems["test"]] and card.num_shared_questions == 10
    for half, whole in zip(problems["train"], problems["test"], strict=True):
        assert len(half.meta["tests"]) == 2 and len(whole.meta["tests"]) == 4
        assert all(test in whole.meta["tests"] for test in half.meta["tests"])
    card, _ = made("livecodebench", source, tmp_path / "dates", since="2025-01-01", until="2026-01-01", test_share=0.1)
    assert (card.num_outside_dates, sum(written.rows for written in card.splits.values())) == (0, 12)


def test_published_code_files(tmp_path: Path) -> None:
    """SDPO's intermediate rows and its verl rows: the prompt and the tests are found where they are."""
    tests = {"inputs": ["1\n"], "outputs": ["2"], "testtype": "stdin", "fn_name": None, "time_limit": 6}
    prompt = TEMPLATES["coding_expert"].before + "Add one."
    plain = {"idx": 3, "kind": "code", "dataset": "livecodebench", "prompt": prompt, "tests": json.dumps(tests)}
    verl = {
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "code", "ground_truth": json.dumps(tests)},
        "extra_info": {"index": "3"},
    }
    for place, row in enumerate((plain, verl)):
        source = jsonl(tmp_path / str(place) / "train.jsonl", [row])
        _, problems = made("livecodebench", source, tmp_path / f"out{place}")
        (problem,) = problems["train"]
        assert problem.messages[0]["content"] == prompt and problem.id == "3"
        assert problem.meta["tests"] == [{"input": "1\n", "output": "2"}] and problem.meta["time_limit_s"] == 6
        assert load_problems(source, task="code").problems[0].meta["tests"] == problem.meta["tests"]


def test_mbpp(tmp_path: Path) -> None:
    """Both configurations; the function is the first one that the tests call and the code defines."""
    _, problems = made("mbpp", jsonl(tmp_path / "test.jsonl", [MBPP_FULL, MBPP_SANITIZED]), tmp_path / "out")
    full, sanitized = problems["test"]
    assert (full.meta["entry_point"], sanitized.meta["entry_point"]) == ("add_one", "root")
    assert sanitized.meta["starter"] == "import math\n" and len(full.meta["tests"]) == 2
    assert "should pass these tests:\n\nassert add_one(1) == 2\nassert" in full.messages[0]["content"]


@pytest.mark.slow
def test_prepared_programs_pass_their_tests(tmp_path: Path) -> None:
    """HumanEval's 82 canonical solutions and MBPP's two, as prepared, through the sandbox; of LiveCodeBench, a script
    and a `class Solution` as its starter code has it, and a function as its prompt does; a wrong one of each fails."""
    from opdkit.tasks.code.task import CodeTask

    _, problems = made("humaneval", real("humaneval"), tmp_path / "h")
    _, more = made("mbpp", jsonl(tmp_path / "test.jsonl", [MBPP_FULL, MBPP_SANITIZED]), tmp_path / "m")
    rows = [livecodebench(2), livecodebench(4, functional=True)]
    _, lcb = made("livecodebench", jsonl(tmp_path / "test6.jsonl", rows), tmp_path / "l")
    script, function = sorted((*lcb["train"], *lcb["test"]), key=lambda problem: problem.id)
    answers = [(problem, problem.solution or "") for problem in problems["test"] + more["test"]]
    answers += [(script, "```python\nprint(int(input()) + 2)\n```")]
    answers += [(function, "```python\nclass Solution:\n    def plus(self, n: int) -> int:\n        return n + 4\n```")]
    answers += [(function, "```python\ndef plus(n):\n    return n + 4\n```")]
    wrong = [(script, "```python\nprint(2)\n```"), (function, "```python\ndef plus(n):\n    return n\n```")]
    task = CodeTask()
    grades = task.grade(answers + wrong)
    task.close()
    assert [grade.score for grade in grades] == [1.0] * 87 + [0.0] * 2


def test_hub_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit a name stands at is asked for, loaded and written down; a commit is taken at its word. With a hub of
    our own in place of the real one, which cannot be reached from here."""
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    class Api:
        def dataset_info(self, name: str, revision: str) -> Any:
            asked.append((name, revision))
            return type("Info", (), {"sha": "f" * 40})

    def load(name: str, config: str | None, split: str | None, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([{"question": "6+7?", "answer": "#### 13"}])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    card = prepare("gsm8k", source="hub", out=tmp_path / "out")
    assert asked[0] == ("openai/gsm8k", "main") and card.commit == "f" * 40
    assert asked[1:] == [("openai/gsm8k", "main", split, "f" * 40) for split in ("train", "test")]
    assert hub_commit(Hub(id="a/b"), "0123456789" * 4) == "0123456789" * 4 and len(asked) == 3


def test_refusals(tmp_path: Path) -> None:
    """One sentence each, and what stood in the folder still stands there."""
    source = jsonl(tmp_path / "train.jsonl", [{"problem": "q?", "answer": "1"}])
    out = tmp_path / "out"
    made("deepmath", source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code = jsonl(tmp_path / "test.jsonl", [livecodebench(n) for n in range(2)])
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("deepmaths", source, {}, "there is no preparer for 'deepmaths'; did you mean deepmath"),
        ("deepmath", source, {}, "was prepared already; name another --out, or give --overwrite"),
        ("deepmath", source, {"format": "csv"}, "--format csv is not known; choose from opdkit, verl"),
        (
            "deepmath",
            source,
            {"instruction": "box"},
            "--instruction box does not fit deepmath; choose from auto, boxed",
        ),
        ("deepmath", source, {"split": "shared"}, "--split shared divides the tests of programs"),
        ("deepmath", source, {"test_share": 0.1}, "--test-share does not apply: deepmath is split as published"),
        ("deepmath", source, {"since": "2025-01-01"}, "--since and --until do not apply"),
        ("deepmath", source, {"revision": "main"}, "--revision is for --source hub"),
        ("tooluse", "hub", {}, "is on no hub that its authors name"),
        ("tooluse", source, {}, "no row that can be used for tooluse; its only row"),
        ("livecodebench", code, {"since": "2025-02-30"}, "--since 2025-02-30 is not a date; write it as YYYY-MM-DD"),
        ("livecodebench", code, {"since": "2026-01-01"}, "--since must come before --until"),
        ("livecodebench", code, {"since": "2024-01-01", "until": "2024-02-01"}, "all 2 rows are outside of the dates"),
        ("livecodebench", code, {"test_share": 0.9}, "2 problems cannot be split with a test share of 0.9"),
        (
            "sciknoweval_biology",
            jsonl(tmp_path / "b.jsonl", [sciknoweval(0)]),
            {},
            "none of its 1 rows is of sciknoweval_b",
        ),
    ]
    for name, where, options, said in cases:
        with pytest.raises(UserError, match=said.replace("(", "\\(")):
            prepare(name, source=where, out=out, options=PrepareOptions(overwrite="already" not in said, **options))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before, name
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.parquet").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds train\.parquet, which opdkit did not prepare"):
        prepare("deepmath", source=source, out=tmp_path / "mine", options=PrepareOptions(overwrite=True))


def test_overwriting_removes_only_its_own(tmp_path: Path) -> None:
    """A file of a split that is no longer made goes; a file that somebody else put there stays."""
    both = tmp_path / "both"
    for split in ("train", "test"):
        jsonl(both / f"{split}.jsonl", [{"problem": f"{split}?", "answer": "1"}])
    made("gsm8k", str(both), tmp_path / "out")
    (tmp_path / "out" / "mine.parquet").write_bytes(b"precious")
    options = PrepareOptions(overwrite=True)
    prepare("gsm8k", source=str(both / "test.jsonl"), out=tmp_path / "out", options=options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine.parquet",
        "prepared.json",
        "test.parquet",
    ]
    assert replace(options, overwrite=False) == PrepareOptions()
