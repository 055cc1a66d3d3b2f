"""Sections of a recipe out of plain keys, and what is wrong with them, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from opdkit.contexts.none import NoContext
from opdkit.recipe.fields import did_you_mean, kinds_of
from opdkit.recipe.sections import Recipe
from opdkit.recipe.user_code import CONTEXT, PROBLEMS, TOKENS, TURNS, Kind, class_of, fault_of


def choice(section: Any, where: str, kind: Kind, faults: list[str]) -> BaseModel | None:
    """The row of `kind.table` that `section[kind.key]` names, or a class of the user's, made from the section's other
    keys."""
    if not isinstance(section, Mapping) or kind.key not in section:
        faults.append(f"{where}.{kind.key} is missing; set it to one of {', '.join(kind.table)}")
        return None
    name = section[kind.key]
    try:
        model = class_of(name, kind)
    except ValueError as error:
        faults.append(f"{where}.{kind.key} = {shortened(name)} {error}")
        return None
    if model is None:
        faults.append(f"{where}.{kind.key} = {shortened(name)} does not exist{did_you_mean(str(name), kind.table)}")
        return None
    try:
        chosen = model.model_validate(_with_tuples(section, model))
        getattr(chosen, "needs", None)  # a user's class may fail here, which is said as any other fault
        return chosen
    except ValidationError as error:
        faults += sentences(error, model, prefix=f"{where}.")
    except Exception as error:
        if name in kind.table:
            raise
        faults.append(f"{where}.{kind.key} = {shortened(name)} fails: {fault_of(error)}")
    return None


def _with_tuples(section: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A list is what TOML has for a tuple; a strict field (a class of the user's has no others) would refuse it."""
    fields = {name: kinds_of(field.annotation) for name, field in model.model_fields.items()}
    tuples = {name for name, kinds in fields.items() if any(tuple in (kind, get_origin(kind)) for kind in kinds)}
    return {key: tuple(value) if key in tuples and isinstance(value, list) else value for key, value in section.items()}


def chosen_views(section: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """[views], each with the row of its table that `context.kind` chooses."""
    chosen = dict(section)
    for name, view in section.items():
        if isinstance(view, Mapping) and "context" in view:
            context = choice(view["context"], f"views.{name}.context", CONTEXT, faults)
            chosen[name] = {**view, "context": context or NoContext()}
    return chosen


def chosen_weights(section: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The section with the rows of their tables that `tokens.name`, `problems.name` and `turns.name`
    choose."""
    chosen = dict(section)
    for key, kind in (("tokens", TOKENS), ("problems", PROBLEMS), ("turns", TURNS)):
        if key in chosen:
            chosen[key] = choice(chosen[key], f"weights.{key}", kind, faults)
    return chosen


def sentences(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """pydantic's findings, one sentence each: key, value, reason, way out."""
    said = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        key = prefix + ".".join(parts)
        if fault["type"] == "extra_forbidden":
            elsewhere = [
                f"{name}.{parts[-1]}" for name in Recipe.model_fields if parts[-1] in _known_keys(Recipe, [name])
            ]
            known = _known_keys(root, parts[:-1])
            hint = f"; there is {elsewhere[0]}" if elsewhere else did_you_mean(parts[-1], known, "keys here")
            said.append(f"{key} is not a key{hint}")
        elif fault["type"] == "missing":
            said.append(f"{key} is missing; add it")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            whole = not parts  # a fault of the section, not of one key: its sentence names the keys itself
            said.append(reason if whole else f"{key} = {shortened(fault['input'])}: {reason[0].lower()}{reason[1:]}")
    return said


def shortened(value: Any, most: int = 80) -> str:
    """A value as a sentence can hold it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}... ({len(text)} characters)"


def _known_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    left = list(path)
    while left:
        field = model.model_fields.get(left.pop(0))
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
        if field is not None and get_origin(field.annotation) is Mapping:
            del left[:1]  # a name of the user's own: [views.NAME]
    return list(model.model_fields)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value}"""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
