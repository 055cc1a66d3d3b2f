"""What a recipe asks of devices, processes and optimizers that they cannot do, a sentence each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

from opdkit.errors import UserError
from opdkit.recipe.sections import Recipe, TrainSection
from opdkit.tasks.arithmetic import GENERATED, parts_of


def check_optimizer(train: TrainSection) -> None:
    """Raises UserError for an optimizer that is not installed on this machine."""
    if train.optimizer == "adamw_8bit" and find_spec("torchao") is None:
        raise UserError(
            "train.optimizer = \"adamw_8bit\" needs torchao, which is not installed; pip install 'opdkit[quantized]', "
            'or use "adamw"'
        )


def master_faults(recipe: Recipe, has_adapter: bool) -> Iterator[str]:
    if recipe.train.master_dtype == "bfloat16" and has_adapter:
        yield (
            'train.master_dtype = "bfloat16" is of full training, and an adapter is trained, in float32: it is small; '
            "remove the key"
        )
    elif recipe.train.master_dtype == "bfloat16" and recipe.model.dtype != "bfloat16":
        yield (
            f'train.master_dtype = "bfloat16" with model.dtype = "{recipe.model.dtype}" computes with digits that the '
            'weights do not have; set model.dtype = "bfloat16", or remove the key'
        )


def parallel_faults(recipe: Recipe) -> Iterator[str]:
    parallel = recipe.parallel
    for key in ("hsdp", "offload"):
        if getattr(parallel, key) and parallel.strategy != "sharded":
            yield (
                f"parallel.{key} is of layers that are kept in parts, and parallel.strategy = "
                f'"{parallel.strategy}"; set it to "sharded", or remove the key'
            )
    if parallel.strategy == "sharded" and recipe.model.activation_offload:
        yield (
            'model.activation_offload with parallel.strategy = "sharded" would move the gathered layers too; remove '
            "one of the two"
        )
    if parallel.offload and recipe.train.optimizer == "muon":
        yield (
            'parallel.offload = true keeps momenta in host memory, and train.optimizer = "muon" multiplies them on the '
            "device; remove one of the two"
        )


def flash_faults(recipe: Recipe) -> Iterator[str]:
    """Its kernels take 16-bit numbers and nothing else."""
    kind = recipe.model.attn_implementation or ""
    keys = {"model.dtype": recipe.model.dtype, "teacher.dtype": recipe.teacher.dtype}
    keys |= {f"views.{name}.teacher.dtype": view.teacher.dtype for name, view in recipe.views.items()}
    for key, dtype in keys.items():
        if "flash" in kind and dtype == "float32":
            yield (
                f'model.attn_implementation = "{kind}" computes in bfloat16 alone, and {key} = "float32"; set that to '
                '"bfloat16", or leave attn_implementation out'
            )


def place_faults(recipe: Recipe) -> Iterator[str]:
    """What is there already, and cannot be what it is named for."""
    for key, path in recipe.model_paths.items():
        if os.path.isfile(path):
            yield f"{key} = {path} is no folder; give a folder with a config.json, or a hub name"
    if os.path.lexists(recipe.runs_dir) and not os.path.isdir(recipe.runs_dir):
        yield f"runs_dir = {recipe.runs_dir} is no folder, and runs are written below it; name another"
    sets = [("data.train", one.path) for one in recipe.data.sets] + [("eval.data", s) for s in recipe.eval.sources]
    for key, source in sets:
        if source.startswith(GENERATED):
            try:
                parts_of(source)
            except UserError as error:
                yield f"{key} = {source}: {error}"
