"""`opdkit analyse overlap`: a run's own models by default, any others on request, and numbers without a model after."""

from __future__ import annotations

import json
import shutil
import xml.dom.minidom
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opdkit.analysis.overlap import OverlapOptions, analyse_overlap
from opdkit.analysis.token_tables import load_tokens
from opdkit.analysis.two_models import Reading
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows, save_rows
from opdkit.training.loop import train

Make = Callable[..., Recipe]


@pytest.fixture
def run(recipe: Make, console: Console) -> Path:
    chosen = recipe("opd", "train.steps=2", "diagnostics.rows=10", "diagnostics.bucket_tokens=8")
    train(chosen, console=console)
    return chosen.run_dir


def numbers(
    console: Console, *sources: Path, out: Path, bucket_tokens: int = 1024, published: str | None = None, **reading: Any
) -> dict[str, Any]:
    options = OverlapOptions(
        sources=sources,
        reading=Reading(device="cpu", **reading),
        bucket_tokens=bucket_tokens,
        published=published,
        out=out,
    )
    return analyse_overlap(options, console=console)


def test_a_run_with_its_own_models(run: Path, models: dict[str, Path], tmp_path: Path, console: Console) -> None:
    """The first student on the rows of step 1 gives what the run logged live: same answers, weights and numbers."""
    found = numbers(console, run, student=str(models["student"]), step=1, bucket_tokens=8, out=tmp_path / "out")["run"]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert found["teacher"] == str(models["teacher"]) and found["num_answers"] == 10
    for name in ("ratio", "mass_student", "mass_teacher", "advantage", "entropy_gap", "reverse_kl", "forward_kl"):
        assert found["all"][name] == pytest.approx(first[f"overlap/{name}"], abs=1e-5), name
        for bucket in found["by_bucket"]:
            live = first[f"overlap/{name}@{bucket['from']}-{bucket['to']}"]
            assert bucket[name] == pytest.approx(live, abs=1e-5), (name, bucket["from"])
    written = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert written["run"] == found
    svg = xml.dom.minidom.parse(str(tmp_path / "out" / "overlap.svg"))
    assert len(svg.getElementsByTagName("polyline")) == 6


def test_the_last_checkpoint_is_the_default_student(run: Path, tmp_path: Path, console: Console) -> None:
    assert numbers(console, run, out=tmp_path / "out")["run"]["student"].endswith("checkpoints/step_000002/model")


def test_a_token_table_needs_no_model(
    run: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into other buckets, the numbers of all tokens stay; what needs the answers is refused."""
    found = numbers(console, run, out=tmp_path / "out")["run"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LanguageModel, "load", refuse)
    saved = tmp_path / "out" / "run.tokens.parquet"
    again = numbers(console, saved, bucket_tokens=4, out=tmp_path / "again")["run"]
    assert again["all"] == found["all"] and len(again["by_bucket"]) > len(found["by_bucket"])
    with pytest.raises(UserError, match=r"--teacher x: .* holds numbers, no answers"):
        numbers(console, saved, teacher="x", out=tmp_path / "again")


def test_a_file_of_rows_needs_both_names(run: Path, models: dict[str, Path], tmp_path: Path, console: Console) -> None:
    rows = run / "rows" / "step_000001.parquet"
    with pytest.raises(UserError, match=r"say whose answers these are with --student"):
        numbers(console, rows, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"does not say who their teacher is; name one with --teacher"):
        numbers(console, rows, student=str(models["student"]), out=tmp_path / "out")
    both = {"student": str(models["student"]), "teacher": str(models["teacher"]), "dtype": "float32"}
    of_rows = numbers(console, rows, out=tmp_path / "a", **both)["step_000001"]
    of_run = numbers(console, run, step=1, out=tmp_path / "b", **both)["run"]
    assert of_rows["all"] == of_run["all"]


def test_another_teacher_is_read_through_its_own_template(
    run: Path, models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    """The same weights behind another opening say something else; the saved views are not theirs."""
    other = tmp_path / "other"
    shutil.copytree(models["teacher"], other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ '<a>' }}", "{{ '<s>;<a>' }}"))
    own, strange = (
        numbers(console, run, teacher=str(path), out=tmp_path / path.name)["run"]["all"]["reverse_kl"]
        for path in (models["teacher"], other)
    )
    assert abs(own - strange) > 1e-4


def test_privileged_rows_keep_their_saved_context(recipe: Make, tmp_path: Path, console: Console) -> None:
    """OPSD's teacher (initial weights) reads the solution: its numbers differ from those of the student's prompt."""
    chosen = recipe("opsd", "train.steps=1")
    train(chosen, console=console)
    found = numbers(console, chosen.run_dir, student=chosen.model.path, step=1, out=tmp_path / "out")["run"]
    assert found["student"] == found["teacher"] and found["all"]["reverse_kl"] > 1e-4


def test_right_and_wrong_answers_are_told_apart(run: Path, tmp_path: Path, console: Console) -> None:
    numbers(console, run, out=tmp_path / "out")
    table, about = load_tokens(tmp_path / "out" / "run.tokens.parquet")
    rewards = {row["reward"] for row in about["rows"]}
    assert rewards <= {0.0, 1.0} and table.row_N.max() == len(about["rows"]) - 1
    assert np.isfinite(table.columns["reverse_kl"]).all()


def test_what_thunlp_logs_on_request(run: Path, tmp_path: Path, console: Console) -> None:
    """Its overlap ratio and masses are ours; a strategy it has no metrics of is refused before a model is loaded."""
    found = numbers(console, run, published="only_stu:student_p", out=tmp_path / "out")["run"]
    for theirs, ours in (
        ("val-topk/overlap_ratio", "ratio"),
        ("val-topk/student_p_sum_intersection", "mass_student"),
        ("val-topk/teacher_p_sum_intersection", "mass_teacher"),
        ("val-topk/adv_intersection", "advantage_thunlp"),
    ):
        assert found["published"][theirs] == pytest.approx(found["all"][ours]), theirs
    with pytest.raises(UserError, match=r'strategy "intersection" has no published overlap metrics.*only_stu'):
        numbers(console, run, published="intersection:none", out=tmp_path / "out")


def test_refusals(run: Path, models: dict[str, Path], tmp_path: Path, console: Console, recipe: Make) -> None:
    with pytest.raises(UserError, match=r"no rows of step 7: it has rows of the steps 1, 2"):
        numbers(console, run, step=7, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"is not a run folder"):
        numbers(console, tmp_path / "nowhere", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"two sources are called run"):
        numbers(console, run, run, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"--dtype half: choose"):
        numbers(console, run, dtype="half", out=tmp_path / "out")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"not a complete Parquet file"):
        numbers(console, tmp_path / "broken.parquet", out=tmp_path / "out")
    chosen = recipe("grpo", "train.steps=1", "name=alone")
    train(chosen, console=console)
    with pytest.raises(UserError, match=r"alone: it had no teacher; name one with --teacher"):
        numbers(console, chosen.run_dir, out=tmp_path / "out")


def test_token_ids_of_a_teacher_with_another_tokenizer_are_not_compared(
    recipe: Make, tmp_path: Path, console: Console
) -> None:
    chosen = recipe("opd", "train.steps=1", "teacher.tokens=align", "method.support=sampled", "diagnostics.every=0")
    train(chosen, console=console)
    with pytest.raises(UserError, match="another tokenizer"):
        numbers(console, chosen.run_dir, out=tmp_path / "out")


def test_answers_that_cannot_be_read_are_counted_aloud(
    run: Path, models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    """Of ten answers one is empty: nine are read, and the terminal says what became of the other."""
    rows = load_rows(run / "rows" / "step_000002.parquet")
    empty = replace(rows[0].rollout, answer_ids=(), answer_mask=np.zeros(0, bool), answer_logprobs=None)
    path = tmp_path / "rows.parquet"
    save_rows(path, [replace(rows[0], rollout=empty, taught=None, signals={}), *rows[1:]])
    with console.capture() as said:
        found = numbers(console, path, student=str(models["student"]), teacher=str(models["teacher"]), out=tmp_path)
    assert found["rows"]["num_left_out"] == 1 and found["rows"]["num_answers"] == 9
    assert "rows: 9 answers; 1 left out: empty" in said.get()


def test_a_list_longer_than_the_vocabulary_and_a_file_that_is_no_run_are_refused(
    run: Path, tmp_path: Path, console: Console
) -> None:
    """A list of 99 among 20 tokens would hold 20 and be called 99."""
    options = OverlapOptions(sources=(run,), reading=Reading(device="cpu"), k=99, out=tmp_path)
    with pytest.raises(UserError, match=r"-k 99: the models know \d+ tokens; choose a shorter list"):
        analyse_overlap(options, console=console)
    with pytest.raises(UserError, match=r"recipe\.toml is no source of answers: give a run folder"):
        numbers(console, run / "recipe.toml", out=tmp_path)
