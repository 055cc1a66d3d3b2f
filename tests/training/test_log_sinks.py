"""`log.sinks`, with the real services' libraries where they are installed: a run, and the same run resumed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.errors import Interrupted
from opdkit.metric_lines import read_metrics
from opdkit.metrics import Metric, MetricsLog
from opdkit.recipe import Recipe
from opdkit.reporting.run import read_run
from opdkit.training import evaluations
from opdkit.training.loop import train

EVALUATED = ('eval.data="arithmetic:merge-3:test"', "eval.limit=4", "eval.samples=2", "eval.every=2", "train.steps=4")


def test_one_key_sends_a_run_to_tensorboard(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Every metric that metrics.jsonl knows at every step, under its own name."""
    pytest.importorskip("tensorboard", reason="pip install 'opdkit[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe("opd", 'log.sinks=["tensorboard"]', *EVALUATED, "train.steps=2")
    train(made, console=Console(file=io.StringIO()))
    events = EventAccumulator(str(made.run_dir / "tensorboard"))
    events.Reload()
    assert {"train/loss", "rollout/reward", "student/entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/arithmetic_merge-3_test/avg_at_n_low")] == [0, 2]


def told(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for clocks and memory."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time", "memory"))}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_evaluations_are_metrics_of_their_step(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """In metrics.jsonl and in eval/ the same numbers, at the same steps; a run stopped in an evaluation and resumed has
    the same lines; the report and `watch` count steps, not lines."""
    made = recipe("opd", *EVALUATED)
    summary = train(made, console=Console(file=io.StringIO()))
    lines = told(made.run_dir)
    name = "eval/arithmetic_merge-3_test"
    assert [(line["step"], f"{name}/avg_at_n" in line) for line in lines if line["step"] in (0, 2, 4)] == [
        (0, True), (0, False), (2, False), (2, True), (4, False), (4, True),
    ]  # fmt: skip
    assert "eval_teacher/arithmetic_merge-3_test/pass_at_2" in lines[1]
    found = summary["eval"]["student_after"]["arithmetic:merge-3:test"]
    for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
        assert lines[-1][f"{name}/avg_at_n{end}"] == found["avg_at_n"][key]
        assert lines[-1][f"{name}/pass_at_1{end}"] == found["pass_at_k"]["1"][key]
    assert lines[-1][f"{name}/num_truncated"] == found["num_truncated"]
    assert len(read_run(made.run_dir).metrics) == 4

    stopped = recipe("opd", *EVALUATED, "name=stopped")
    real, calls = evaluations.sample_answers, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # after the student's first and the teacher's: that of step 2
            raise Interrupted
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluations, "sample_answers", stop)
    with pytest.raises(Interrupted):
        train(stopped, console=Console(file=io.StringIO()))
    assert told(stopped.run_dir) == lines[:4]
    train(stopped, console=Console(file=io.StringIO()), resume=True)
    assert told(stopped.run_dir) == lines


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_and_its_resumption(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: nothing fails, nothing leaves the machine. What the services show is theirs, and not looked at here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name, reason=f"{name} is not installed here: pip install 'opdkit[{name}]'")
    for resume_at in (0, 2):
        path = tmp_path / "metrics.jsonl"
        with MetricsLog(path, sinks=[name], resume_at=resume_at, run_name="r", config={"api_key": "s3cret"}) as log:
            for step in range(resume_at + 1, resume_at + 4):
                log.write(step, [Metric("train/loss", 1 / step), Metric("train/lost", None)])
        assert log.sink_failures == {}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "metrics.jsonl"]
    assert files and not any(b"s3cret" in path.read_bytes() for path in files)
