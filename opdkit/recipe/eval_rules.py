"""What cannot be measured, and what is not measured by whom it might be expected."""

from __future__ import annotations

from collections.abc import Iterator

from opdkit.recipe.fields import did_you_mean
from opdkit.recipe.sections import Recipe


def eval_faults(recipe: Recipe) -> Iterator[str]:
    """Of [eval]: sets, their domains and their graders."""
    if recipe.eval.every and not recipe.eval.sources:
        yield f"eval.every = {recipe.eval.every} needs eval.data: what to evaluate on"
    trained = [one.domain for one in recipe.data.sets if one.domain]
    known = list(dict.fromkeys([*trained, *(recipe.route.views if recipe.route else ())]))
    for number, one in enumerate(recipe.eval.sets):
        if one.domain is not None and one.domain not in known:
            near = did_you_mean(one.domain, known, "domains") if known else "; leave it out"
            yield f'eval.data.{number}.domain = "{one.domain}" is of no set of data.train, nor in [route.views]{near}'
    if ungraded := [source for source, task in recipe.eval_tasks.items() if task.is_none]:
        yield (
            f"eval.data = {ungraded[0]} is graded by data.task, which names no grader; set it, e.g. data.task = "
            f'"math", or give the set its own, {{ path = "{ungraded[0]}", task = "math" }}'
        )
    try:
        recipe.grader  # noqa: B018  making it refuses what cannot be
    except ValueError as fault:
        yield f"data and eval.data: {fault}"


def eval_warnings(recipe: Recipe) -> Iterator[str]:
    """Sets on which no teacher is measured, where each domain has its own."""
    if recipe.route is None or not recipe.eval.teacher:
        return
    domains = recipe.route.views
    for one in recipe.eval.sets:
        if one.domain not in domains:
            yield (
                f"eval.data = {one.path} names no domain of [route.views], so no teacher is measured on it; write "
                f'{{ path = "{one.path}", domain = "{next(iter(domains))}" }}, or set eval.teacher = false'
            )
