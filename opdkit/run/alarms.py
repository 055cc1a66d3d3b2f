"""What one step could not do, that its user must hear at once. What goes wrong over steps: `sentinels.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from opdkit.recipe import Recipe

Seen = Mapping[str, float | None]


def alarms(seen: Seen, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(kind, sentence); whoever prints says each kind once a run. `recipe`: of this step, if it has a schedule."""
    if seen.get("train/num_steps_without_gradient"):
        yield "no gradient", f"the step taught nothing and changed nothing: {_why_no_gradient(seen, recipe)}"
    elif recipe.method.compares_rewards and seen.get("rollout/share_of_groups_with_one_reward", 1) == 1:
        yield "one reward", f"the rewards gave no gradient, only the rest of the loss did: {_one_reward(seen)}"
    if seen.get("spool/num_steps_left_out"):
        most = recipe.spool.max_gib if recipe.spool else 0
        yield (
            "full spool",
            f"spool.max_gib = {most:g} is used up, so what the teachers say is not kept from this step on: a replay "
            "can use the steps before it",
        )
    if seen.get("context/share_of_groups_with_success") == 0:
        yield (
            "no success",
            "no group has a success, so no teacher read a right answer: the best reward is "
            f"{_number(seen.get('rollout/max_reward'))}, and context.success_threshold is "
            f"{_number(getattr(recipe.context, 'success_threshold', None))}",
        )


def _why_no_gradient(seen: Seen, recipe: Recipe) -> str:
    num_rows = seen["rollout/num_rows"]
    if num_rows == seen.get("rollout/num_ungraded") and recipe.method.needs.reward:
        return "no answer could be graded"
    silent = (seen.get("teacher/num_rows_without_view") or 0) + (seen.get("teacher/num_rows_too_long") or 0)
    if num_rows == silent and (recipe.method.required_views or not recipe.method.compares_rewards):
        return "the teacher had nothing to read for any answer, or more than its positions"
    if recipe.method.compares_rewards and seen.get("rollout/share_of_groups_with_one_reward", 1) == 1:
        return _one_reward(seen)
    return "every token's gradient is zero, or no token is counted"


def _one_reward(seen: Seen) -> str:
    return (
        "no problem has two answers of different reward, so none is better than its siblings "
        f"(mean reward {_number(seen.get('rollout/reward'))})"
    )


def _number(value: object) -> str:
    return "unknown" if value is None else f"{value:g}"
