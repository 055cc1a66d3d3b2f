"""`opdkit compare`: pairs data sets and problems, and says what it leaves out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.cli.tables import comparison_tables
from opdkit.errors import UserError
from opdkit.evaluation.compare_runs import compare_runs
from opdkit.recipe import Recipe
from opdkit.run.answer_sets import read_answers
from opdkit.run.rows import load_rows
from opdkit.run.stored_answers import Store, StoredAnswer, problems_path, write_problems, write_result
from opdkit.tasks.arithmetic import ArithmeticTask
from opdkit.training.loop import train
from opdkit.types import Problem

MEASURED = {"avg_at_n": {"value": 0.5}}


def problem(name: str, question: str = "?", gold: str = "7") -> Problem:
    return Problem(id=name, task="arithmetic", messages=({"role": "user", "content": question},), gold=gold)


def result(
    folder: Path,
    problems: Sequence[Problem],
    reward: float,
    data: str = "set",
    parsed: str | None = "7",
    **asked: Any,
) -> Path:
    identity = {"data": [data], "task": "arithmetic", "fingerprint": f"{problems}", "temperature": 1.0, **asked}
    store = Store(folder / f"{data}.jsonl", identity)
    write_problems(problems_path(folder, data), problems)
    store.append(
        [
            StoredAnswer(
                problem_id=p.id, sample_id=0, reward=reward, parsed=parsed, finish="stop", num_tokens=3, text="7"
            )
            for p in problems
        ]
    )
    return folder


def test_problems_that_differ_are_counted_and_said(tmp_path: Path) -> None:
    """One more problem on a side, one with another gold answer, another temperature, a data set of one side only."""
    a = result(tmp_path / "a", [problem("p"), problem("q"), problem("r")], 0.0)
    b = result(tmp_path / "b", [problem("p"), problem("q", gold="8"), problem("s"), problem("t")], 1.0, temperature=0.6)
    result(a, [problem("p")], 0.0, data="other")
    write_result(a, {"eval": {"set": MEASURED, "other": MEASURED}})
    found = compare_runs(str(a), str(b))
    assert found["notes"] == ["other is only in A", "B is an evaluation that did not finish"]
    assert found["sets"]["set"]["problems"] == 1
    assert found["sets"]["set"]["metrics"]["avg"]["value"] == 1.0
    assert found["sets"]["set"]["notes"] == [
        "1 problems have the same id but another question or gold answer: left out",
        "A was sampled with temperature = 1.0, B with 0.6",
        "1 problems are only in A: not compared",
        "3 problems are only in B: not compared",
    ]
    json.dumps(found, allow_nan=False)


def test_one_fingerprint_under_two_paths_is_one_data_set(tmp_path: Path) -> None:
    a = result(tmp_path / "a", [problem("p"), problem("q")], 0.0, data="here")
    b = result(tmp_path / "b", [problem("p"), problem("q")], 1.0, data="there")
    assert compare_runs(str(a), str(b))["sets"]["here"]["notes"] == []


@pytest.mark.parametrize(("episode", "parsed", "rates"), [
    ({"environment": "its own"}, None, [None, None]),  # an environment that grades and reads no final answer
    ({"environment": "calculator"}, "7", [0.0, 1.0]),  # the task reads them, and A ends with none
    (None, None, [0.0, 0.0]),
])  # fmt: skip
def test_the_share_of_final_answers_is_unknown_where_nobody_reads_them(
    episode: dict[str, str] | None, parsed: str | None, rates: list[float | None], tmp_path: Path
) -> None:
    problems = [problem("p"), problem("q")]
    a = result(tmp_path / "a", problems, 0.0, parsed=None, episode=episode)
    b = result(tmp_path / "b", problems, float(parsed is not None), parsed=parsed, episode=episode)
    found = compare_runs(str(a), str(b))["sets"]["set"]["metrics"]["format_rate"]
    assert [found["before"], found["after"]] == rates
    assert found["value"] == (None if None in rates else rates[1] - rates[0])  # type: ignore[operator]


def test_runs_hold_their_evaluations(recipe: Any, console: Console, tmp_path: Path) -> None:
    """A training run is compared with itself before training and with another run; the numbers are those it wrote."""
    evaluation = ("eval.data=arithmetic:merge-2:test", "eval.limit=10", "eval.samples=2", "train.steps=2")
    runs: dict[str, Recipe] = {seed: recipe("sft", *evaluation, f"seed={seed}", f"name=r{seed}") for seed in "12"}
    for one in runs.values():
        train(one, resume=False, overwrite=False, console=console)
    one, two = (str(run.run_dir) for run in runs.values())
    found = compare_runs(f"{one}@before", one)["sets"]["arithmetic:merge-2:test"]
    written = json.loads((Path(one) / "summary.json").read_text())["eval"]
    for key, side in (("student_before", "before"), ("student_after", "after")):
        avg = written[key]["arithmetic:merge-2:test"]["avg_at_n"]["value"]
        assert found["metrics"]["avg"][side] == pytest.approx(avg)  # type: ignore[literal-required]
    assert compare_runs(one, two)["sets"]["arithmetic:merge-2:test"]["problems"] == 10
    with pytest.raises(UserError, match="no evaluation 'teacher'; it has 0, 2, before, after and rows"):
        compare_runs(one, f"{two}@teacher")
    assert read_answers(Path(one), "0").keys() == read_answers(Path(one), "before").keys()


def test_training_answers_out_of_saved_rows(recipe: Any, console: Console) -> None:
    """`@rows` is the last saved step, `@rows-1` the first; problems, rewards, lengths and texts are the rows'."""
    settings = ("train.steps=2", "train.save_rows_every=1", "sampling.group_size=3")
    run = recipe("grpo", *settings)
    train(run, resume=False, overwrite=False, console=console)
    path = str(run.run_dir)
    (name, found), *_ = read_answers(run.run_dir, "rows-1").items()
    rows = load_rows(run.run_dir / "rows" / "step_000001.parquet")
    assert name == "arithmetic:merge-3:train" and found.task == "arithmetic"
    assert [a.reward for a in found.answers] == [row.rollout.reward for row in rows]
    graded = ArithmeticTask().grade([(row.problem, a.text) for row, a in zip(rows, found.answers, strict=True)])
    assert [grade.score for grade in graded] == [a.reward for a in found.answers], "the text is what was graded"
    compared = compare_runs(f"{path}@rows-1", f"{path}@rows-1")["sets"][name]
    assert compared["problems"] == 5 and compared["metrics"]["avg"]["value"] == 0.0 and compared["notes"] == []
    assert read_answers(run.run_dir, "rows")[name].asked["step"] == 2
    with pytest.raises(UserError, match=r"no rows of step 7; .* @rows-2"):
        read_answers(run.run_dir, "rows-7")


def test_refusals(tmp_path: Path) -> None:
    """A path that is not there, a folder of something else, files that are no answers, other data sets, a cut line."""
    with pytest.raises(UserError, match="no file or folder"):
        compare_runs(str(tmp_path / "nope"), str(tmp_path))
    with pytest.raises(UserError, match="neither a run folder"):
        compare_runs(str(tmp_path), str(tmp_path))
    a = result(tmp_path / "a", [problem("p")], 0.0)
    b = result(tmp_path / "b", [problem("q")], 0.0, data="b")
    with pytest.raises(UserError, match="different data sets"):
        compare_runs(str(a), str(b))
    (tmp_path / "x.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="not a JSON object"):
        compare_runs(str(a), str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match="not a file of answers"):
        compare_runs(str(a), str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="leave `@teacher` out"):
        compare_runs(str(a), f"{b}@teacher")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward", math.nan),
        ("reward", "1.0"),
        ("reward", True),
        ("problem_id", 7),
        ("sample_id", "0"),
        ("parsed", 3),
        ("text", None),
        ("finish", "eos"),
        ("num_tokens", 1.5),
    ],
)
def test_a_changed_line_is_a_sentence(tmp_path: Path, key: str, value: Any) -> None:
    """A file that somebody edited, or another program wrote: which value of which answer is none, and no traceback."""
    path = result(tmp_path / "a", [problem("p")], 0.0) / "set.jsonl"
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | {key: value})}\n")
    with pytest.raises(UserError, match=f"set.jsonl: {key} = "):
        read_answers(path)


@pytest.mark.parametrize("identity", [[1], {}, {"sets": {}}, {"sets": {"s": {}}}])
def test_a_changed_first_line_is_a_sentence(tmp_path: Path, identity: Any) -> None:
    path = result(tmp_path / "a", [problem("p")], 0.0) / "set.jsonl"
    path.write_text("\n".join([json.dumps({"identity": identity}), *path.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(UserError, match="first line"):
        read_answers(path)


def test_a_smaller_n_is_what_is_compared(tmp_path: Path) -> None:
    """-n 1 after -n 2: both answers are stored, and the comparison is over the one that result.json measures."""
    folders = [result(tmp_path / name, [problem("p")], 0.0) for name in "ab"]
    for folder in folders:
        first = read_answers(folder)["set"]
        Store(folder / "set.jsonl", first.asked).append([replace(first.answers[0], sample_id=1, reward=1.0)])
    assert compare_runs(*map(str, folders))["sets"]["set"]["samples_a"] == 2
    write_result(folders[0], {"options": {"num_samples": 1}, "eval": {"set": MEASURED}})
    found = compare_runs(*map(str, folders))["sets"]["set"]
    assert (found["samples_a"], found["samples_b"]) == (1, 2) and found["metrics"]["avg"]["before"] == 0.0
    assert len(read_answers(folders[0], unmeasured=True)["set"].answers) == 2


def test_the_table_holds_hostile_names(tmp_path: Path) -> None:
    """Names are not markup; the table prints on a narrow terminal."""
    a = result(tmp_path / "[red]a", [problem("p")], 0.0, data="[bold]x")
    console = Console(width=60, record=True, force_terminal=False)
    for part in comparison_tables(compare_runs(str(a), str(a))):
        console.print(part)
    text = console.export_text()
    assert "[bold]x" in text and "avg" in text and "+0.000" in text


def test_few_problems_are_no_verdict(tmp_path: Path) -> None:
    """Two problems, all better: an interval without zero, and no word of it; with ten there is one."""
    for number, word in ((2, False), (10, True)):
        problems = [problem(f"p{i}") for i in range(number)]
        a = result(tmp_path / f"a{number}", problems, 0.0)
        b = result(tmp_path / f"b{number}", problems, 1.0)
        lines = list(comparison_tables(compare_runs(str(a), str(b))))
        console = Console(width=100, record=True)
        for part in lines:
            console.print(part)
        text = console.export_text()
        assert ("B better" in text) is word and ("too few" in text) is not word
