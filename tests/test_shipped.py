"""What a stranger gets who installs the wheel and has no checkout: the package, its recipes, one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def lock() -> dict[str, Any]:
    return tomllib.loads((REPO / "uv.lock").read_text(encoding="utf-8"))


def test_the_lock_names_public_indexes_alone_and_every_file_by_hash() -> None:
    """No mirror of wherever it was made. Not that the files are there: `uv sync --frozen` says so."""
    files = [file for one in lock()["package"] for file in [*one.get("wheels", []), *filter(None, [one.get("sdist")])]]
    hosts = {urlsplit(address).netloc for address in re.findall(r'"(\w+://[^"]+)"', (REPO / "uv.lock").read_text())}
    assert hosts == {"pypi.org", "files.pythonhosted.org", "download.pytorch.org"}
    assert len(files) > 1000 and all(re.fullmatch("sha256:[0-9a-f]{64}", file["hash"]) for file in files)
    assert {one["source"].get("registry") for one in lock()["package"]} == {
        None, "https://pypi.org/simple", "https://download.pytorch.org/whl/cpu"
    }  # fmt: skip


def test_the_lock_is_of_this_pyproject_and_has_the_tested_versions() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    packages = lock()["package"]
    (own,) = (one for one in packages if one["name"] == "opdkit")
    extras = project["project"]["optional-dependencies"]
    wanted = [Requirement(line) for lines in (project["project"]["dependencies"], *extras.values()) for line in lines]
    locked = {(need["name"], need.get("specifier", "")) for need in own["metadata"]["requires-dist"]}
    assert locked == {(canonicalize_name(need.name), str(need.specifier)) for need in wanted}, "run `make lock`"
    assert set(own["metadata"]["provides-extras"]) == set(extras)
    assert project["tool"]["uv"]["conflicts"] == [[{"extra": name} for name in ("cpu", "cu13", "vllm")]]
    versions = {(one["name"], one.get("version", "").split("+")[0]) for one in packages}
    pins = [line.split("==") for line in (REPO / "constraints.txt").read_text().split() if "==" in line]
    assert len(pins) > 90 and not [pin for pin in pins if (canonicalize_name(pin[0]), pin[1]) not in versions]
    page = (REPO / "docs/reference/licences.md").read_text()
    said = re.findall(r"^\| (\S+) \| \S+ \| (.+?) \|", page, re.MULTILINE)
    assert {canonicalize_name(name) for name, _ in pins} <= {name for name, _ in said}
    assert "not stated" not in page


def test_the_image_has_no_compiler_and_no_root_and_the_compose_file_opens_nothing() -> None:
    """As the files say it; CI builds them and looks (images.yml)."""
    last = (REPO / "docker/Dockerfile").read_text().split("\nFROM ")[-1]
    assert not re.search(r"apt-get|pip|gcc|build-essential|\buv\b", last.replace("/opt/", ""))
    assert re.search(r"^USER [1-9]\d*$", last, re.MULTILINE)
    # Triton 3.7 keeps its module by its source alone; a later one also by the folder of the driver's library.
    assert all(one["version"].startswith("3.7.") for one in lock()["package"] if one["name"] == "triton")
    compose = yaml.safe_load((REPO / "docker/compose.yaml").read_text())
    assert compose["networks"] == {"inside": {"internal": True}}
    for service in compose["services"].values():
        assert service["networks"] == ["inside"] and "ports" not in service
        assert service["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
