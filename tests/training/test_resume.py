"""Whatever ends a run, `--resume` goes on to the same bits."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdkit import toml
from opdkit.errors import Interrupted, UserError
from opdkit.recipe import Recipe
from opdkit.run.console import Interrupt
from opdkit.training.loop import train
from opdkit.training.saved import checkpoint

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
    metrics = [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines]
    return {"tensors": tensors, "metrics": metrics}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {}


BEHIND = "train.save_in_background=true"


@pytest.mark.parametrize(
    ("die_at", "how"),
    [
        (("opdkit.training.step.backward", 6), (BEHIND,)),  # with the checkpoint of step 4 two steps behind
        (("opdkit.training.saved.checkpoint.save_file", 3), ()),  # the second checkpoint half written
    ],
)
def test_killed_runs_resume_to_the_same_bits(
    die_at: tuple[str, int], how: tuple[str, ...], recipe: Make, uninterrupted: dict[str, Any]
) -> None:
    """kill -9 in the backward pass and in the middle of a checkpoint: weights, optimizer, EMA teacher and metrics end
    as if nothing had happened; `make test-faults` kills at every event. Not across versions of torch."""
    chosen = recipe(*EMA)
    if not uninterrupted:
        done = run(chosen)
        assert done.returncode == 0, done.stderr
        uninterrupted.update(everything(chosen.run_dir, 6))
    chosen = recipe(*EMA, *how, "name=again")
    killed = run(chosen, die_at=die_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(chosen, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert everything(chosen.run_dir, 6) == uninterrupted
    assert not list((chosen.run_dir / "checkpoints").glob(".unfinished*"))


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(recipe: Make) -> None:
    """SIGINT: exit status 130, a checkpoint of a whole step, and the command to continue, which then works."""
    chosen = recipe(*EMA, "train.steps=2000", "train.save_every=0", "train.schedule=constant")
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


def test_what_is_saved_behind_the_run_is_of_the_moment(
    recipe: Make, start: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The writer is held up until weights, moments and average have moved."""
    parts, go_on = start(recipe(*EMA)).parts, threading.Event()
    parts.optimizer.reserve()
    kept = {"optimizer": parts.optimizer.state(), "teacher": parts.teacher.state()}
    wanted = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in kept.items()}
    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *what: (go_on.wait(60), original(*what)))
    how: dict[str, Any] = {"counters": {}, "pass_rates": {}, "keep": 1, "in_background": True}
    whole = checkpoint.save(tmp_path, step=1, model=parts.student, weights=None, **kept, **how)
    for tensor in (t for tensors in kept.values() for t in tensors.values()):
        tensor.add_(1)
    assert checkpoint.latest(tmp_path) is None
    go_on.set()
    whole()
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and not list(tmp_path.glob(".*"))
    for name, tensors in wanted.items():
        found = saved.tensors(name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("how", [(), (BEHIND,)])
def test_a_full_disk_keeps_the_last_checkpoint(
    how: tuple[str, ...], recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space while the second checkpoint is written: one sentence, the first checkpoint is whole, no debris.
    The disk is not really full here; the error is the one the system gives."""
    original, calls = checkpoint.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    chosen = recipe(*EMA, *how)
    with pytest.raises(UserError, match=r"No space left on device.*step_000002; make room and go on with --resume"):
        train(chosen, console=console)
    monkeypatch.undo()
    assert [p.name for p in (chosen.run_dir / "checkpoints").iterdir()] == ["step_000002"]
    train(chosen, console=console, resume=True)


def test_a_changed_recipe_is_not_resumed(recipe: Make, console: Console) -> None:
    """Another learning rate would be another run, and so would more steps of a schedule that ends with the last one; at
    a constant rate more steps are welcome, fewer than were taken are not."""
    constant = "train.schedule=constant"
    train(recipe("sft", "train.steps=2", constant), console=console)
    with pytest.raises(UserError, match=r"train\.lr was 0\.001, is 0\.5"):
        train(recipe("sft", "train.steps=4", "train.lr=0.5", constant), console=console, resume=True)
    with pytest.raises(UserError, match=r"train\.steps is 1, and 2 are taken"):
        train(recipe("sft", "train.steps=1", constant), console=console, resume=True)
    longer = train(recipe("sft", "train.steps=4", constant), console=console, resume=True)
    assert longer["steps"] == 4
    assert not any("was not evaluated" in warning for warning in longer["warnings"])  # there is nothing to evaluate on
    train(recipe("sft", "train.steps=2", "name=cosine"), console=console)
    with pytest.raises(UserError, match=r"train\.steps was 2, is 4"):
        train(recipe("sft", "train.steps=4", "name=cosine"), console=console, resume=True)


def test_a_run_from_before_a_key_is_there_is_resumed(recipe: Make, console: Console) -> None:
    """It ran with what is the key's default now; a value that is no default is another run still."""
    chosen = recipe("sft", "train.steps=2", "train.schedule=constant")
    train(chosen, console=console)
    file = chosen.run_dir / "recipe.toml"
    lines = file.read_text().splitlines()
    later = ("master_dtype", "weight_decay", "lag", "max_prompt_tokens")
    kept = [line for line in lines if line.partition(" = ")[0] not in later]
    assert len(kept) <= len(lines) - 3
    file.write_text("\n".join(kept))
    with pytest.raises(UserError, match=r"train\.weight_decay was 0\.0\d*, is 0\.5"):
        train(
            recipe("sft", "train.steps=3", "train.schedule=constant", "train.weight_decay=0.5"),
            console=console,
            resume=True,
        )
    assert train(recipe("sft", "train.steps=3", "train.schedule=constant"), console=console, resume=True)["steps"] == 3


def test_an_interrupted_evaluation_loses_no_step_and_is_made_up(
    recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the evaluation after step 2: step 2 is saved although no checkpoint was due, and the resumed run has
    every evaluation, with the numbers of a run that was left alone."""
    keys = ("train.save_every=0", "eval.data=arithmetic:merge-3:test", "eval.limit=4", "eval.samples=2", "eval.every=2")
    whole = recipe("sft", *keys, "name=whole")
    train(whole, console=console)
    chosen, heard = recipe("sft", *keys), []
    check = Interrupt.check

    def interrupted(self: Interrupt, *ranks: Any) -> None:
        metrics = chosen.run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"train/loss"') == 2:
            heard.append(1)
        self.asked = len(heard) == 4  # once after the step; then after tokens of the evaluation
        check(self, *ranks)

    monkeypatch.setattr(Interrupt, "check", interrupted)
    with pytest.raises(Interrupted):
        train(chosen, console=console)
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == 2
    assert not (chosen.run_dir / "eval" / "step_000002.json").exists()
    assert len(heard) == 4
    monkeypatch.setattr(Interrupt, "check", check)
    train(chosen, console=console, resume=True)
    for path in sorted((whole.run_dir / "eval").iterdir()):
        assert (chosen.run_dir / "eval" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("where", ["sampling", "scoring", "learning"])
def test_no_memory_is_a_sentence_and_the_run_goes_on(
    where: str, recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step a device gives no more memory: the settings that help are named, and with them `--resume` ends
    as a run that had enough."""
    owner, name = {
        "sampling": ("opdkit.engines.hf", "Slots"),
        "scoring": ("opdkit.engines.forward.scoring", "signals_of"),
        "learning": ("opdkit.losses", "head_loss"),
    }[where]
    module = importlib.import_module(owner)
    original, calls = getattr(module, name), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return original(*args, **kwargs)

    keys = ("train.save_every=1", "diagnostics.every=0", "train.steps=4")
    chosen, whole = recipe("opd", *keys), recipe("opd", *keys, "name=whole")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        with pytest.raises(
            UserError, match=rf"out of memory while {where} .*Tried to allocate 2.00 GiB.*max_tokens.*--resume"
        ):
            train(chosen, console=console)
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == 2
    train(recipe("opd", *keys, "sampling.max_tokens_per_batch=64"), console=console, resume=True)
    train(whole, console=console)
    losses = [
        [json.loads(line)["train/loss"] for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
        for one in (chosen, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_mistyped_model_costs_no_run(recipe: Make, console: Console) -> None:
    """--overwrite with a model that is not there: the old run still is. And a first run that never loaded leaves no
    folder in the way."""
    train(recipe("sft", "train.steps=1"), console=console)
    with pytest.raises(UserError, match="/no/such"):
        train(recipe("sft", "train.steps=1", "model.path=/no/such"), console=console, overwrite=True)
    assert checkpoint.latest(recipe("sft").run_dir / "checkpoints") is not None
    with pytest.raises(UserError, match="/no/such"):
        train(recipe("sft", "name=fresh", "model.path=/no/such"), console=console)
    train(recipe("sft", "name=fresh", "train.steps=1"), console=console)


def test_a_checkpoint_with_a_missing_file_is_refused(recipe: Make, console: Console) -> None:
    """Fresh optimizer moments would be another run."""
    constant = "train.schedule=constant"
    train(recipe("sft", "train.steps=1", constant), console=console)
    saved = checkpoint.latest(recipe("sft").run_dir / "checkpoints")
    assert saved is not None
    (saved.path / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer\.safetensors is missing"):
        train(recipe("sft", "train.steps=2", constant), console=console, resume=True)


def test_an_existing_run_is_not_overwritten_unasked(recipe: Make, console: Console) -> None:
    train(recipe("sft", "train.steps=1"), console=console)
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train(recipe("sft", "train.steps=1"), console=console)
    train(recipe("sft", "train.steps=1"), console=console, overwrite=True)
