"""`opdkit check`: a file is a recipe or a pipeline; both are read whole, and no weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opdkit.recipe.load import load_recipe, read_toml
from opdkit.recipe.pipeline import is_pipeline, load_pipeline
from opdkit.recipe.rules import check_sinks, method_warnings, warnings
from opdkit.recipe.sections import Recipe


def check_file(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is doubtful about it, a sentence each. Raises UserError with a line for every fault."""
    if not is_pipeline(read_toml(path)):
        recipe = load_recipe(path, overrides)
        check_sinks(recipe)
        return warnings(recipe)
    pipeline = load_pipeline(path, overrides)
    pipeline.check_sinks()
    doubts = [
        f"stage {stage.name}: {sentence}"
        for stage in pipeline.stages
        if isinstance(stage.does, Recipe)
        for sentence in method_warnings(stage.does)
    ]
    return doubts + [sentence for _, sentence in pipeline.missing()]
