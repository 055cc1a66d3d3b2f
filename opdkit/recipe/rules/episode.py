"""What goes with [episode], and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from opdkit.errors import UserError
from opdkit.recipe.sections import Recipe
from opdkit.rollouts.environments.workers import Pool

_WHOLE = ("dpo", "simpo")  # methods that compare whole answers


def episode_faults(recipe: Recipe) -> Iterator[str]:
    """What [episode] cannot be with, a sentence each."""
    section = recipe.episode
    if section is None:
        return
    if recipe.method.answer_source != "student":
        yield (
            f'[episode] is what the student does in an environment, but the answers of method.name = "'
            f'{recipe.method.name}" come from the {recipe.method.answer_source}; remove [episode], or use an '
            "on-policy method"
        )
    for name, view in recipe.all_views.items():
        where = "teacher" if name == "teacher" else f"views.{name}.teacher"
        if view.teacher.tokens == "align":
            yield (
                f'{where}.tokens = "align" reads the text of an answer, and what an environment says stands in the '
                "student's tokens; use a teacher of the student's family with tokens = \"same\", or remove [episode]"
            )
    if section.history == "rerender" and recipe.method.name in _WHOLE:
        yield (
            f'episode.history = "rerender" makes several rows of an episode, and method.name = "{recipe.method.name}" '
            'compares whole answers; use history = "keep", or another method'
        )
    most = section.max_episode_tokens
    if most is not None and most < section.turn_tokens(1):
        yield (
            f"episode.max_episode_tokens = {most} is less than episode.max_turn_tokens = {section.max_turn_tokens}; "
            "raise it, or lower the other"
        )


def check_environment(recipe: Recipe) -> None:
    """Makes one, in a process of its own. Raises UserError where that fails, its tools cannot be offered, or it cannot
    be with the method."""
    if recipe.episode is None:
        return
    with closing(Pool(recipe.episode.environment, workers=1)) as pool:
        if pool.rewrites_history and recipe.method.name in _WHOLE:
            raise UserError(
                f"the environment {pool.name} may show the model another past, which makes several rows of an episode, "
                f'and method.name = "{recipe.method.name}" compares whole answers; use another method'
            )


def environment_warnings(recipe: Recipe) -> list[str]:
    """As `check_environment`; but what one of opdkit's needs (a package, a file, a server) may only not be here yet."""
    try:
        check_environment(recipe)
    except UserError as error:
        if recipe.episode is not None and not recipe.episode.environment.user_files:
            return [str(error)]
        raise
    return []


def episode_warnings(recipe: Recipe) -> Iterator[str]:
    section = recipe.episode
    if section is None:
        return
    if section.max_turns == 1:
        yield "episode.max_turns = 1: no turn reads what a tool has answered; raise it, unless that is meant"
