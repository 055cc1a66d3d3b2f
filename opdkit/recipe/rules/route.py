"""What cannot go together where each problem asks its own teacher."""

from __future__ import annotations

from collections.abc import Iterator

from opdkit.methods.base import Averaged
from opdkit.recipe.fields import did_you_mean
from opdkit.recipe.sections import Recipe


def route_faults(recipe: Recipe) -> Iterator[str]:
    """Of [route], whatever the stage of a schedule."""
    route = recipe.route
    if route is None:
        return
    for domain, view in route.views.items():
        if view not in recipe.views:
            near = did_you_mean(view, [*recipe.views]) if recipe.views else ""
            yield f'route.views.{domain} = "{view}" is not there; add [views.{view}] with teacher and context{near}'
        elif recipe.views[view].count > 1:
            yield (
                f"views.{view}.count = {recipe.views[view].count} reads an answer several times, but a routed view "
                "stands for the teacher, who reads it once; remove it"
            )
    if recipe.teacher.kind != "none":
        yield (
            f'teacher.kind = "{recipe.teacher.kind}" and [route]: each problem asks the teacher that its domain names, '
            "so nobody asks this one; remove [teacher], or [route]"
        )
    if recipe.context.kind != "none":
        yield (
            f'context.kind = "{recipe.context.kind}" and [route]: a routed view has a context of its own; write it as '
            f"[views.{route.readers[0]}.context], and remove [context]"
        )


def stage_route_faults(recipe: Recipe) -> Iterator[str]:
    """Of [route] beside the method of a stage."""
    route, method = recipe.route, recipe.method
    if route is None or route.denominator == "batch":
        return
    reduction = getattr(method, "reduction", None)
    if not isinstance(method, Averaged) and reduction is None:
        yield (
            f'route.denominator = "domain" divides a mean of token losses by domain, and method.name = "{method.name}" '
            'is none; use denominator = "batch"'
        )
    elif reduction in ("sum", "constant"):
        yield (
            f'route.denominator = "domain" counts per domain, but method.reduction = "{reduction}" divides by no '
            'count; use "token", "sequence" or "sequence_sum", or denominator = "batch"'
        )


def context_faults(recipe: Recipe) -> Iterator[str]:
    """Of contexts and what a model is told in its system turn."""
    for name, view in recipe.all_views.items():
        system = recipe.model.system if view.teacher.system is None else view.teacher.system
        if system and getattr(view.context, "role", None) == "system":
            where = ("", "teacher.system") if name == "teacher" else (f"views.{name}.", f"views.{name}.teacher.system")
            yield (
                f'{where[0]}context.role = "system" writes a system turn, which the system prompt of that teacher '
                f'(model.system or {where[1]}) would take the place of; set {where[1]} = "", or role = "user"'
            )
