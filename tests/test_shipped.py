"""What a stranger gets who installs the wheel and has no checkout: the package, its recipes, one version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from opdkit import __version__
from opdkit.errors import UserError
from opdkit.recipe import load_recipe
from opdkit.recipe.check import check_file
from opdkit.recipe.shipped import about, shipped_recipes

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, since a build leaves files beside its source."""
    copy = tmp_path_factory.mktemp("source") / "opdkit"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("opdkit", "recipes"):
        shutil.copytree(REPO / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / file, copy)
    out = copy.parent / "wheel"
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_every_file_and_says_what_it_is(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {path.relative_to(REPO).as_posix() for path in (REPO / "opdkit").rglob("*.py")}
    recipes = {f"opdkit/{path.relative_to(REPO).as_posix()}" for path in (REPO / "recipes").rglob("*.toml")}
    assert code | recipes | {"opdkit/py.typed", "opdkit/quickstart.toml"} <= names
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    said = message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    assert said["Version"] == __version__ and said["License-Expression"] == "Apache-2.0"
    assert "Project-URL" not in said  # there is no page yet, and an address that leads nowhere is worse than none


def test_the_wheel_checks_its_recipes_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Without the checkout; the libraries are those of this environment."""
    command = [sys.executable, "-m", "opdkit", "check", "mopd/math_mopd", "recipes/pipelines/cold_start.toml"]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok mopd/math_mopd" in done.stdout and "ok recipes/pipelines/cold_start.toml" in done.stdout


def test_shipped_recipes_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = REPO / "recipes" / "mopd" / "math_mopd.toml"
    expected = load_recipe(file)
    for name in ("mopd/math_mopd", "mopd/math_mopd.toml", "recipes/mopd/math_mopd.toml"):
        assert load_recipe(name) == expected
    check_file(Path("pipelines/cold_start"))  # its stages name recipes beside it
    with pytest.raises(UserError, match="did you mean mopd/math_mopd"):
        load_recipe("mopd/math_mop")
    with pytest.raises(UserError, match="`opdkit recipes` lists"):
        load_recipe("nothing-like-it")
    (tmp_path / "paced.toml").write_text('name = "mine"')
    with pytest.raises(UserError, match=r"paced\.toml: model"):  # a file of one's own comes first
        load_recipe("paced.toml")


def test_every_recipe_says_what_it_is() -> None:
    said = {name: about(file) for name, file in shipped_recipes().items()}
    assert len(said) > 50 and all(4 <= len(words) < 120 for words in said.values()), said
