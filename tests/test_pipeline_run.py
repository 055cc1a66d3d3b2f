"""Pipelines as they run: killed and continued to the same bits, skipped where finished, refused where changed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit import pipeline as running
from opdkit.errors import Interrupted, UserError
from opdkit.pipeline import run_pipeline
from opdkit.recipe.pipeline import Pipeline, load_pipeline
from opdkit.run.console import Interrupt
from opdkit.run.lock import Lock

TEXT = """
name = "{name}"
runs_dir = "{runs}"
paths = {{ small = "{student}", big = "{teacher}" }}

[recipe]
seed = 3
model = {{ path = "{{small}}", dtype = "float32", device = "cpu" }}
data = {{ train = "arithmetic:merge-3:train", task = "arithmetic", limit = 20 }}
sampling = {{ max_answer_tokens = 12, group_size = 1 }}
train = {{ problems_per_step = 4, lr = 1e-3, save_every = 2, schedule = "constant" }}
diagnostics = {{ every = 0 }}

[[stage]]
name = "answers"
kind = "sample"
model = "{{big}}"
data = "arithmetic:merge-3:train"
task = "arithmetic"
limit = 20
reject = []
max_answer_tokens = 12
dtype = "float32"
device = "cpu"

[[stage]]
name = "sft"
kind = "train"
recipe = {{ data = {{ train = "{{answers}}" }}, method = {{ name = "sft" }}, train = {{ steps = 3 }} }}

[[stage]]
name = "opd"
kind = "train"
[stage.recipe]
model = {{ path = "{{sft}}" }}
teacher = {{ kind = "model", path = "{{big}}" }}
method = {{ name = "opd" }}
train = {{ steps = 5 }}
eval = {{ data = "arithmetic:merge-3:test", limit = 4, samples = 2 }}
"""
Load = Callable[..., Pipeline]


@pytest.fixture
def load(models: dict[str, Path], tmp_path: Path) -> Load:
    def write(*overrides: str, name: str = "chain") -> Pipeline:
        path = tmp_path / f"{name}.toml"
        path.write_text(TEXT.format(name=name, runs=tmp_path / "runs", **models))
        return load_pipeline(path, overrides)

    return write


def bits(pipeline: Pipeline) -> dict[str, Any]:
    """Every final weight, optimizer and answer; and the metrics without clocks."""
    found: dict[str, Any] = {}
    for path in sorted(pipeline.folder.rglob("*")):
        key = path.relative_to(pipeline.folder).as_posix()
        if path.suffix == ".safetensors" or path.name == "answers.jsonl":
            found[key] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[key] = [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines]
    assert len(found) >= 7
    return found


def crash_in(monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """The n-th call of a function is a power cut."""
    module, _, name = where.rpartition(".")
    owner = sys.modules[module]
    original, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def test_cut_off_in_every_stage_it_ends_with_the_same_bits(
    load: Load, console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut while it samples, in the second step of the fine-tuning, and in the last of the distillation, and begun again
    with the same call each time. Within one process: no bytes are lost with the power here."""
    whole, cut = load(name="whole"), load(name="cut")
    run_pipeline(whole, console=console)
    for where, call in (
        ("opdkit.evaluation.sample.append_lines", 2),
        ("opdkit.training.step.backward", 2),
        ("opdkit.training.step.backward", 8),
    ):
        with monkeypatch.context() as patch:
            crash_in(patch, where, call)
            with pytest.raises(RuntimeError, match="power cut"):
                run_pipeline(cut, console=console)
    capsys.readouterr()
    record = run_pipeline(cut, console=Console(width=200))
    said = capsys.readouterr().out
    assert bits(cut) == bits(whole)
    assert "finished" in said and "begun" in said and "3/3  opd" in said and "1/3" not in said
    assert list(record["stages"]) == ["answers", "sft", "opd"] and record["stages"]["answers"]["numbers"]["kept"] == 20
    assert record["stages"]["opd"]["numbers"]["eval"]["student_after"] is not None


def test_a_finished_pipeline_does_nothing_again(
    load: Load, console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file changes, and the table of results is shown again."""
    pipeline = load()
    run_pipeline(pipeline, console=console)
    stamps = {path: path.stat().st_mtime_ns for path in pipeline.folder.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    monkeypatch.setattr(running, "_run", None)
    run_pipeline(load(), console=Console(width=200))
    assert stamps == {path: path.stat().st_mtime_ns for path in pipeline.folder.rglob("*") if path.name != ".lock"}
    assert capsys.readouterr().out.count("│ finished") == 3
    _changes_are_refused(load, console)
    _and_made_again_if_asked(pipeline, load, console, monkeypatch)


def _changes_are_refused(load: Load, console: Console) -> None:
    """What a finished stage did is not what it would do now; where it did it may change."""
    with pytest.raises(UserError, match=r"stage sft has begun as something else: train\.lr was 0\.001, is 0\.01; undo"):
        run_pipeline(load("sft.train.lr=0.01"), console=console)
    with pytest.raises(UserError, match=r"stage sft .*data\.train") as refused:
        run_pipeline(load("answers.n=2", "sft.data.train=elsewhere"), console=console)
    assert "stage answers has begun as something else: n was 1, is 2" in str(refused.value)
    run_pipeline(load("answers.device=auto", "sft.train.save_every=1"), console=console)


def _and_made_again_if_asked(pipeline: Pipeline, load: Load, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """--redo deletes what the stage and its successors made, and nothing before. A result that somebody changed is
    noticed. (`_run` is out of order: nothing may run yet.)"""
    weights = pipeline.stages[1].result / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    with pytest.raises(UserError, match=r"stage sft is finished, but its result .* was changed; .*--redo sft"):
        run_pipeline(load(), console=console)
    monkeypatch.undo()
    answers = pipeline.stages[0].result.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"--redo stf: .* has no such stage; it has answers, sft, opd"):
        run_pipeline(load(), console=console, redo="stf")
    with pytest.raises(UserError, match=r"stage sft: data\.train = /no/such: there is no such file"):
        run_pipeline(load("sft.data.train=/no/such"), console=console, redo="sft")
    assert pipeline.stages[1].result.exists(), "what cannot be made again is not deleted"
    record = run_pipeline(load("sft.train.lr=0.01"), console=console, redo="sft")
    assert record["stages"]["sft"]["definition"]["train"]["lr"] == 0.01
    assert pipeline.stages[0].result.stat().st_mtime_ns == answers


def test_ctrl_c_keeps_what_is_done(load: Load, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heard after the second step of the fine-tuning: it is saved, and the next call goes on from there."""
    pipeline = load()
    check, metrics = Interrupt.check, pipeline.folder / "sft" / "metrics.jsonl"

    def interrupted(self: Interrupt, *ranks: Any) -> None:
        self.asked = metrics.exists() and len(metrics.read_text().splitlines()) == 2
        check(self, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", interrupted)
        with pytest.raises(Interrupted, match="run the same command to go on"):
            run_pipeline(pipeline, console=console)
    assert [path.name for path in (pipeline.folder / "sft" / "checkpoints").iterdir()] == ["step_000002"]
    record = run_pipeline(pipeline, console=console)
    assert record["stages"]["sft"]["seconds"] > 0 and "result" in record["stages"]["opd"]


def test_what_cannot_work_is_refused_before_anything_runs(
    load: Load, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path of the last stage, a folder of somebody else's, a pipeline that is running already."""
    monkeypatch.setattr(running, "_run", None)
    with pytest.raises(UserError, match=r"stage opd: teacher\.path = /no/such: there is no such file"):
        run_pipeline(load("opd.teacher.path=/no/such"), console=console)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "chain").mkdir(parents=True)
    lock = Lock(tmp_path / "runs" / "chain" / ".lock")
    with pytest.raises(UserError, match="is being written by process"):
        run_pipeline(load(), console=console)
    lock.release()
    (tmp_path / "runs" / "chain" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"is a folder of something else \(it has no pipeline\.json\)"):
        run_pipeline(load(), console=console)
    for text in ("", "[]", '{"name": "chain"}', '{"stages": {"sft": 3}}'):
        (tmp_path / "runs" / "chain" / "pipeline.json").write_text(text)
        with pytest.raises(UserError, match=r"pipeline\.json is no whole record of a pipeline"):
            run_pipeline(load(), console=console)


def test_a_teacher_that_can_only_be_rejected_stops_it(load: Load, console: Console) -> None:
    """Random weights answer nothing right; an empty file of answers is no result."""
    with pytest.raises(UserError, match=r"stage answers kept no answer: .*rejected\.jsonl"):
        run_pipeline(load('answers.reject=["wrong"]', "answers.attempts=1"), console=console)


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on(load: Load, tmp_path: Path) -> None:
    """kill -9 of `opdkit pipeline` while it trains, then the same command: the bits of a pipeline left alone."""
    whole, cut = load(name="whole"), load(name="cut")
    command = [sys.executable, "-m", "opdkit.cli", "pipeline"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, str(whole.file)], env=environment).returncode == 0
    process = subprocess.Popen([*command, str(cut.file)], env=environment)
    metrics = cut.folder / "opd" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run([*command, str(cut.file)], env=environment).returncode == 0
    assert bits(cut) == bits(whole)


PROTOCOL = """
name = "protocol"
runs_dir = "{runs}"

[[stage]]
name = "pw"
kind = "train"
[stage.recipe]
model = {{ path = "{student}", dtype = "float32", device = "cpu", lora = {{ r = 2, alpha = 4 }} }}
data = {{ train = "arithmetic:merge-3:train", task = "arithmetic", limit = 8 }}
context = {{ kind = "reference_solution", template = "prefix" }}
sampling = {{ max_answer_tokens = 6, group_size = 1 }}
method = {{ name = "pw_opsd" }}
train = {{ steps = 3, problems_per_step = 2, save_every = 1, keep_checkpoints = {keep} }}

[[stage]]
name = "merged"
kind = "export"
run = "{of}"
step = 2

[[stage]]
name = "result"
kind = "evaluate"
model = "{{merged}}"
data = "arithmetic:merge-3:test"
task = "arithmetic"
limit = 2
n = 1
max_answer_tokens = 6
device = "cpu"
"""


def test_a_protocol_that_evaluates_an_earlier_checkpoint(
    models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    """As PW-OPSD's: three steps, the adapter of step 2 merged, that model evaluated; `.complete` says that it is ready.
    Refused before anything runs where the checkpoint will not be there."""

    def write(keep: int, of: str) -> Path:
        path = tmp_path / "protocol.toml"
        path.write_text(PROTOCOL.format(runs=tmp_path / "runs", keep=keep, of=of, **models))
        return path

    with pytest.raises(UserError, match="step = 2 will not be there: stage pw keeps the checkpoints of steps 3 "):
        load_pipeline(write(1, "{pw}"))
    with pytest.raises(UserError, match="is no earlier stage that trains"):
        load_pipeline(write(2, "{pw}/model"))
    record = run_pipeline(load_pipeline(write(2, "{pw}")), console=console)
    merged = tmp_path / "runs/protocol/merged/model"
    assert (merged / ".complete").is_file() and not (merged / "adapter_config.json").exists()
    assert "2 steps" in (merged / "README.md").read_text()
    assert record["stages"]["result"]["numbers"]["eval"]
