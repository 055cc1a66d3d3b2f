"""Whether several ranks keep the student's layers in parts: what `parallel.strategy` says, or what sizes say."""

from __future__ import annotations

from opdkit.cost.work import BYTES
from opdkit.recipe.sections import Recipe

GATHERED_SHARE = 0.5  # of a device's memory, that weights and gradients may take where they are gathered


def is_sharded(recipe: Recipe, parameters: int, ranks: int, memory: float | None) -> bool:
    """memory: of a GPU, in bytes; None: of another device, or not known. "auto" asks sizes, never what is free."""
    strategy = recipe.parallel.strategy
    if ranks == 1 or strategy == "gathered":
        return False
    if strategy == "sharded":
        return True
    compute = BYTES[recipe.model.dtype]
    a_parameter = compute if recipe.model.lora is not None else compute + 4 + 12 / ranks
    return memory is not None and parameters * a_parameter > GATHERED_SHARE * memory
