"""From TOML to one frozen recipe, or to every fault there is, in sentences."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opdkit.contexts.none import NoContext
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.recipe.build import choice, chosen_views, chosen_weights, sentences
from opdkit.recipe.points import Points
from opdkit.recipe.rules.whole import impossible
from opdkit.recipe.schedule import read_schedule, stages_of, start_with
from opdkit.recipe.sections import Recipe
from opdkit.recipe.shipped import recipe_file, shipped_recipes
from opdkit.recipe.user_code import CONTEXT, METHOD
from opdkit.tasks.options import task_table


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, validate. Raises UserError with one line for every fault found."""
    return parse_recipe(read_sections(path), overrides, where=str(path))


def read_sections(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe file, not looked at yet. Raises UserError for one that cannot be read, or is a pipeline."""
    raw = read_toml(Path(path))
    if "stage" in raw:
        raise UserError(f"{path} is a pipeline, not a recipe: run it with `opdkit pipeline {path}`")
    return raw


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a file, or of a shipped recipe's name. Raises UserError for one that cannot be read."""
    try:
        path = recipe_file(path)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is no file; give a recipe file (*.toml)")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [str(path.parent / other.name) for other in path.parent.glob("*.toml")]
        near = difflib.get_close_matches(str(path), [*beside, *shipped_recipes()], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `opdkit recipes` lists those that come with opdkit"
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a recipe file (*.toml)") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: its tables or lists are too deep to be a recipe's") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise UserError(f"{str(path)[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from None


_DEEPEST = 32  # tables and lists inside each other


def check_plain(raw: Any, where: str) -> None:
    """Raises UserError for what no key of a recipe can be: nested without end, or with a NUL character."""
    left: list[tuple[str, Any, int]] = [("", raw, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > _DEEPEST or key.count(".") > _DEEPEST:
            raise UserError(f"{where}: {key[:60]}... is nested more than {_DEEPEST} deep; no key of a recipe is")
        if isinstance(value, Mapping):
            left += [(f"{key}.{name}" if key else str(name), inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, inner, depth + 1) for inner in value]
        if "\0" in key or (isinstance(value, str) and "\0" in value):
            raise UserError(f"{where}: {key!r} holds a NUL character (\\u0000); remove it")


def parse_recipe(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe", adapters: Collection[str] = ()
) -> Recipe:
    """The same for a recipe that is already a dict. adapters: paths where a pipeline will have put LoRA adapters."""
    settings = key_values(overrides)
    check_plain(raw, where)
    check_plain(settings, where)
    merged = merge({}, raw)
    for key, value in settings.items():
        override(merged, key, value)
    faults: list[str] = []
    schedule = read_schedule(merged.get("schedule", {}), faults)
    start_with(schedule, merged, faults, said_last=settings)
    method = choice(merged.get("method"), "method", METHOD, faults)
    yielded: list[str] = []
    if isinstance(method, Method):
        defaults = _defaults_of(method, merged)
        yielded = _yield_to(merged, defaults)
        merged = merge(defaults, merged)
    context = choice(merged.get("context", {"kind": "none"}), "context", CONTEXT, faults)
    if isinstance(merged.get("views"), Mapping):
        merged["views"] = chosen_views(merged["views"], faults)
    if isinstance(merged.get("weights"), Mapping):
        merged["weights"] = chosen_weights(merged["weights"], faults)
    recipe = None
    try:
        # Stand-ins keep the other sections' faults visible when one of these two is at fault.
        chosen = {"method": method or METHODS["sft"].model_validate({"name": "sft"}), "context": context or NoContext()}
        recipe = Recipe.model_validate({**merged, **chosen, "schedule": schedule})
    except ValidationError as error:
        faults += sentences(error, Recipe)
    if recipe is not None and method is not None and context is not None:
        faults += impossible(recipe, stages_of(recipe, faults), adapters)
    if faults:
        faults = [_with_its_place(fault, schedule) for fault in faults]
        raise UserError(*(f"{where}: {fault}" for fault in faults))
    assert recipe is not None
    recipe._yielded = tuple(yielded)
    return recipe


def _with_its_place(fault: str, schedule: Mapping[str, Points]) -> str:
    """A value at step 0 that nobody wrote into the section it is in."""
    return f"[schedule] at 0 of the steps: {fault}" if fault.startswith(tuple(f"{key} " for key in schedule)) else fault


def _defaults_of(method: Method, merged: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's sections. A section that names another kind (or a teacher with other weights) starts afresh: the
    paper's teacher weights do not apply to another teacher, nor its ema_rate to other weights. So does each
    section of a view; the paper's views that the method's keys never ask are not there. Where there is a [route], its
    views are the teachers, and the paper's teacher and context are not."""
    sections = {k: v for k, v in method.defaults.items() if "route" not in merged or k not in ("teacher", "context")}
    views, written = sections.pop("views", {}), merged.get("views")
    defaults = {key: _left_of(section, merged.get(key)) for key, section in sections.items()}
    asked: dict[str, Any] = {}
    for name, view in views.items():
        own = written.get(name) if isinstance(written, Mapping) else None
        own = own if isinstance(own, Mapping) else {}
        if name in method.needs.views:
            asked[name] = {key: _left_of(value, own.get(key)) for key, value in view.items()}
    return {**defaults, "views": asked} if asked else defaults


def _left_of(default: Any, chosen: Any) -> Any:
    """What of a default section still means something beside what was chosen there."""
    if not isinstance(default, Mapping) or not isinstance(chosen, Mapping):
        return dict(default) if isinstance(default, Mapping) else default
    if "kind" in chosen and chosen["kind"] != default.get("kind", chosen["kind"]):
        return {}
    if "weights" in chosen and chosen["weights"] != default.get("weights", chosen["weights"]):
        return {"kind": default["kind"]}
    return dict(default)


def _yield_to(merged: Mapping[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Change the defaults that the recipe's own keys leave no place for, and say so. A written value never yields."""
    train, paper = merged.get("train"), defaults.get("train", {})
    warmup = paper.get("warmup_steps", 0)
    if not isinstance(train, Mapping) or "warmup_steps" in train:
        return []
    steps = train.get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps <= warmup:
        return []
    defaults["train"] = {**paper, "warmup_steps": steps // 2}
    return [
        f"train.warmup_steps = {steps // 2}, half of train.steps = {steps}: the method's own {warmup} would leave no "
        "step at the full learning rate"
    ]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else (merge({}, value) if isinstance(value, Mapping) else value)
    return merged


def key_values(settings: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """["a.b=1", "c=x"] -> {"a.b": 1, "c": "x"}: values are TOML, and a bare word is a string."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {setting}: write it as {flag} key=value")
        try:
            read = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            read = {"value": text}  # so that quotes need no second quoting in the shell
        except (RecursionError, ValueError) as error:
            raise UserError(f"{flag} {key.strip()}: its value cannot be read ({error})") from None
        if len(read) > 1:
            raise UserError(f"{flag} {key.strip()}: its value goes on in a new line; give each key its own {flag}")
        values[key.strip()] = read["value"]
    return values


def override(merged: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    if isinstance(task := merged.get("data", {}).get("task"), str) and key.startswith("data.task."):
        merged["data"]["task"] = task_table(task)  # the short form of the section that is now opened
    target = merged
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {section} is a single value, not a section; set {section} itself")
    target[last] = value
