"""`log.sinks`, with the real services' libraries where they are installed: a run, and the same run resumed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from opdkit.metrics import Metric, MetricsLog
from opdkit.recipe import Recipe
from opdkit.training.loop import train


def test_one_key_sends_a_run_to_tensorboard(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Every metric that metrics.jsonl knows at every step, under its own name."""
    pytest.importorskip("tensorboard", reason="pip install 'opdkit[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe("opd", 'log.sinks=["tensorboard"]', "train.steps=2")
    train(made, console=Console(file=io.StringIO()))
    events = EventAccumulator(str(made.run_dir / "tensorboard"))
    events.Reload()
    assert {"train/loss", "rollout/reward", "student/entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


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
