"""How several ranks keep what is trained: the optimizer of one process, of gathered weights, of layers in parts."""

from __future__ import annotations

from pathlib import Path

import torch

from opdkit.cost.strategy import is_sharded
from opdkit.engines.load import pick_device
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.ranks.base import Ranks
from opdkit.ranks.group import Group
from opdkit.recipe import Recipe
from opdkit.training.models.gathered import GatheredOptimizer
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.student import load_student


def is_in_parts(recipe: Recipe, ranks: Ranks) -> bool:
    """As the recipe says; "auto" by the sizes of the model and of the smallest GPU."""
    if not isinstance(ranks, Group):
        return False
    device, folder = pick_device(recipe.model.device), Path(recipe.model.path)
    if recipe.parallel.strategy != "auto" or device.type != "cuda" or not (folder / "config.json").exists():
        return is_sharded(recipe, 0, ranks.size, None)
    from opdkit.cost.build import size_from_config

    memory = min(ranks.gather(torch.cuda.get_device_properties(device).total_memory))
    size = size_from_config(folder, trust_remote_code=recipe.model.trust_remote_code)
    return is_sharded(recipe, size.parameters, ranks.size, memory)


def load_student_on(ranks: Ranks, recipe: Recipe, *, resume_from: Path | None = None) -> LanguageModel:
    """See `load_student`; with its layers in parts, where the recipe's ranks keep them so."""
    if not isinstance(ranks, Group) or not is_in_parts(recipe, ranks):
        return load_student(recipe, resume_from=resume_from)
    if recipe.model.activation_offload:
        raise UserError(
            'the ranks keep layers in parts (parallel.strategy = "auto"), and model.activation_offload would move the '
            'gathered ones too; remove it, or set strategy = "gathered"'
        )
    from opdkit.engines.load_in_parts import load_in_parts

    dtype = getattr(torch, recipe.model.dtype)

    def as_read(student: LanguageModel) -> torch.dtype | None:
        """Adapters compute in their own type."""
        is_adapter = hasattr(student.module, "peft_config")
        return None if is_adapter or {p.dtype for p in student.module.parameters()} == {dtype} else dtype

    return load_in_parts(
        lambda: load_student(recipe, resume_from=resume_from, on_host=True),
        ranks,
        device=pick_device(recipe.model.device),
        reads=as_read,
        num_parts=recipe.parallel.hsdp,
        offload=recipe.parallel.offload,
    )


def make_optimizer(student: LanguageModel, recipe: Recipe, ranks: Ranks) -> Optimizer:
    """Of one process, or of several ranks."""
    dtype = getattr(torch, recipe.model.dtype)
    if not isinstance(ranks, Group):
        return Optimizer(student.module, recipe.train, compute_dtype=dtype, seed=recipe.seed)
    for key, value in (("optimizer", "adamw_8bit"), ("master_dtype", "bfloat16")):
        if getattr(recipe.train, key) == value:
            raise UserError(f'train.{key} = "{value}" is of one process, and this run has {ranks.size}; remove it')
    if student.shards is not None:
        from opdkit.training.models.sharded import ShardedOptimizer

        offload = recipe.parallel.offload
        return ShardedOptimizer(student, recipe.train, compute_dtype=dtype, group=ranks, offload=offload)
    return GatheredOptimizer(student.module, recipe.train, compute_dtype=dtype, group=ranks)
