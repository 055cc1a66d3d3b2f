"""Links and names of files in pages for readers. `make docs` checks the site and its anchors; this needs no mkdocs."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from opdkit.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRACKED = [path for folder in ("opdkit", "benchmarks", "recipes", "tests") for path in (ROOT / folder).rglob("*.*")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    """Pictures, too. Not that an anchor exists."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith(("https://", "http://"))]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_pages_that_the_code_names_exist() -> None:
    """In messages, docstrings and comments."""
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in TRACKED
        if path.suffix in (".py", ".toml", ".md")
        for name in re.findall(r"\bdocs/[\w/]+\.(?:md|svg)", path.read_text())
    }
    assert named and not [where for where in named if not (ROOT / where[1]).exists()]


def test_the_package_page_has_no_link_into_the_repository(tmp_path: Path) -> None:
    """What pip and a package index show is README.md without relative links. Not how an index draws it."""
    pytest.importorskip("setuptools", reason="the virtual environment has no setuptools to build with")
    code = "import sys; from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*/METADATA")
    page = metadata.read_text().partition("\n\n")[2]
    assert "pip install" in page and "A first run goes through this" in page
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("https://")]


def test_every_recipe_key_is_described() -> None:
    """A comment beside the key or above it, which the reference shows. Not that it says the right thing."""
    code = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert code is not None and code.loader is not None
    hooks = importlib.util.module_from_spec(code)
    code.loader.exec_module(hooks)
    page = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    models = [hooks.named(name) for name in re.findall(r"<!-- keys: (\S+) -->", page)]
    models += [row for name in re.findall(r"<!-- choices: (\S+) -->", page) for row in hooks.named(name).values()]
    keys = {(model, key) for model in models for key in model.model_fields if key not in ("name", "kind")}
    assert len(keys) > 150
    assert not sorted({f"{model.__name__}.{key}" for model, key in keys if key not in hooks.descriptions(model)})


@pytest.mark.parametrize("name", ["methods/index.md", "start/first_run.md"])
def test_recipes_on_pages_are_valid(name: str) -> None:
    """Parts of recipes are completed with what every run needs."""
    rest = {"name": "r", "model": {"path": "m"}, "data": {"train": "t", "task": "math"}, "train": {"steps": 1}}
    rest["sampling"] = {"group_size": 2}
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_recipe({**rest, **tomllib.loads(block)})
