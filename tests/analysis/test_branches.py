"""`opdkit analyse position`: branches leave where the teacher disagrees, are graded, kept and resumed.

Does not show that viability rises with position for real models; measure/position.py has its arithmetic by hand.
"""

from __future__ import annotations

import json
import xml.dom.minidom
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.analysis import branches
from opdkit.analysis.branches import PositionOptions, analyse_position
from opdkit.analysis.two_models import Reading
from opdkit.engines.hf import HFEngine
from opdkit.errors import Interrupted, UserError
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train

Make = Callable[..., Recipe]


@pytest.fixture
def run(recipe: Make, console: Console) -> Path:
    chosen = recipe("opd", "train.steps=1")
    train(chosen, console=console)
    return chosen.run_dir


def measure(console: Console, source: Path, out: Path, **reading: Any) -> dict[str, Any]:
    options = PositionOptions(source=source, reading=Reading(device="cpu", **reading), per_answer=3, out=out)
    return analyse_position(options, console=console)


def saved(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "branches.jsonl").read_text().splitlines()[1:]]


def test_branches_leave_where_the_teacher_disagrees(run: Path, tmp_path: Path, console: Console) -> None:
    """At most one in each third of an answer, where the sampled token is not the teacher's; each graded twice, or once
    where the teacher's token ends it."""
    found = measure(console, run, tmp_path / "out")
    rows = {row.rollout.key: row.rollout for row in load_rows(run / "rows" / "step_000001.parquet")}
    some = saved(tmp_path / "out")
    assert len(some) == found["num_branches"] > 10
    places = [(b["problem_id"], b["sample_id"], b["index"] * 3 // b["length"]) for b in some]
    assert len(set(places)) == len(places)
    for b in some:
        answer = rows[b["problem_id"], b["sample_id"]]
        assert b["length"] == len(answer.answer_ids) and b["own_reward"] == answer.reward
        assert len(b["rewards"]) in (1, 2) and set(b["rewards"]) <= {0.0, 1.0, None}
        assert b["teacher_logprob"] <= 0 and b["reverse_kl"] > -1e-6
    assert sum(b["branches"] for b in found["branches"]) == len(some)
    svg = xml.dom.minidom.parse(str(tmp_path / "out" / "position.svg"))
    assert svg.getElementsByTagName("polyline")


def test_a_stopped_call_goes_on_to_the_same_branches(
    run: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the second part; what is there is not sampled again, and the numbers are those of one go."""
    whole = measure(console, run, tmp_path / "whole")
    monkeypatch.setattr(branches, "BRANCHES_PER_PART", 8)
    sample = HFEngine.sample
    calls: list[int] = []

    def counted(self: HFEngine, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise Interrupted
        return sample(self, prompts, *args, **kwargs)

    monkeypatch.setattr(HFEngine, "sample", counted)
    with pytest.raises(Interrupted):
        measure(console, run, tmp_path / "out")
    assert len(saved(tmp_path / "out")) == 8
    assert measure(console, run, tmp_path / "out") == whole
    calls.clear()
    assert measure(console, run, tmp_path / "out") == whole and not calls


def test_the_student_itself_agrees_wherever_it_was_sure(run: Path, tmp_path: Path, console: Console) -> None:
    """With the student as teacher no divergence is left; branches still leave where it drew a less likely token."""
    path = str(run / "checkpoints" / "step_000001" / "model")
    found = measure(console, run, tmp_path / "out", student=path, teacher=path)
    assert all(part["reverse_kl"] == pytest.approx(0, abs=1e-6) for part in found["by_relative_position"])
    assert all(b["student_logprob"] == pytest.approx(b["teacher_logprob"], abs=1e-5) for b in saved(tmp_path / "out"))


def test_a_folder_of_other_branches_is_refused(
    run: Path, models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    measure(console, run, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds answers to another question: teacher = .*choose another --out"):
        measure(console, run, tmp_path / "out", teacher=str(models["student"]))


def test_branches_of_other_answers_to_the_same_problems_are_refused(
    recipe: Make, tmp_path: Path, console: Console
) -> None:
    """Another step asked the same problems, or the run was made anew at its path: the same problem, answer and token
    number, and another answer. A branch of the one is no branch of the other."""
    chosen = recipe("opd", "train.steps=2", "train.save_rows_every=1")
    train(chosen, console=console)
    measure(console, chosen.run_dir, tmp_path / "out", step=1)
    with pytest.raises(UserError, match=r"holds answers to another question: rows = .*choose another --out"):
        measure(console, chosen.run_dir, tmp_path / "out", step=2)
    anew = recipe("opd", "train.steps=2", "train.save_rows_every=1", "train.lr=0.01")  # its first answers are the same
    train(anew, console=console, overwrite=True)
    with pytest.raises(UserError, match=r"holds answers to another question: student_files = .*choose another --out"):
        measure(console, chosen.run_dir, tmp_path / "out", step=1)
