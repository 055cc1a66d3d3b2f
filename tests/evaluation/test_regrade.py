"""`opdkit regrade`: new verdicts, new numbers, old files kept, nothing written twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from opdkit.cli.tables import regraded_lines
from opdkit.errors import UserError
from opdkit.evaluation.regrade import regrade
from opdkit.measure.accuracy import accuracy
from opdkit.run.answer_sets import read_answers
from opdkit.run.stored_answers import Store, StoredAnswer, problems_path, write_problems, write_result
from opdkit.tasks import arithmetic
from opdkit.types import Problem

PROBLEMS = arithmetic.problems("merge-2", "test", 4, 0)


def answers(rewards: Sequence[float | None]) -> list[StoredAnswer]:
    """Every answer is right in truth."""
    return [
        StoredAnswer(
            problem_id=p.id,
            sample_id=0,
            reward=reward,
            parsed=p.gold,
            finish="stop",
            num_tokens=3,
            text=arithmetic.random_solution(p, 0),
        )
        for p, reward in zip(PROBLEMS, rewards, strict=True)
    ]


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Four right answers; the grader of that day called two of them wrong and could not grade one."""
    folder = tmp_path / "result"
    store = Store(folder / "set.jsonl", {"data": ["set"], "task": "arithmetic", "seed": 0, "fingerprint": "f"})
    found = answers([0.0, 0.0, None, 1.0])
    store.append(found)
    write_problems(problems_path(folder, "set"), PROBLEMS)
    write_result(folder, {"options": {}, "eval": {"set": accuracy(found)}})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_verdicts_change_and_the_old_result_stays(result: Path) -> None:
    before = contents(result)
    (found,), kept = regrade(result)
    assert found.kinds() == {"wrong -> right": 2, "ungraded -> right": 1}
    written = json.loads((result / "result.json").read_text())["eval"]["set"]
    assert written == found.after and written["avg_at_n"]["value"] == 1.0 and written["num_ungraded"] == 0
    assert [a.reward for a in read_answers(result)["set"].answers] == [1.0] * 4
    assert {path.name for path in kept} == {"set.before_regrade_1.jsonl", "result.before_regrade_1.json"}
    after = contents(result)
    assert after["result.before_regrade_1.json"] == before["result.json"]
    assert after["set.before_regrade_1.jsonl"] == before["set.jsonl"]
    lines = list(regraded_lines([found], examples=2))
    assert "2 wrong -> right" in lines[1] and "... and 1 more" in lines[-1]


def test_a_second_call_changes_nothing(result: Path) -> None:
    regrade(result)
    before = contents(result)
    (found,), kept = regrade(result)
    assert not found.changed and kept == [] and contents(result) == before


def test_a_smaller_n_measures_the_first_answers(result: Path) -> None:
    """As the evaluation did: what was sampled for a larger -n stays stored, and is graded, but not measured."""
    more = [replace(a, sample_id=1, text="no answer") for a in answers([1.0] * 4)]
    Store(result / "set.jsonl", read_answers(result)["set"].asked).append(more)
    written = json.loads((result / "result.json").read_text())
    write_result(result, {**written, "options": {"num_samples": 1, "seed": 0}})
    (found,), _ = regrade(result)
    assert found.after["samples"] == 1 and found.after["avg_at_n"]["value"] == 1.0
    stored = read_answers(result, unmeasured=True)["set"].answers
    assert [a.reward for a in stored] == [1.0] * 4 + [0.0] * 4


def test_dry_run_writes_nothing(result: Path) -> None:
    before = contents(result)
    (found,), kept = regrade(result, dry_run=True)
    assert len(found.changed) == 3 and kept == [] and contents(result) == before


def test_an_unfinished_evaluation_stays_one(result: Path) -> None:
    """Its answers are graded again; numbers of a part of what was asked are shown, and not written as its result."""
    (result / "result.json").unlink()
    (found,), kept = regrade(result)
    assert found.before is None and found.after["avg_at_n"]["value"] == 1.0
    assert [path.name for path in kept] == ["set.before_regrade_1.jsonl"] and not (result / "result.json").exists()
    assert [a.reward for a in read_answers(result)["set"].answers] == [1.0] * 4
    before = contents(result)
    assert regrade(result)[1] == [] and contents(result) == before


def test_a_crash_between_the_files_is_made_up_for(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are written, then the machine dies: the next call writes the numbers and keeps one copy of each."""
    with monkeypatch.context() as patch:
        patch.setattr("opdkit.evaluation.regrade.write_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            regrade(result)
    regrade(result)
    assert json.loads((result / "result.json").read_text())["eval"]["set"]["avg_at_n"]["value"] == 1.0
    assert len(list(result.glob("*before_regrade*"))) == 2


def test_corrected_gold_answers(tmp_path: Path) -> None:
    """--data brings another gold answer to the same question, and is what later calls use; other questions are
    refused, and so is data that lacks an answered problem."""
    folder, source = tmp_path / "result", tmp_path / "fixed.jsonl"
    question = ({"role": "user", "content": "3 + 4? \\boxed{}"},)
    store = Store(folder / "m.jsonl", {"data": ["m"], "task": "math", "fingerprint": "f", "instruction": "auto"})
    write_problems(problems_path(folder, "m"), [Problem(id="p", task="math", messages=question, gold="8")])
    text = "\\boxed{7}"
    store.append([StoredAnswer(problem_id="p", sample_id=0, reward=0.0, parsed="7", finish="stop", text=text)])

    def fix(name: str, content: str) -> dict[str, str]:
        row = {"id": name, "prompt": [{"role": "user", "content": content}], "answer": "7"}
        source.write_text(json.dumps(row) + "\n")
        return {"m": str(source)}

    with pytest.raises(UserError, match="asks another question under the id 'p'"):
        regrade(folder, data=fix("p", "another one? \\boxed{}"))
    with pytest.raises(UserError, match=r"lacks 1 of the problems that were answered, e\.g\. 'p'"):
        regrade(folder, data=fix("q", question[0]["content"]))
    (found,), _ = regrade(folder, data=fix("p", question[0]["content"]))
    assert found.kinds() == {"wrong -> right": 1} and found.before is None
    assert read_answers(folder)["m"].asked["data"] == [str(source)]
    assert regrade(folder) == ([replace(found, changed=[])], [])


def test_published_numbers_are_added_and_kept_up(result: Path) -> None:
    regrade(result, with_published=True)
    written = json.loads((result / "result.json").read_text())
    assert written["published"]["set"]["maj_at_n_greedy"]["value"] == 1.0
    _, kept = regrade(result)
    assert kept == []


def test_a_stranger_s_task_is_not_imported(result: Path, tmp_path: Path) -> None:
    """A folder may name a file as its task. It is run only when the person at the keyboard names it."""
    evil = tmp_path / "evil.py"
    evil.write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    answers = result / "set.jsonl"
    answers.write_text(answers.read_text().replace('"task": "arithmetic"', f'"task": "{evil}"'))
    with pytest.raises(UserError, match=r"none of opdkit's own tasks .* --task TASK"):
        regrade(result)
    assert read_answers(result)["set"].task == str(evil) and not (tmp_path / "ran").exists()
    (found,), _ = regrade(result, task="arithmetic")
    assert found.after["avg_at_n"]["value"] == 1.0 and read_answers(result)["set"].task == "arithmetic"


def test_refusals(result: Path, tmp_path: Path) -> None:
    """A folder of something else, a run, episodes, no problems, a task that is gone, a name that is none."""
    with pytest.raises(UserError, match="no file or folder"):
        regrade(tmp_path / "nope")
    with pytest.raises(UserError, match="no answers to 'x'; it has set"):
        regrade(result, data={"x": "y"})
    answers = result / "set.jsonl"
    whole = answers.read_text()
    answers.write_text(whole.replace('"seed": 0', '"seed": 0, "episode": {"max_turns": 2}', 1))
    with pytest.raises(UserError, match=r"set was answered in episodes, .* --task TASK"):
        regrade(result)
    assert regrade(result, task="arithmetic", dry_run=True)[0]
    answers.write_text(whole)
    problems_path(result, "set").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="is damaged"):
        regrade(result)
    problems_path(result, "set").unlink()
    with pytest.raises(UserError, match="--data set=PATH"):
        regrade(result)
    write_problems(problems_path(result, "set"), PROBLEMS[1:])
    with pytest.raises(UserError, match="lacks 1 of the problems that were answered"):
        regrade(result)
    (result / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="is a training run"):
        regrade(result)


@pytest.mark.parametrize(
    "changed",
    [
        {"eval": {"set": 0.5}},
        {"eval": {"set": {"avg_at_n": {"value": "x"}}}},
        {"options": []},
        {"options": {"num_samples": "x"}},
        {"seconds": 1e999},
        {"verifier": 1},
    ],
)
def test_a_result_that_was_changed(result: Path, changed: dict[str, object]) -> None:
    path = result / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError, match="run the same `opdkit evaluate` again"):
        regrade(result, with_published=True)


def test_neither_regrade_nor_compare_loads_torch() -> None:
    """A table is recomputed on a laptop."""
    code = (
        "import sys, opdkit.evaluation.regrade, opdkit.evaluation.compare_runs, opdkit.cli.tables; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
