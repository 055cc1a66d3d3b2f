"""Where a recipe is not as its method has it by default, in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from opdkit.methods.base import Method
from opdkit.recipe.sections import Recipe


def departures(recipe: Recipe) -> str | None:
    """One line: every key that is not what the method's paper has, with the paper's value behind it. None: none is."""
    method = recipe.method
    own: dict[str, Mapping[str, Any]] = dict(method.defaults)
    if "views" in own:  # those of the paper that the method's keys do not ask are named by these keys
        own["views"] = {name: view for name, view in own["views"].items() if name in recipe.views}
    if any("train.warmup_steps" in sentence for sentence in recipe.yielded):
        own["train"] = {key: value for key, value in own["train"].items() if key != "warmup_steps"}
    found = [said for name, paper in own.items() for said in _departed(name, getattr(recipe, name), paper)]
    fields = {name: field for name, field in type(method).model_fields.items() if name != "name"}
    try:
        plain: Method | None = type(method).model_validate({"name": method.name})
    except ValidationError:  # a method that must be told something has no paper's value of it
        plain = None
    for key, field in fields.items():
        value = getattr(plain, key) if plain is not None else field.default
        if field.is_required() and plain is None:
            continue
        if getattr(method, key) != value:
            found.append(f"method.{key} = {_shown(getattr(method, key))} ({_shown(value)})")
    return f"not as {method.name} has it by default: {', '.join(found)}" if found else None


def _departed(where: str, chosen: Any, paper: Mapping[str, Any]) -> Iterator[str]:
    for key, value in paper.items():
        has = chosen.get(key) if isinstance(chosen, Mapping) else getattr(chosen, key, None)
        if isinstance(value, Mapping) and isinstance(has, BaseModel | Mapping):
            yield from _departed(f"{where}.{key}", has, value)
        elif _plain(has) != _plain(value):
            yield f"{where}.{key} = {_shown(has)} ({_shown(value)})"
            if key == "kind":  # of another kind: its other keys are not the paper's either
                return


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(_plain(value), default=str)
