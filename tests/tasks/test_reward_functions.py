"""Reward functions of TRL's form as tasks: in a file, named by a recipe, and in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.run.stored_answers import read_problems, write_problems
from opdkit.tasks.guard import GuardedTask, make_task
from opdkit.tasks.options import in_process, resolve_task
from opdkit.types import Problem

FILE = '''
import json

def seen(prompts, completions, level, absent=None, **columns):
    """Says what it was given, as the length of a text."""
    print(json.dumps([prompts, completions, level, absent, sorted(columns)]), file=open("seen.json", "w"))
    return [float(number) for number in level]

def by_text(completions):
    return [{"none": None, "text": "1", "nan": float("nan")}.get(text, len(text)) for text in completions]

def one_short(completions):
    return [1.0] * (len(completions) - 1)

async def later(completions):
    return [1.0]

def by_place(completions, /):
    return [1.0]

def wants_ids(completions, completion_ids):
    return [1.0]

def turns(prompts, completions):
    return [float(len(prompt) + 10 * (said[0]["role"] == "assistant") + 100 * len(said[0]["content"]))
            for prompt, said in zip(prompts, completions)]
'''


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GuardedTask]]:
    (tmp_path / "rewards.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    tasks: list[GuardedTask] = []

    def make(name: str, problems: Sequence[Problem] = ()) -> GuardedTask:
        tasks.append(make_task(resolve_task(f"rewards.py:{name}"), problems))
        return tasks[-1]

    yield make
    for task in tasks:
        task.close()


def data(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source: str, task: str) -> list[Problem]:
    chosen = resolve_task(task)
    return load_problems(source, task=chosen.name, require_gold=False, asked=chosen.columns_asked).problems


def test_columns_of_a_file_reach_the_function(made: Callable[..., GuardedTask], tmp_path: Path) -> None:
    """Those it names and, with **columns, all; a missing one with a default is not given."""
    source = data(tmp_path, *({"problem": f"q{n}", "answer": "a", "level": n, "extra": [n]} for n in range(2)))
    problems = load(source, "rewards.py:seen")
    assert problems[0].row == {"prompt": "q0", "problem": "q0", "answer": "a", "level": 0, "extra": [0]}
    grades = made("seen").grade([(problem, f"said{place}") for place, problem in enumerate(problems)])
    assert [grade.score for grade in grades] == [0.0, 1.0] and [g.verdict for g in grades] == ["wrong", "correct"]
    prompts, completions, level, absent, others = json.loads((tmp_path / "seen.json").read_text())
    assert (prompts, completions, level, absent) == (["q0", "q1"], ["said0", "said1"], [0, 1], None)
    assert {"answer", "extra", "gold", "id", "solution", "task"} <= {*others} and "prompt" not in others


def test_the_domain_of_a_set_is_a_column_too(made: Callable[..., GuardedTask], tmp_path: Path) -> None:
    """Of a problem whose own row has none: `data.train` gives it (training/problems/data.py)."""
    (problem,) = load(data(tmp_path, {"problem": "q", "answer": "a"}), "rewards.py:seen")
    made("seen").grade([(replace(problem, columns={"level": "hard"}), "said")])
    assert json.loads((tmp_path / "seen.json").read_text())[2] == ["hard"]


def test_only_what_is_asked_for_is_kept(made: Callable[..., GuardedTask], tmp_path: Path) -> None:
    """And is part of the data's fingerprint; problems without columns have the fingerprint they always had."""
    source = data(tmp_path, {"problem": "q", "answer": "a", "level": 1, "extra": 2})
    assert load(source, "rewards.py:by_text") and load(source, "math")[0].row == {}
    asked = {task: load_problems(source, task="t", asked=resolve_task(task).columns_asked) for task in ("math",)}
    plain = load_problems(source, task="t")
    assert asked["math"].fingerprint == plain.fingerprint
    assert load_problems(source, task="t", asked=["level"]).fingerprint != plain.fingerprint
    (problem,) = load_problems(source, task="t", asked=["level"]).problems
    write_problems(tmp_path / "p.gz", [problem])
    assert read_problems(tmp_path / "p.gz") == {problem.id: problem} and problem.row["level"] == 1


def test_chat_turns_stay_chat_turns(made: Callable[..., GuardedTask], tmp_path: Path) -> None:
    """As in TRL: where the data's prompt is a list of turns, so are prompts and completions."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    problems = load(data(tmp_path, {"prompt": turns, "answer": "a"}), "rewards.py:turns")
    assert made("turns").grade([(problems[0], "four")])[0].score == 2 + 10 + 400
    (text,) = load(data(tmp_path, {"prompt": "q", "answer": "a"}), "rewards.py:turns")
    assert made("turns").grade([(text, "four")])[0].verdict == "error", "a text has no role"


def test_what_is_no_reward_stays_ungraded(made: Callable[..., GuardedTask]) -> None:
    problem = Problem(id="p", task="t", messages=({"role": "user", "content": "q"},))
    texts = ["abc", "none", "text", "nan", ""]
    grades = made("by_text").grade([(problem, text) for text in texts])
    assert [grade.score for grade in grades] == [3.0, None, None, None, 0.0]
    short = made("one_short")
    assert [grade.score for grade in short.grade([(problem, "a"), (problem, "b")])] == [None, None]
    assert any("2 completions" in said or "1 completions" in said for said in short.new_crashes())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("later", "the reward later is async"),
        ("by_place", "takes completions by position"),
        ("wants_ids", "asks for completion_ids, which no grader sees"),
    ],
)
def test_refused_when_it_is_named(made: Callable[..., GuardedTask], name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        made(name)


def test_a_missing_column_is_said_before_the_run(made: Callable[..., GuardedTask]) -> None:
    problem = Problem(id="p", task="t", messages=({"role": "user", "content": "q"},), meta={"source": "s"})
    with pytest.raises(UserError, match=r"asks for the column level, which the problems lack \(there are .*source"):
        made("seen", [problem])


def test_arrays_count_as_lists() -> None:
    """What numpy and torch give, by their tolist."""
    import numpy

    task = make_task(in_process(lambda completions: numpy.array([0.5] * len(completions)), "f"))
    problem = Problem(id="p", task="t", messages=())
    assert [grade.score for grade in task.grade([(problem, "a"), (problem, "b")])] == [0.5, 0.5]


def test_the_name_of_a_function_that_is_nowhere() -> None:
    chosen = in_process(lambda completions: [1.0], "mine")
    assert chosen.name == "python:mine" and resolve_task(chosen) is chosen
    with pytest.raises(ValueError, match="was a function given to opdkit"):
        resolve_task(chosen.name)
