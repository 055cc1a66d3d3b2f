"""The model of a checkpoint that several ranks have written, as others load it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from some_runs import trained, weights
from transformers import AutoModelForCausalLM

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import Recipe
from opdkit.training.saved.export import export

pytestmark = pytest.mark.ranks
STRATEGIES = ["gathered", "sharded"]


@pytest.mark.parametrize(("strategy", "lora"), [("gathered", False), ("sharded", False), ("sharded", True)])
def test_what_two_ranks_trained_is_exported(
    strategy: str, lora: bool, recipe: Callable[..., Recipe], tmp_path: Path, console: Console
) -> None:
    """To the bit; an adapter that ranks kept in parts is merged."""
    keys = ("train.steps=2", f"parallel.strategy={strategy}", *(("model.lora={r=4, alpha=8}",) if lora else ()))
    run = trained(recipe("opd", *keys), "--ranks", "2")
    proof = export(run, tmp_path / "out", dtype="float32", console=console)
    assert proof.of_run and proof.files.most == 0 and (proof.merged is not None) == lora
    assert proof.rounded.most <= (1e-5 if lora else 0)  # beside base and adapter, which are merged
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "Qwen3ForCausalLM"
    if not lora:
        for name, weight in weights(run, 2).items():
            assert torch.equal(again.get_parameter(name), weight), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_rank_holds_the_model_twice(
    strategy: str, recipe: Callable[..., Recipe], on_ranks: Any, tmp_path: Path
) -> None:
    """While it is loaded from bfloat16: one in float32, and a layer. Beside its parts, while a checkpoint is written:
    the first rank one whole model, the other a tensor at a time. The export: the model in float32, and at last half of
    it, in bfloat16."""
    model = tmp_path / "model"
    make_model(model, tokenizer=char_tokenizer("0123456789+="), hidden_size=512, num_layers=8, seed=0, max_positions=96)
    size = (model / "model.safetensors").stat().st_size
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)  # as published ones are
    job = {"recipe": recipe("opd", f"model.path={model}", f"parallel.strategy={strategy}").as_dict()}
    held = on_ranks(job, 2, Path(__file__).with_name("save_on_ranks.py"))
    shares = [used / size for used in (*held["saving"], held["exporting"], *held["loading"])]
    said = "saving {:.2f} and {:.2f}, exporting {:.2f}, loading {:.2f} and {:.2f}".format(*shares)
    print(f"\n{strategy}, {size / 1e6:.0f} MB: {said}")
    assert shares[0] < 1.3 and shares[1] < 0.3 and shares[2] < 1.8
    assert max(shares[3:]) < 1.4
