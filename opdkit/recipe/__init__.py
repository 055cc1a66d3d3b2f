"""Recipes: TOML in, one frozen, fully resolved object out. Nothing unknown or impossible gets past it.

Precedence: the method's defaults (the paper) < the recipe < `--set a.b=c`. Importing this module imports no torch.
"""

from opdkit.recipe.data import EvalSection
from opdkit.recipe.load import key_values, load_recipe, override, parse_recipe
from opdkit.recipe.model_sections import TeacherSection, ViewSection
from opdkit.recipe.rules.whole import check_installed, impossible, needs_rewards, warnings
from opdkit.recipe.schedule import recipe_at, scheduled_at, stage_starts, stages_of
from opdkit.recipe.sections import DiagnosticsSection, Recipe, SamplingSection, SpoolSection, TrainSection

__all__ = [
    "DiagnosticsSection",
    "EvalSection",
    "Recipe",
    "SamplingSection",
    "SpoolSection",
    "TeacherSection",
    "TrainSection",
    "ViewSection",
    "check_installed",
    "impossible",
    "key_values",
    "load_recipe",
    "needs_rewards",
    "override",
    "parse_recipe",
    "recipe_at",
    "scheduled_at",
    "stage_starts",
    "stages_of",
    "warnings",
]
