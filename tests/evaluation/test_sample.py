"""`opdkit sample`: what is kept, what is rejected, and what a second call does."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.evaluation import sample as module
from opdkit.evaluation.options import EvaluateOptions
from opdkit.evaluation.sample import SampleOptions, rules_of, sample
from opdkit.run.lock import Lock
from opdkit.tasks.rejection import RULES, rejected_by, repeats
from opdkit.types import Rollout


@pytest.fixture
def options(models: dict[str, Path]) -> SampleOptions:
    asked = EvaluateOptions(
        model=str(models["student"]),
        data=("arithmetic:merge-2:train",),
        task="arithmetic",
        num_samples=2,
        limit=20,
        max_answer_tokens=12,
        dtype="float32",
        device="cpu",
    )
    return SampleOptions(model=asked, reject=("truncated",), attempts=2)


def test_kept_answers_are_training_data(options: SampleOptions, tmp_path: Path, console: Console) -> None:
    """Random students are often cut short: some answers are rejected, tried again, and what is kept can be read."""
    out = tmp_path / "answers.jsonl"
    counts = sample(options, out=out, console=console)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert counts["kept"] == len(rows) > 0 and counts["kept"] + counts["missing"] == 40
    num_rejected = counts["rejected_truncated"] + counts.get("rejected_empty", 0)
    assert num_rejected > counts["missing"], "second attempts were made"
    data = load_problems(str(out), task="math", instruction="none")
    assert [p.solution for p in data.problems] == [row["solution"] for row in rows] and not data.num_duplicate_ids
    rejected = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejected.jsonl").read_text().splitlines()[1:]]
    assert len(rejected) == num_rejected and {r["reason"] for r in rejected} <= {"truncated", "empty"}


def test_a_crash_costs_nothing_that_was_kept(
    options: SampleOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut both files in the middle of a line: the next call fills the same answers in again."""
    monkeypatch.setattr(module, "PROBLEMS_PER_BATCH", 8)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sample(options, out=whole, console=console)
    sample(options, out=cut, console=console)
    for path in (cut, tmp_path / "cut.jsonl.rejected.jsonl"):
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
    sample(options, out=cut, console=console)
    assert sorted(cut.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    again = sample(options, out=cut, console=console)
    assert set(again) == {"kept", "missing"}, "nothing new was sampled"


def test_other_questions_and_files_are_refused(options: SampleOptions, tmp_path: Path, console: Console) -> None:
    out = tmp_path / "answers.jsonl"
    sample(options, out=out, console=console)
    with pytest.raises(UserError, match=r"another question: temperature = 1\.0 \(now 0\.5\)"):
        sample(replace(options, model=replace(options.model, temperature=0.5)), out=out, console=console)
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="not written by opdkit sample"):
        sample(options, out=other, console=console)
    with pytest.raises(UserError, match="--reject wrnog is not a rule"):
        rules_of("truncated,wrnog")


def test_repetition_by_hand() -> None:
    """A line of 20 characters five times; 100 characters three times at a period that no stride of 10 meets."""
    line = "this line is long enough"
    assert repeats("\n".join([line] * 5)) and not repeats("\n".join([line] * 2 + [f"step {n}" for n in range(20)]))
    period = "".join(chr(97 + (i * i) % 26) + str(i) for i in range(60))[:137]
    assert len(period) == 137 and repeats(period * 12) and not repeats(period)
    assert rules_of("wrong, truncated") == ("truncated", "wrong") and rules_of("none") == ()
    assert rejected_by is module.rejected_by


def test_episodes_are_rejected_whole() -> None:
    """A limit is a cut, one turn in circles is enough, and an environment may look for no final answer."""
    nothing = np.zeros(0, dtype=np.bool_)
    answer = Rollout(
        problem_id="p", sample_id=0, policy_version=0, prompt_ids=(), answer_ids=(), answer_logprobs=None,
        answer_mask=nothing, finish="stop", reward=1.0,
    )  # fmt: skip
    turns = ["call it", "it is 7"]
    assert rejected_by(answer, turns, RULES) == "no_answer"
    for ended, reason in (("turn_limit", "truncated"), ("failure", "failure"), ("done", None), ("answer", None)):
        assert rejected_by(replace(answer, ended=ended), turns, RULES, has_finals=False) == reason
    assert rejected_by(answer, ["a b " * 100, "7"], ("repetition",)) == "repetition"
    assert rejected_by(answer, ["call it", " "], ()) == rejected_by(answer, [], ()) == "empty"


def test_one_writer_of_a_file(options: SampleOptions, tmp_path: Path, console: Console) -> None:
    """A second process is refused while the first works; a link leads to one and the same file; a refused call leaves
    nothing, and a name that data.train would not read is refused."""
    out, link = tmp_path / "answers.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    with Lock.on_file(out):
        for name in (out, link):
            with pytest.raises(UserError, match=r"answers\.jsonl is being written by process"):
                sample(options, out=name, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["link.jsonl"]
    for name in ("answers", "o.parquet", "folder"):
        with pytest.raises(UserError, match=r"give the name of a \.jsonl file"):
            sample(options, out=tmp_path / "new" / name, console=console)
    assert not (tmp_path / "new").exists()
    counts = sample(options, out=link, console=console)
    assert link.is_symlink() and len(out.read_text().splitlines()) == counts["kept"]
