"""From TOML to one frozen recipe, or to every fault there is, in sentences."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from opdkit.contexts import CONTEXTS
from opdkit.contexts.none import NoContext
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.weighting import PROBLEM_WEIGHTS, TOKEN_WEIGHTS
from opdkit.recipe.rules import impossible
from opdkit.recipe.sections import Recipe, did_you_mean


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, validate. Raises UserError with one line for every fault found."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a recipe file (*.toml)") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return parse_recipe(raw, overrides, where=str(path))


def parse_recipe(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """The same for a recipe that is already a dict (quickstart, tests)."""
    merged = _merge({}, raw)
    for key, value in key_values(overrides).items():
        _override(merged, key, value)
    faults: list[str] = []
    method = _choice(merged.get("method"), "method", "name", METHODS, faults)
    if isinstance(method, Method):
        merged = _merge(_defaults_of(method, merged), merged)
    context = _choice(merged.get("context", {"kind": "none"}), "context", "kind", CONTEXTS, faults)
    if isinstance(merged.get("weights"), Mapping):
        merged["weights"] = _weights(merged["weights"], faults)
    recipe = None
    try:
        # Stand-ins keep the other sections' faults visible when one of these two is at fault.
        chosen = {"method": method or METHODS["sft"].model_validate({"name": "sft"}), "context": context or NoContext()}
        recipe = Recipe.model_validate({**merged, **chosen})
    except ValidationError as error:
        faults += _sentences(error, Recipe)
    if recipe is not None and method is not None and context is not None:
        faults += impossible(recipe)
    if faults:
        raise UserError("\n".join(f"{where}: {fault}" for fault in faults))
    assert recipe is not None
    return recipe


def _choice(
    section: Any, where: str, key: str, table: Mapping[str, type[BaseModel]], faults: list[str]
) -> BaseModel | None:
    """The row of `table` that `section[key]` names, made from the section's other keys."""
    if not isinstance(section, Mapping) or key not in section:
        faults.append(f"{where}.{key} is missing; set it to one of {', '.join(table)}")
        return None
    name = section[key]
    if not isinstance(name, str) or name not in table:
        faults.append(f"{where}.{key} = {name!r} does not exist{did_you_mean(str(name), table)}")
        return None
    try:
        return table[name].model_validate(section)
    except ValidationError as error:
        faults += _sentences(error, table[name], prefix=f"{where}.")
        return None


def _weights(section: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The section with the rows of their tables that `tokens.name` and `problems.name` choose."""
    chosen = dict(section)
    for key, table in (("tokens", TOKEN_WEIGHTS), ("problems", PROBLEM_WEIGHTS)):
        if key in chosen:
            chosen[key] = _choice(chosen[key], f"weights.{key}", "name", table, faults)
    return chosen


def _defaults_of(method: Method, merged: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's sections. A section that names another kind (or a teacher with other weights) starts afresh: the
    paper's teacher weights say nothing about somebody's own teacher, nor its ema_rate about other weights."""
    defaults: dict[str, Any] = {key: dict(value) for key, value in method.defaults.items()}
    for section, default in defaults.items():
        chosen = merged.get(section)
        if not isinstance(chosen, Mapping):
            continue
        if "kind" in chosen and chosen["kind"] != default.get("kind", chosen["kind"]):
            defaults[section] = {}
        elif "weights" in chosen and chosen["weights"] != default.get("weights", chosen["weights"]):
            defaults[section] = {"kind": default["kind"]}
    return defaults


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = (
            _merge(merged[key], value) if both else (_merge({}, value) if isinstance(value, Mapping) else value)
        )
    return merged


def key_values(settings: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """["a.b=1", "c=x"] -> {"a.b": 1, "c": "x"}: values are TOML, and a bare word is a string."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {setting}: write it as {flag} key=value")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text  # so that quotes need no second quoting in the shell
    return values


def _override(merged: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    target = merged
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {section} is a single value, not a section; set {section} itself")
    target[last] = value


def _sentences(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """pydantic's findings, one sentence each: key, value, reason, way out."""
    sentences = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        key = prefix + ".".join(parts)
        if fault["type"] == "extra_forbidden":
            elsewhere = [
                f"{name}.{parts[-1]}" for name in Recipe.model_fields if parts[-1] in _known_keys(Recipe, [name])
            ]
            known = _known_keys(root, parts[:-1])
            hint = f"; there is {elsewhere[0]}" if elsewhere else did_you_mean(parts[-1], known, "keys here")
            sentences.append(f"{key} is not a key{hint}")
        elif fault["type"] == "missing":
            sentences.append(f"{key} is missing; add it")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            whole = not parts  # a fault of the section, not of one key: its sentence names the keys itself
            sentences.append(reason if whole else f"{key} = {fault['input']!r}: {reason[0].lower()}{reason[1:]}")
    return sentences


def _known_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for part in path:
        field = model.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
