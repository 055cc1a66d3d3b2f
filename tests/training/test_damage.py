"""What a run folder survives: damaged checkpoints, lost lines, a machine and a place that are other ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from opdkit.errors import UserError
from opdkit.recipe import Recipe, TrainSection
from opdkit.run import environment
from opdkit.run import folder as run_folder
from opdkit.training import loop
from opdkit.training.loop import train
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.saved import checkpoint

Make = Callable[..., Recipe]
EMA = ("opsd", "teacher.weights=ema", "teacher.ema_rate=0.1", "train.steps=4", "train.schedule=constant")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign_tensor(path: Path) -> None:
    save_file({**load_file(path), "of/somebody/else": torch.zeros(2)}, path)


def only_foreign(path: Path) -> None:
    save_file({"of/somebody/else": torch.zeros(2)}, path)


DAMAGE = [
    ("optimizer.safetensors", flip),
    ("optimizer.safetensors", foreign_tensor),
    ("optimizer.safetensors", only_foreign),
    ("teacher.safetensors", cut),
    ("teacher.safetensors", Path.unlink),
    ("model/model.safetensors", flip),
    ("model/tokenizer.json", cut),
    ("state.json", cut),
    ("state.json", lambda path: path.write_text("")),
    ("state.json", lambda path: path.write_text("[" * 20000)),
    ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\xfe")),
    ("SHA256SUMS", Path.unlink),
]


@pytest.fixture(scope="module")
def bits() -> dict[str, bytes]:
    return {}


def last(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "step_000004"
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name: str, damage: Callable[[Path], Any], recipe: Make, console: Console, bits: dict[str, bytes]
) -> None:
    """The run ends with the bits it would have had, the damaged folder is kept, and the summary says so."""
    chosen = recipe(*EMA)
    train(chosen, console=console)
    if not bits:
        bits.update(last(chosen.run_dir))
    newest = chosen.run_dir / "checkpoints" / "step_000004"
    damage(newest / name)
    summary = train(chosen, console=console, resume=True)
    (said,) = (words for words in summary["warnings"] if "is damaged" in words)
    assert Path(name).name in said and "step_000002" in said
    assert last(chosen.run_dir) == bits
    assert newest.with_name("step_000004.damaged").is_dir()


def test_where_no_checkpoint_is_whole_the_run_stops(recipe: Make, console: Console) -> None:
    """Before a model is loaded, with both named, and nothing renamed."""
    chosen = recipe(*EMA)
    train(chosen, console=console)
    for path in (chosen.run_dir / "checkpoints").glob("*/optimizer.safetensors"):
        flip(path)
    with pytest.raises(UserError, match=r"no checkpoint .*step_000004: optimizer.*step_000002: optimizer.*--overwrite"):
        train(chosen, console=console, resume=True)
    assert len(list((chosen.run_dir / "checkpoints").glob("step_00000?"))) == 2


def test_a_checkpoint_from_before_the_checksums_is_read(recipe: Make, console: Console) -> None:
    """As version 0.1 wrote it; what can be known of it without sums is still looked at."""
    chosen = recipe(*EMA)
    whole = train(chosen, console=console)
    for folder in (chosen.run_dir / "checkpoints").iterdir():
        (folder / "SHA256SUMS").unlink()
        state = json.loads((folder / "state.json").read_text()) | {"version": 1}
        (folder / "state.json").write_text(json.dumps(state))
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == 4 and not saved.damaged
    cut(saved.path / "optimizer.safetensors")
    saved = checkpoint.latest(chosen.run_dir / "checkpoints")
    assert saved is not None and saved.step == 2
    assert whole["steps"] == 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_takes_exactly_its_own_tensors(kind: str) -> None:
    """What torch keeps is what is saved, parameters without a gradient included; one tensor more, less or of another
    shape is refused, and nothing is changed."""
    module = torch.nn.Linear(3, 2)
    section = TrainSection.model_validate({"steps": 3, "optimizer": kind})
    optimizer = Optimizer(module, section, compute_dtype=torch.float32)
    assert optimizer.state() == {}
    module.weight.grad = torch.ones(2, 3)
    optimizer.step(0)
    state = optimizer.state()
    assert {name.partition("/")[0] for name in state} == {"weight", "bias"}
    other = Optimizer(module, section, compute_dtype=torch.float32)
    other.load_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    name = next(iter(state))
    for wrong in (
        {**state, "foreign/exp_avg": torch.zeros(2)},
        {key: value for key, value in state.items() if key != name},
        {**state, name: torch.zeros(7)},
        {"foreign": torch.zeros(2)},
    ):
        with pytest.raises(UserError, match="does not fit the model"):
            other.load_state(wrong)


def test_lost_lines_and_another_library_are_said(
    recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe("sft", "train.steps=4", "train.schedule=constant")
    train(chosen, console=console)
    metrics = chosen.run_dir / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    described = environment.describe_environment()
    older = described | {"versions": described["versions"] | {"torch": "1.0"}}
    monkeypatch.setattr(run_folder, "describe_environment", lambda devices: older)
    longer = chosen.model_copy(update={"train": chosen.train.model_copy(update={"steps": 5})})
    said = " ".join(train(longer, console=console, resume=True)["warnings"])
    assert "has lost lines: 4 steps were taken, and it has 1 of them" in said
    assert "torch was" in said and "is 1.0" in said


def test_memory_and_place_may_change(recipe: Make, console: Console, tmp_path: Path, models: dict[str, Path]) -> None:
    """Micro-batches, sampling batches, checkpointed activations, the device, the run's folder and the teacher's path;
    said, and kept in environment.json. Another model at the new path is refused."""
    chosen = recipe("opd", "train.steps=2", "train.schedule=constant")
    train(chosen, console=console)
    chosen.run_dir.rename(tmp_path / "runs" / "moved")
    teacher, other = tmp_path / "elsewhere", tmp_path / "other"
    shutil.copytree(models["teacher"], teacher)
    shutil.copytree(models["student"], other)
    keys = (
        "opd", "train.steps=3", "train.schedule=constant", "name=moved", "train.max_tokens_per_micro_batch=64",
        "sampling.max_tokens_per_batch=64", "model.gradient_checkpointing=true", "model.device=auto",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"teacher\.path was .*, is "):
        train(recipe(*keys, f"teacher.path={other}"), console=console, resume=True)
    summary = train(recipe(*keys, f"teacher.path={teacher}"), console=console, resume=True)
    assert summary["steps"] == 3
    (said,) = (words for words in summary["warnings"] if "last bits" in words)
    assert "train.max_tokens_per_micro_batch (was 4096, is 64)" in said
    changed = json.loads((tmp_path / "runs/moved/environment.json").read_text())["resumed"][-1]["changed"]
    assert changed["name"] == ["run", "moved"] and "teacher.path" in changed


def test_an_adapters_base_may_be_moved(recipe: Make, console: Console, tmp_path: Path, models: dict[str, Path]) -> None:
    """The checkpoint's adapter names the base where it was; the recipe says where it is now."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(models["student"], base)
    keys = ("sft", "model.lora={r=2, alpha=4}", "train.schedule=constant")
    train(recipe(*keys, "train.steps=1", f"model.path={base}"), console=console)
    base.rename(moved)
    summary = train(recipe(*keys, "train.steps=2", f"model.path={moved}"), console=console, resume=True)
    config = json.loads((tmp_path / "runs/run" / summary["model"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


def test_the_lock_is_taken_before_models_load(recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a refused run leaves neither a folder nor a lock."""
    chosen = recipe("sft", "train.steps=1")
    monkeypatch.setattr(loop, "Parts", None)
    with run_folder.RunFolder.locked(chosen.run_dir), pytest.raises(UserError, match="is being written by"):
        train(chosen, console=console)
    assert not chosen.run_dir.parent.exists()


FILES = ("recipe.toml", "environment.json", "metrics.jsonl", "eval/step_000000.json", "eval/step_000000.jsonl")
CONTENTS = (b"", b"[]\n", b"3\n", b"[" * 20000, b"\x89PNG\r\n\xff", b'{"step": "x"}\n')


def test_no_broken_file_of_a_run_gives_a_traceback(recipe: Make, console: Console, tmp_path: Path) -> None:
    """Cut, empty, foreign, too deep, a folder: --resume goes on or refuses in a sentence. Reports: tests/reporting."""
    keys = ("sft", "train.steps=1", "train.schedule=constant", 'eval.data="arithmetic:merge-3:test"', "eval.limit=2")
    chosen = recipe(*keys, "eval.samples=1")
    train(chosen, console=console)
    kept = tmp_path / "kept"
    shutil.copytree(chosen.run_dir, kept)
    for name in FILES:
        whole = (kept / name).read_bytes()
        for content in (*CONTENTS, whole[: len(whole) // 2], None):
            shutil.rmtree(chosen.run_dir)
            shutil.copytree(kept, chosen.run_dir)
            path = chosen.run_dir / name
            path.unlink()
            path.mkdir() if content is None else path.write_bytes(content)
            try:
                train(chosen, console=console, resume=True)
            except UserError as error:
                assert Path(name).name in str(error) or "recipe" in str(error), (name, content, error)
