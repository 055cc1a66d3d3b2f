"""What is known of a run whose teachers are read again, from the small files of its folder. No torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.recipe.build import flat
from opdkit.recipe.schedule import SAMPLING_KEYS
from opdkit.recipe.sections import Recipe
from opdkit.types import Asked

# What decides which problems are answered, how, when, and what the answers earn; and all of [data].
SAME = ("seed", "train.problems_per_step", "sampling.group_size", *(f"sampling.{key}" for key in SAMPLING_KEYS))


def read_description(run: Path) -> dict[str, Any]:
    """`spool.json` of a run's folder. Raises UserError for a run without one."""
    path = run / "spool" / "spool.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{run} has kept nothing of its teachers (no {path}); train it with a [spool] section, then replay it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from None
    try:
        for view in found["views"]:
            kept_of(found, view)
        if found["version"] != 1 or not isinstance(found["vocabulary"], str):
            raise ValueError(f"version {found['version']!r}")
        if not all(type(number) is int for number in (found["num_tokens"], *found["absent_ids"])):
            raise ValueError("ids that are none")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no description of a spool ({error}); restore it from a copy") from None
    return dict(found)


def kept_of(described: Mapping[str, Any], reader: str) -> Asked:
    """What a view of the run was asked."""
    view = described["views"][reader]
    return Asked(view["answer"], view["k"], view["entropy"])


def num_steps(run: Path) -> int:
    """How many steps, from the first on, a run has kept: the rows of one that was killed in it are missing."""
    number = 0
    while spool_files(run / "spool", number + 1) and (run / f"rows/step_{number + 1:06d}.parquet").exists():
        number += 1
    return number


def spool_file(folder: Path, step: int, rank: int = 0, num_ranks: int = 1) -> Path:
    """Where a rank keeps what teachers said of its rows. step: counted from 1, as rows are."""
    part = "" if num_ranks == 1 else f"-{rank + 1:05d}-of-{num_ranks:05d}"
    return folder / f"step_{step:06d}{part}.safetensors"


def spool_files(folder: Path, step: int) -> list[Path]:
    """Those of a step in the ranks' order, if all are there; else none."""
    if (whole := spool_file(folder, step)).exists():
        return [whole]
    parts = sorted(folder.glob(f"step_{step:06d}-*-of-*.safetensors"))
    return parts if parts == [spool_file(folder, step, rank, len(parts)) for rank in range(len(parts))] else []


def saved_faults(recipe: Recipe) -> Iterator[str]:
    """Of [teacher] kind = "saved", in a recipe whose keys are each legal."""
    named = {
        ("teacher" if name == "teacher" else f"views.{name}.teacher"): view.teacher.run
        for name, view in recipe.all_views.items()
        if view.teacher.kind == "saved" and view.teacher.run
    }
    runs = [*dict.fromkeys(named.values())]
    if len(runs) > 1:
        yield (
            f"the views read {len(runs)} saved runs ({', '.join(f'{key}.run = {run}' for key, run in named.items())}), "
            "but a step has the answers of one; name one run"
        )
    if len(runs) != 1 or not (run := Path(runs[0]).expanduser()).is_dir():  # one that is not there yet is a warning
        return
    if run.resolve() == recipe.run_dir.resolve():
        yield f"{run} is the run that is read, and this one would be written in its place; give it another name"
        return
    try:
        described = read_description(run)
        was = flat(tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8")))
    except UserError as error:
        yield from error.sentences
        return
    except (OSError, ValueError, RecursionError) as error:
        yield f"{run / 'recipe.toml'} cannot be read ({error}); restore it from a copy"
        return
    now = flat(recipe.as_dict())
    for key in (*SAME, *sorted(key for key in {*was, *now} if key.startswith("data."))):
        if any(other.startswith(f"schedule.{key}") for other in now):  # it changes while the run goes on
            continue
        if was.get(key) != now.get(key):
            yield (
                f"{key} = {now.get(key)!r}, but {run} was made with {was.get(key)!r}, and a replay reads its answers; "
                "set it to that"
            )
    if recipe.train.steps > (kept := num_steps(run)):
        yield f"train.steps = {recipe.train.steps}, but {run} kept its teachers for {kept} steps; lower it"
    yield from _view_faults(recipe, described, run)


def _view_faults(recipe: Recipe, described: Mapping[str, Any], run: Path) -> Iterator[str]:
    for view, asked in recipe.needs.views.items():
        readers = recipe.route.readers if recipe.route and view == "teacher" else (view,)
        for reader in readers:
            section = recipe.all_views.get(reader)
            if section is None or section.teacher.kind != "saved":
                continue
            if reader not in described["views"]:
                yield (
                    f"{run} has no view {reader!r} (it kept {', '.join(described['views'])}); let another teacher read "
                    "that view, or a method that does not ask it"
                )
                continue
            kept, temperature = kept_of(described, reader), described["views"][reader]["temperature"]
            if not kept.covers(asked):
                yield (
                    f"{run} kept {kept.words} of its view {reader!r}, and method.name = "
                    f'"{recipe.method.name}" asks for {asked.words}; a teacher that gives hidden states keeps '
                    "what every loss asks"
                )
            elif kept.answer != "distribution" and recipe.method.loss_temperature != temperature:
                yield (
                    f"method.loss_temperature = {recipe.method.loss_temperature}, but {run} kept {kept.words} of its "
                    f"view {reader!r} at {temperature}; keep that"
                )


def saved_warnings(recipe: Recipe) -> Iterator[str]:
    if recipe.saved_run is None:
        return
    if not Path(recipe.saved_run).expanduser().exists():
        yield f"teacher.run = {recipe.saved_run}: there is no such folder yet"
    if recipe.train.steps > 1:
        yield (
            f"the answers are those of {recipe.saved_run}: from the second step on another student gave them than the "
            "one that learns, so what an estimate from sampled tokens says of it is biased; whole distributions and "
            "lists are not"
        )
