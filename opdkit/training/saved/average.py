"""The mean of the weights of a run's last checkpoints, as a model of its own: checkpoints/average/model.

Every floating-point tensor is added up in float64 and written as it was (float32); all else is the newest checkpoint's.
(Izmailov et al. 2018, arXiv:1803.05407, of a constant or cyclic learning rate.)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opdkit.run.folder import sync_folder
from opdkit.training.saved import checkpoint


def average(folder: Path, num: int) -> tuple[Path, list[int]]:
    """Write `folder/average`, of the last `num` checkpoints that are there; (its model, their steps). Whole or not."""
    steps = checkpoint.steps(folder)[-num:]
    models = [folder / f"step_{step:06d}" / "model" for step in steps]
    target, unfinished = folder / "average", folder / ".unfinished-average"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(models[-1], unfinished / "model")
    for file in sorted((unfinished / "model").glob("*.safetensors")):
        with safe_open(file, framework="pt") as newest:
            metadata = newest.metadata()
        save_file(_means([model / file.name for model in models]), file, metadata)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    sync_folder(folder)
    return target / "model", steps


def weights_of(model: Path) -> Mapping[str, Tensor]:
    """Of a model's folder, by the names they have there."""
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118  (it is no mapping)
    return found


def _means(files: Sequence[Path]) -> dict[str, Tensor]:
    with ExitStack() as opened:
        parts = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
        found = {}
        for key in parts[-1].keys():  # noqa: SIM118  (it is no mapping)
            newest = parts[-1].get_tensor(key)
            if newest.is_floating_point():
                total = torch.zeros_like(newest, dtype=torch.float64)
                for part in parts:
                    total += part.get_tensor(key)
                newest = (total / len(parts)).to(newest.dtype)
            found[key] = newest
        return found
