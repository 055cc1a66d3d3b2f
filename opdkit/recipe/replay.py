"""The recipe of `opdkit replay`: a run's own, whose teachers and answers are those that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.recipe.load import key_values, parse_recipe, read_toml
from opdkit.recipe.saved import num_steps, read_description
from opdkit.recipe.sections import Recipe

_SAMPLER = {"engine", "url", "server_kind", "vllm", "when_idle", "lag"}  # nothing is sampled: no engine is started


def replay_recipe(run: Path, overrides: Sequence[str] = (), name: str | None = None) -> Recipe:
    """name: of the new run, beside the old one; None: the old name and "-replay".

    Another method begins with its own defaults and nothing samples, else every key is the run's until `overrides`
    change it.
    Raises UserError for a run without a spool, and with a line for every fault of the recipe.
    """
    described = read_description(run)
    raw: dict[str, Any] = read_toml(run / "recipe.toml")
    try:
        raw["name"], raw["runs_dir"] = name or f"{raw['name']}-replay", str(run.parent)
        raw.pop("spool", None)
        for key in _SAMPLER & raw["sampling"].keys():
            del raw["sampling"][key]
        raw["train"]["steps"] = min(raw["train"]["steps"], max(1, num_steps(run)))
        method = key_values(overrides).get("method.name", raw["method"]["name"])
        if method != raw["method"]["name"]:
            raw["method"] = {"name": method}
        for view in described["views"]:
            (raw if view == "teacher" else raw["views"][view])["teacher"] = {"kind": "saved", "run": str(run)}
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / 'recipe.toml'} is not that of a run (it lacks {error}); restore it") from None
    return parse_recipe(raw, overrides, where=f"{run / 'recipe.toml'}, replayed")
