"""How runs are started: `--resume auto`, `--seeds`, and a queue that ends a job before its time is up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit import toml
from opdkit.cli import _status
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.seeds import seeds_of, spread
from opdkit.training import loop
from opdkit.training.saved import checkpoint

Make = Callable[..., Recipe]
PAGE = Path(__file__).parents[2] / "docs/guides/slurm.md"


@pytest.fixture
def opdkit(monkeypatch: pytest.MonkeyPatch, recipe: Make, tmp_path: Path) -> Callable[..., int]:
    """Runs a command on a recipe's file in this process; returns its status."""

    def run(settings: tuple[str, ...], *words: str) -> int:
        path = tmp_path / "recipe.toml"
        path.write_text(toml.dumps(recipe("sft", "train.steps=1", "train.problems_per_step=2", *settings).as_dict()))
        monkeypatch.setattr(sys, "argv", ["opdkit", "train", str(path), *words])
        return _status()

    return run


def test_resume_auto_begins_or_goes_on(opdkit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In both spellings; a folder of a run that never began is begun; with --overwrite it is refused."""
    assert opdkit((), "--resume", "auto") == 0
    assert "going on from" not in capsys.readouterr().out
    assert opdkit((), "--resume=auto") == 0
    assert "going on from" in capsys.readouterr().out
    assert opdkit((), "--resume", "auto", "--overwrite") == 2
    assert opdkit(("name=other",), "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_paused_run_has_a_status_of_its_own(
    opdkit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    step = loop.train_step

    def broken(*arguments: Any) -> Any:
        rows, metrics = step(*arguments)
        return rows, [m for m in metrics if m.name != "train/loss"]

    monkeypatch.setattr(loop, "train_step", broken)
    monkeypatch.setattr(loop, "note_of", lambda *_: "")
    assert opdkit(("sentinels.action=pause",)) == 3
    said = capsys.readouterr().err
    assert "Paused. step 1: the loss is not finite" in said and "sentinels.non_finite" in said and "--resume" in said


def test_seeds(opdkit: Any, recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A run for each, by name; what is there is refused, or gone on with; the numbers are those of the runs."""
    keys = ('eval.data="arithmetic:merge-3:test"', "eval.limit=2", "eval.samples=2")
    assert opdkit(keys, "--seeds", "3,5") == 0
    runs = Path(recipe("sft").runs_dir)
    found = json.loads((runs / "run-seeds.json").read_text())
    assert found["seeds"] == [3, 5] and found["runs"] == ["run-seed3", "run-seed5"]
    both = [json.loads((runs / name / "summary.json").read_text()) for name in found["runs"]]
    after = [one["eval"]["student_after"]["arithmetic:merge-3:test"]["avg_at_n"]["value"] for one in both]
    assert found["eval"]["student_after"]["arithmetic:merge-3:test"]["values"] == after
    assert "largest" in capsys.readouterr().out
    assert opdkit(keys, "--seeds", "3,5") == 2
    (runs / "run-seed5" / "summary.json").unlink()
    assert opdkit(keys, "--seeds", "3,5", "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "run-seed3 is finished" in said and "going on from" in said
    assert json.loads((runs / "run-seeds.json").read_text()) == found
    assert opdkit((*keys, "train.lr=0.5"), "--seeds", "3,5", "--resume", "auto") == 2


@pytest.mark.parametrize("text", ["", "3", "1-1", "a-b", "4-2", "1,1", "0-5000", "-1", "1-"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--seeds"):
        seeds_of(text)


def test_the_spread_by_hand() -> None:
    def estimate(value: float | None) -> dict[str, Any]:
        low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
        return {"d": {"avg_at_n": {"value": value, "low": low, "high": high}}}

    def summary(before: float | None, after: float) -> dict[str, Any]:
        return {"eval": {"student_before": estimate(before), "student_after": estimate(after)}}

    found = spread([summary(0.2, 0.5), summary(0.3, 0.7), summary(None, 0.6)])
    after, gain = found["student_after"]["d"], found["gain"]["d"]
    assert [after[key] for key in ("mean", "sd", "low", "high", "interval")] == pytest.approx([0.6, 0.1, 0.5, 0.7, 0.1])
    assert gain["values"][:2] == pytest.approx([0.3, 0.4]) and gain["values"][2] is None
    assert seeds_of("0-2, 7") == [0, 1, 2, 7]


def test_the_page_s_job_goes_back_into_the_queue(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script of the page, with stand-ins for srun and scontrol: told before its time is up, it saves, asks for
    another turn, and that one goes on. Not tested: a cluster."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE.read_text(), re.DOTALL)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "opdkit": f'exec {sys.executable} -m opdkit "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    chosen = recipe("sft", "train.steps=5000", "train.save_every=0", "train.schedule=constant")
    (tmp_path / "recipe.toml").write_text(toml.dumps(chosen.as_dict()))
    (tmp_path / "job.sh").write_text(script)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    metrics = chosen.run_dir / "metrics.jsonl"
    job = subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()
        time.sleep(0.05)
    owner = re.search(r"process (\d+)", (chosen.run_dir / ".lock").read_text())
    assert owner is not None
    os.kill(int(owner[1]), signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert not set(said) & {chr(code) for code in range(32) if code != 10}  # a job's log has no control characters
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == metrics.read_text().count("\n")
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    (command,) = re.findall(r"^srun opdkit (.*)$", script, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    more = ["--set", f"train.steps={saved.step + 1}"]
    monkeypatch.setattr(sys, "argv", ["opdkit", *command.split(), *more])
    assert _status() == 0
    assert f"going on from {saved.path}" in capsys.readouterr().out
