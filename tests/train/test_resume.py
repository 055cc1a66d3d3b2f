"""Whatever ends a run, `--resume` goes on to the same bits."""

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

from opdkit import toml
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.train import checkpoint
from opdkit.train.loop import train

Make = Callable[..., Recipe]
EMA = ("opsd", "teacher.weights=ema", "teacher.ema_rate=0.1")

# Runs `opdkit train`, and dies by SIGKILL at the n-th call of one function.
DRIVER = """
import os, signal, sys
target, nth, *arguments = sys.argv[1:]
if target:
    import importlib
    module, _, name = target.rpartition(".")
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), [0]
    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, dying)
sys.argv = ["opdkit", *arguments]
from opdkit.cli import main
main()
"""


def run(recipe: Recipe, *flags: str, die_at: tuple[str, int] = ("", 0)) -> subprocess.CompletedProcess[str]:
    path = Path(recipe.runs_dir).parent / f"{recipe.name}.toml"
    path.write_text(toml.dumps(recipe.as_dict()))
    command = [sys.executable, "-c", DRIVER, die_at[0], str(die_at[1]), "train", str(path), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def everything(run_dir: Path, step: int) -> dict[str, Any]:
    """The bits of the last checkpoint, and the metrics without clocks."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    tensors = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    assert len(tensors) >= 3, "model, optimizer and teacher"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]
    return {"tensors": tensors, "metrics": metrics}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    "die_at",
    [
        ("opdkit.train.answers.sample_groups", 4),  # while the fourth step samples
        ("opdkit.train.step.backward", 6),  # with the checkpoint of step 4 two steps behind
        ("opdkit.train.checkpoint.save_file", 3),  # the second checkpoint half written
    ],
)
def test_killed_runs_resume_to_the_same_bits(
    die_at: tuple[str, int], recipe: Make, uninterrupted: dict[str, Any]
) -> None:
    """kill -9 in sampling, in the backward pass, in the middle of a checkpoint: weights, optimizer, EMA teacher and
    metrics end as if nothing had happened. One process, one machine; not across versions of torch."""
    chosen = recipe(*EMA)
    if not uninterrupted:
        done = run(chosen)
        assert done.returncode == 0, done.stderr
        uninterrupted.update(everything(chosen.run_dir, 6))
        chosen = recipe(*EMA, "name=again")
    killed = run(chosen, die_at=die_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(chosen, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert everything(chosen.run_dir, 6) == uninterrupted
    assert not list((chosen.run_dir / "checkpoints").glob(".unfinished*"))


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(recipe: Make) -> None:
    """SIGINT: exit status 130, a checkpoint of a whole step, and the command to continue, which then works."""
    chosen = recipe(*EMA, "train.steps=2000", "train.save_every=0")
    path = Path(chosen.runs_dir).parent / "long.toml"
    path.write_text(toml.dumps(chosen.as_dict()))
    command = [sys.executable, "-m", "opdkit.cli", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = chosen.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said and "Traceback" not in said
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == metrics.read_text().count("\n")
    resumed = run(
        chosen.model_copy(update={"train": chosen.train.model_copy(update={"steps": saved.step + 1})}), "--resume"
    )
    assert resumed.returncode == 0, resumed.stderr


def test_a_full_disk_keeps_the_last_checkpoint(recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space while the second checkpoint is written: one sentence, the first checkpoint is whole, no debris.
    The disk is not really full here; the error is the one the system gives."""
    original, calls = checkpoint.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    chosen = recipe(*EMA)
    with pytest.raises(UserError, match=r"No space left on device.*step_000002; make room and go on with --resume"):
        train(chosen, console=console)
    monkeypatch.undo()
    assert [p.name for p in (chosen.run_dir / "checkpoints").iterdir()] == ["step_000002"]
    train(chosen, console=console, resume=True)


def test_a_changed_recipe_is_not_resumed(recipe: Make, console: Console) -> None:
    """Another learning rate would be another run; more steps are welcome."""
    train(recipe("sft", "train.steps=2"), console=console)
    with pytest.raises(UserError, match=r"train\.lr was 0\.001, is 0\.5"):
        train(recipe("sft", "train.steps=4", "train.lr=0.5"), console=console, resume=True)
    summary = train(recipe("sft", "train.steps=4"), console=console, resume=True)
    assert summary["steps"] == 4


def test_an_existing_run_is_not_overwritten_unasked(recipe: Make, console: Console) -> None:
    train(recipe("sft", "train.steps=1"), console=console)
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train(recipe("sft", "train.steps=1"), console=console)
    train(recipe("sft", "train.steps=1"), console=console, overwrite=True)
