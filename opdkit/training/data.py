"""The problems that a run trains on, and those it is measured on."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.data.readers import Dataset, fingerprint, load_problems
from opdkit.recipe import Recipe, needs_rewards
from opdkit.types import Problem


def training_data(recipe: Recipe, problems: Sequence[Problem] | Dataset | None) -> Dataset:
    """The recipe's, or `problems` in their stead. Raises UserError where there are none."""
    section = recipe.data
    if isinstance(problems, Dataset):
        return problems
    if problems is not None:
        return Dataset(
            problems=list(problems),
            fingerprint=fingerprint(problems),
            dropped=[],
            num_duplicate_ids=0,
            source=section.train,
        )
    return load_problems(
        section.train,
        task=section.task.main.name,
        limit=section.limit,
        seed=recipe.seed,
        instruction=section.instruction,
        columns=section.columns or None,
        require_gold=needs_rewards(recipe) and section.task.needs_gold_or_tests,
        asked=section.task.columns_asked,
    )


def evaluation_sets(recipe: Recipe) -> dict[str, Dataset]:
    """By source."""
    task = recipe.data.task
    return {
        source: load_problems(
            source,
            task=task.main.name,
            limit=recipe.eval.limit,
            instruction=recipe.data.instruction,
            require_gold=task.needs_gold_or_tests,
            asked=task.main.columns_asked,
        )
        for source in recipe.eval.sources
    }
