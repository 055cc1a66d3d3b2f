"""`opdkit check`: a file is a recipe or a pipeline; both are read whole, and no weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opdkit.errors import UserError
from opdkit.recipe.load import load_recipe, read_toml
from opdkit.recipe.pipeline import is_pipeline, load_pipeline
from opdkit.recipe.rules.departures import departures
from opdkit.recipe.rules.episode import environment_warnings
from opdkit.recipe.rules.whole import check_installed, method_warnings, warnings
from opdkit.recipe.sections import Recipe


def check_file(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is doubtful about it, a sentence each. Raises UserError with a line for every fault."""
    if not is_pipeline(read_toml(path)):
        recipe = load_recipe(path, overrides)
        check_installed(recipe)
        return [*warnings(recipe), *environment_warnings(recipe)]
    pipeline = load_pipeline(path, overrides)
    pipeline.check_installed()
    doubts = [
        f"stage {stage.name}: {sentence}"
        for stage in pipeline.stages
        if isinstance(stage.does, Recipe)
        for sentence in method_warnings(stage.does)
    ]
    return doubts + [sentence for _, sentence in pipeline.missing()]


def departures_in(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is not as its method has it by default: a line for a recipe, or for each training stage of a pipeline."""
    if not is_pipeline(read_toml(path)):
        said = departures(load_recipe(path, overrides))
        return [] if said is None else [said]
    stages = [(stage.name, stage.does) for stage in load_pipeline(path, overrides).stages]
    told = [(name, departures(does)) for name, does in stages if isinstance(does, Recipe)]
    return [f"stage {name}: {said}" for name, said in told if said is not None]


def check_num_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Raises UserError for more ranks than a step has rows, or than come to whole copies of the layers."""
    check_copies(recipe, num_ranks)
    answers = 1 if recipe.method.answer_source == "dataset" else recipe.sampling.group_size
    rows = recipe.train.problems_per_step * answers
    if num_ranks > rows:
        raise UserError(
            f"{num_ranks} ranks are more than the {rows} rows of a step (train.problems_per_step = "
            f"{recipe.train.problems_per_step}, {answers} answers to each), so some would never have work; start "
            f"at most {rows}, or raise train.problems_per_step"
        )


def check_copies(recipe: Recipe, num_ranks: int) -> None:
    """Raises UserError for ranks of which some would have no whole copy of the layers."""
    hsdp = recipe.parallel.hsdp
    if hsdp is not None and num_ranks % hsdp:
        raise UserError(
            f"parallel.hsdp = {hsdp} ranks keep one copy of the layers, and {num_ranks} ranks are no multiple of that; "
            "set it to the ranks of a machine, or remove it"
        )
