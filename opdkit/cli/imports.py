"""The command that takes over other systems' configurations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdkit.cli.base import Set, app, console
from opdkit.data.files.write import file_to_write
from opdkit.errors import UserError
from opdkit.printable import printable
from opdkit.run.console import say

if TYPE_CHECKING:
    from opdkit.recipe.imported import Line


@app.command("import-config")
def import_config(
    file: Annotated[Path, typer.Argument(help="SDPO's or MOPD's YAML, or a launcher script of key=value words.")],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Where the recipe goes; else beside FILE, as .toml.")] = None,
    task: Annotated[str | None, typer.Option(help="Who grades; else from the data's name.")] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Take over what opdkit does otherwise on purpose, too.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write the recipe that another system's configuration comes to; says what became of every key."""
    from opdkit.recipe import key_values, override, parse_recipe, warnings
    from opdkit.recipe.imported import read_settings, translate
    from opdkit.run.folder import atomic_write
    from opdkit.toml import dumps

    if file.exists() and not file.is_file():
        raise UserError(f"{str(file)[:200]!r} is no file; give a YAML file or a launcher script")
    target = file_to_write(out or file.with_suffix(".toml"))
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; give --overwrite, or another name with --out")
    imported = translate(read_settings(file), task=task, parity=parity)
    imported.recipe.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "imported")
    for key, value in key_values(set_ or []).items():
        override(imported.recipe, key, value)
    _show(imported.lines)
    missing = [key for key in ("model.path", "data.train", "train.steps") if not _has(imported.recipe, key)]
    if missing:
        settings = " ".join(f"--set {key}=..." for key in missing)
        hint = " (epochs are counted there, optimizer steps here)" if "train.steps" in missing else ""
        raise UserError(f"{file} does not say {', '.join(missing)}{hint}: give {settings}. Nothing was written.")
    recipe = parse_recipe(imported.recipe, where=str(file))
    comment = f"# From {printable(file.name)} by opdkit import-config. What is not said here is the method's default.\n"
    ordered = {key: imported.recipe[key] for key in type(recipe).model_fields if key in imported.recipe}
    try:
        atomic_write(target, comment + dumps(ordered))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    say(console, f"wrote {target}")
    for sentence in warnings(recipe):
        say(console, sentence, mark="warning")


def _has(recipe: dict[str, Any], key: str) -> bool:
    section, name = key.split(".")
    return name in recipe.get(section, {})


def _show(lines: list[Line]) -> None:
    """Every key, by what became of it; last, those that move numbers."""
    from opdkit.recipe.imported.unlike import MOVES

    for fate, title in (
        ("same", "taken over"),
        ("default", "not in the file; what its launcher runs"),
        ("left out", "left out"),
        ("not known", "not known"),
    ):
        chosen = [line for line in lines if line.fate == fate]
        if not chosen:
            continue
        say(console, title, style="bold")
        for line in chosen:
            here = "" if line.ours is None else f" -> {line.ours}"
            note = f"   ({line.note})" if line.note else ""
            say(console, f"  {line.key} = {_shortened(line.value)}{here}{note}")
    if moving := [line.key for line in lines if MOVES in line.note]:
        said = f"{len(moving)} settings change results there and are left out: {', '.join(moving)}"
        say(console, said, mark="warning")


def _shortened(value: Any, characters: int = 200) -> str:
    text = str(value)
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text) - characters:,} characters more)"
