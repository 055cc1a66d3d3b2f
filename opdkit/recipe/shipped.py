"""The recipes that come with opdkit: in the package where it is installed, in `recipes/` of a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def shipped_recipes() -> dict[str, Path]:
    """By name, "mopd/math_mopd", in order."""
    installed = _PACKAGE / "recipes"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "recipes"
    files = sorted(folder.rglob("*.toml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe_file(path: Path) -> Path:
    """The file of that path; where none is there, the shipped recipe of that name ("mopd/math_mopd", also with .toml
    and below recipes/, as the documentation writes it)."""
    if path.exists() or path.is_absolute():
        return path
    name = path.with_suffix("") if path.suffix == ".toml" else path
    return shipped_recipes().get(name.as_posix().removeprefix("recipes/"), path)


def about(file: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    said = " ".join(lines)
    end = next((at for at in range(len(said)) if said[at] in ".:" and said[at + 1 : at + 2] in ("", " ")), len(said))
    return said[:end]
