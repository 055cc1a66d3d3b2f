"""Runs that go back, pause and stop by their own numbers: tiny models that a high learning rate makes fall silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.errors import Paused, UserError
from opdkit.metric_lines import of_steps, read_metrics, went_back
from opdkit.recipe import Recipe
from opdkit.reporting.follow import Follower
from opdkit.reporting.page import write_report
from opdkit.training import loop
from opdkit.training.going_back import GoBack
from opdkit.training.loop import train
from opdkit.training.saved import checkpoint

Make = Callable[..., Recipe]
# Answers are 10 tokens long, and 4 in step 5. With an EMA teacher there is a state to come back, too.
KEYS = ("teacher.weights=ema", "teacher.ema_rate=0.1", "train.lr=0.05", "train.schedule=constant", "train.steps=6",
        "train.problems_per_step=4", "train.warmup_steps=0", "train.save_every=3", "diagnostics.every=0",
        "sentinels.window=1", "sentinels.length=2.2")  # fmt: skip
BACK = (*KEYS, "sentinels.action=rollback", "sentinels.lr_factor=0.001")


@pytest.fixture
def plain_console(capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(width=400, force_terminal=False)


def everything(run_dir: Path, step: int) -> dict[str, Any]:
    """The bits of the last checkpoint, its state, and the metrics without clocks."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    tensors = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    state = json.loads((folder / "state.json").read_text())
    state["counters"].pop("seconds")
    lines = read_metrics(run_dir / "metrics.jsonl")
    metrics = [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines]
    return {"tensors": tensors, "state": state, "metrics": metrics}


def test_a_run_goes_back_and_is_the_same_when_it_is_killed(
    recipe: Make, plain_console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once behind the line that decides it, before anything went back; once in the second try. Not tested here: kill -9
    within the removal of checkpoints."""
    whole = recipe("opsd", *BACK)
    summary = train(whole, console=plain_console)
    (back,) = went_back(read_metrics(whole.run_dir / "metrics.jsonl"))
    assert (
        back == (2, 5, 3, ("length",))
        and summary["counts"]["rollbacks"] == 1
        and summary["counts"]["steps_rolled_back"] == 2
    )
    assert summary["steps"] == 6 and "ended" not in summary and summary["counts"]["answers"] == 8 * 8
    state = everything(whole.run_dir, 6)["state"]
    assert state["attempt"] == 2 and state["lr_factor"] == 0.001
    rates = [line["train/lr"] for line in of_steps(read_metrics(whole.run_dir / "metrics.jsonl"))]
    assert rates == pytest.approx([0.05] * 3 + [5e-5] * 3)
    said = capsys.readouterr().out
    assert "went back to the checkpoint of step 3, and on with 0.001 times the learning rate (attempt 2)" in said
    page = write_report(whole.run_dir).read_text()
    assert "The run went back from step 5 to step 3 (sentinels.length; attempt 2)" in page
    seen = Follower(whole.run_dir).look()
    assert seen.state == "finished" and seen.step == 6 and len(seen.run.metrics) == 6

    again = recipe("opsd", *BACK, "name=again")

    def pulled_out(*_: Any) -> Any:
        raise RuntimeError("pulled out")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="pulled out"):
        patched.setattr(GoBack, "saved", pulled_out)
        train(again, console=plain_console)
    calls: list[int] = []
    step = loop.train_step

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        return pulled_out() if len(calls) == 5 else step(*arguments)  # 4 and 5, then 4, 5 of the second try, and 6

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="pulled out"):
        patched.setattr(loop, "train_step", dies)
        train(again, console=plain_console, resume=True)
    assert checkpoint.latest(again.run_dir / "checkpoints").attempt == 2  # type: ignore[union-attr]
    train(again, console=plain_console, resume=True)
    assert everything(again.run_dir, 6) == everything(whole.run_dir, 6)


def test_a_run_pauses_goes_on_and_stops(recipe: Make, plain_console: Console, capsys: Any) -> None:
    """A pause saves the step; going on is not paused by the same finding. A stop evaluates and ends; so does going on
    with it, until the action is another one."""
    paused = recipe("opsd", *KEYS, "sentinels.action=pause", "train.save_every=0")
    with pytest.raises(Paused, match=r"step 5: answers are .* of what they were .*\(sentinels.length\)"):
        train(paused, console=plain_console)
    assert checkpoint.steps(paused.run_dir / "checkpoints") == [5]
    assert Follower(paused.run_dir).look().state == "stopped"
    with pytest.raises(UserError, match=r"train\.lr was"):
        train(recipe("opsd", *KEYS, "train.lr=0.01"), console=plain_console, resume=True)
    stopped = recipe("opsd", *KEYS, "sentinels.action=stop", "train.save_every=0")
    for _ in range(2):
        summary = train(stopped, console=plain_console, resume=True)
        assert summary["ended"]["step"] == summary["steps"] == 5 and "sentinels.length" in summary["ended"]["why"]
        assert summary["model"] == "checkpoints/step_000005/model"
        assert Follower(paused.run_dir).look().state == "finished"
    done = train(recipe("opsd", *KEYS, "train.save_every=0"), console=plain_console, resume=True)
    assert done["steps"] == 6 and "ended" not in done


def test_too_many_rollbacks_stop_and_the_start_is_a_place_to_go_back_to(recipe: Make, plain_console: Console) -> None:
    """No checkpoint is old enough: back to the model as it came, of which there is a checkpoint then."""
    chosen = recipe("opsd", *BACK, "train.save_every=6", "sentinels.lr_factor=1.0", "sentinels.max_rollbacks=1")
    summary = train(chosen, console=plain_console)
    assert went_back(read_metrics(chosen.run_dir / "metrics.jsonl")) == [(2, 5, 0, ("length",))]
    assert summary["ended"]["step"] == 5 and checkpoint.steps(chosen.run_dir / "checkpoints") == [0, 5]
