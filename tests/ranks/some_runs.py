"""Whole runs of `opdkit train`, as commands in forks (`forked.py`), and what is read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from forked import opdkit
from safetensors.torch import load_file

from opdkit import toml
from opdkit.recipe import Recipe


def command(recipe: Recipe, *flags: str) -> list[str]:
    path = Path(recipe.runs_dir).parent / f"{recipe.name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml.dumps(recipe.as_dict()))
    return ["train", str(path), *flags]


def trained(recipe: Recipe, *flags: str) -> Path:
    done = opdkit(*command(recipe, *flags))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return recipe.run_dir


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (folder / f"checkpoints/step_{step:06d}/model").glob("*.safetensors")
    return load_file(file)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
