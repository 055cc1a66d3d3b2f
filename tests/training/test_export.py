"""`opdkit export`: what others load is what was trained."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.training.loop import train
from opdkit.training.saved import export as exporting
from opdkit.training.saved.export import COMPLETE, export, push

KEYS = ("train.steps=2", "train.warmup_steps=0", "train.save_every=1", "train.lr=1e-2", "data.limit=8")
EVALUATED = ("eval.data=arithmetic:merge-3:test", "eval.limit=3", "eval.samples=2", "eval.teacher=false")


@pytest.fixture
def runs(recipe: Callable[..., Recipe], console: Console) -> Callable[..., Path]:
    def make(*keys: str) -> Path:
        chosen = recipe("opd", *KEYS, *keys)
        train(chosen, console=console)
        return chosen.run_dir

    return make


def test_a_full_run_is_exported_and_says_where_it_comes_from(
    runs: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    run, out = runs(*EVALUATED), tmp_path / "out"
    proof = export(run, out, dtype="bfloat16", license="mit", console=console)
    assert proof.of_run and proof.merged is None and proof.files.most == 0
    assert 0 < proof.rounded.mean < 0.05
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    trained = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000002" / "model")
    assert model.dtype == torch.bfloat16
    for name, weight in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), weight.to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained(out).vocab_size and model.generation_config.eos_token_id
    card = (out / "README.md").read_text()
    assert 'license: "mit"' in card and "| arithmetic:merge-3:test | 0." in card and "fingerprint `" in card
    assert 'name = "opd"' in card and "2 steps" in card
    assert (out / COMPLETE).read_text().startswith("opdkit ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".unfinished")]
    with pytest.raises(UserError, match="is there already"):
        export(run, out, console=console)
    with pytest.raises(UserError, match="no adapter; leave --adapter out"):
        export(run, tmp_path / "b", adapter=True, console=console)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .*; there are: "):
        export(run, tmp_path / "b", step=7, console=console)


def test_an_adapter_is_merged_in_float32_or_given_alone(
    runs: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    run = runs("model.lora={ r = 4, alpha = 8 }", "train.save_rows_every=0")
    proof = export(run, tmp_path / "merged", dtype="float32", console=console)
    assert not proof.of_run and proof.merged is not None and 0 < proof.merged.most < 1e-4
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    alone = export(run, tmp_path / "adapter", adapter=True, console=console)
    assert alone.merged is None and alone.files.most == 0 and alone.rounded.most == 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_a_merge_or_a_file_that_gives_other_numbers_is_not_exported(
    runs: Callable[..., Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a merge without the adapter's scale, and files that lost a weight's last bits."""
    run, out = runs("model.lora={ r = 4, alpha = 8 }"), tmp_path / "out"
    load = exporting._load

    def wrong(*args: Any) -> Any:
        student = load(*args)
        original = student.module.merge_and_unload

        def merge(**how: Any) -> Any:
            for name, weight in student.module.named_parameters():
                if "lora_B" in name:
                    weight.data *= 2
            return original(**how)

        student.module.merge_and_unload = merge
        return student

    monkeypatch.setattr(exporting, "_load", wrong)
    with pytest.raises(UserError, match="merging the adapter moved a log-prob"):
        export(run, out, console=console)
    monkeypatch.setattr(exporting, "_load", load)
    read = exporting.load_checkpoint

    def changed(*args: Any, **how: Any) -> Any:
        module, *rest = read(*args, **how)
        module.get_output_embeddings().weight.data *= 1.01
        return module, *rest

    monkeypatch.setattr(exporting, "load_checkpoint", changed)
    with pytest.raises(UserError, match="give other log-probs than the model"):
        export(run, out, console=console)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".unfinished")]


def test_a_number_that_the_type_lacks_is_not_exported(
    runs: Callable[..., Path], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e5 is infinite in float16; what differs by no number is no proof."""
    run, load = runs(), exporting._load

    def large(*args: Any) -> Any:
        student = load(*args)
        student.head().weight_VH.data[0, 0] = 1e5
        return student

    monkeypatch.setattr(exporting, "_load", large)
    with pytest.raises(UserError, match=r"holds numbers that float16 has no room for \(up to 1e\+05\)"):
        export(run, tmp_path / "out", dtype="float16", console=console)
    assert not (tmp_path / "out").exists()


def test_only_a_whole_export_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="not a whole export"):
        push(tmp_path / "half", "me/mine")
    (tmp_path / "half" / COMPLETE).touch()
    with pytest.raises(UserError, match="--push not a name: the hub did not take it"):
        push(tmp_path / "half", "not a name")


def test_a_damaged_checkpoint_is_said(runs: Callable[..., Path], tmp_path: Path, console: Console) -> None:
    run = runs()
    newest, before = (run / "checkpoints" / f"step_00000{n}" for n in (2, 1))
    assert before.is_dir()
    weights = newest / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match="step_000002 is damaged"):
        export(run, tmp_path / "out", step=2, console=console)
    export(run, tmp_path / "out", console=console)
    assert "1 steps" in (tmp_path / "out" / "README.md").read_text()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        export(run, tmp_path / "other", console=console)


def write_shards(rank: int, shape: tuple[int, ...], model: str, out: str, port: int, axis: str) -> None:
    """In a process of its own: this rank's part, as verl saves it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = int(np.prod(shape))
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    outer = Shard(1) if axis == "two" else Replicate()
    placements = [*([outer] * (len(shape) - 1)), Shard(0)]
    dealt = {
        k: distribute_tensor(v, mesh, placements if v.ndim > 1 else [Replicate()] * (len(shape) - 1) + [Shard(0)])
        for k, v in state.items()
    }
    torch.save(dealt, f"{out}/model_world_size_{ranks}_rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def make(*shape: int, axis: str = "one") -> Path:
        if (shape, axis) not in made:
            folder = tmp_path_factory.mktemp("verl") / "global_step_7"
            shutil.copytree(models["student"], folder / "actor/huggingface")
            (folder / "actor/huggingface/model.safetensors").unlink()
            with socket.socket() as one:
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
            work = (shape, str(models["student"]), str(folder / "actor"), port, axis)
            torch.multiprocessing.start_processes(write_shards, work, nprocs=int(np.prod(shape)), start_method="fork")
            made[shape, axis] = folder
        return made[shape, axis]

    return make


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["fsdp", "hsdp"])
def test_shards_of_verl_are_put_together(
    shape: tuple[int, ...], shards: Callable[..., Path], models: dict[str, Path], tmp_path: Path, console: Console
) -> None:
    """To the bit, also where the rows do not divide among the ranks. Not with files of verl itself."""
    out = tmp_path / "out"
    proof = export(shards(*shape), out, dtype="float32", console=console)
    assert proof.files.most == 0 == proof.rounded.most
    whole = AutoModelForCausalLM.from_pretrained(models["student"]).state_dict()
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert (out / COMPLETE).is_file() and "another trainer" in (out / "README.md").read_text()


class Run:
    """What a hostile pickle would call."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/opdkit-was-here",)


def test_shards_that_are_not_whole_or_ask_for_code_are_refused(
    shards: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    def refused(change: Callable[[Path], Any], match: str, *shape: int, axis: str = "one") -> None:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shards(*shape or (3,), axis=axis), folder)
        change(folder / "actor")
        with pytest.raises(UserError, match=match):
            export(folder, tmp_path / "out", console=console)
        assert not (tmp_path / "out").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["copy"]

    name = "model_world_size_3_rank_1.pt"
    refused(lambda actor: (actor / name).unlink(), "lacks the shards of 1 of 3 ranks .first: rank 1")
    refused(lambda actor: torch.save({"x": Run()}, actor / name), "more than tensors")
    assert not Path("/tmp/opdkit-was-here").exists()
    refused(lambda actor: (actor / name).write_bytes(b"PK\x03\x04"), "not whole")
    refused(lambda actor: torch.save([1], actor / name), "no table of tensors")
    refused(lambda actor: torch.save({}, actor / name), "other parameters")
    refused(lambda actor: shutil.copy(actor / name, actor / "model_world_size_2_rank_0.pt"), "2 and 3 ranks")
    refused(lambda actor: shutil.copy(actor / "model_world_size_3_rank_0.pt", actor / name), "hold the same shards")
    refused(lambda actor: shutil.rmtree(actor / "huggingface"), "no huggingface/config.json")
    refused(lambda actor: None, "over one axis", 2, 2, axis="two")


def test_nothing_is_uploaded_unasked(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub hears of an export only with --push, and then as of a private repository."""
    import huggingface_hub
    from typer.testing import CliRunner

    from opdkit.cli.base import app

    heard: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, name: str, **how: Any) -> None:
            heard.append((name, how["private"]))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> Any:
            heard.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return type("Commit", (), {"repo_url": f"hub/{repo_id}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run = runs("train.save_rows_every=0")
    CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "a")], catch_exceptions=False)
    assert not heard
    said = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "b"), "--push", "me/m"])
    assert heard[0] == ("me/m", True) and heard[1][0] == "me/m" and ".complete" in heard[1][1]
    assert "hub/me/m" in said.output
