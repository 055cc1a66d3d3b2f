"""CONTRIBUTING's ten lines are a method: one file, one row, one recipe."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from rich.console import Console

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.methods import METHODS
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import train

PAGE = Path(__file__).parent.parent.parent / "CONTRIBUTING.md"


def test_the_page_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code on the page, saved as a file and given its row, trains from a recipe that names it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "mine", module.Mine)
    for name, seed in (("student", 0), ("teacher", 1)):
        tokenizer = char_tokenizer(arithmetic.ALPHABET)
        make_model(tmp_path / name, tokenizer=tokenizer, hidden_size=16, num_layers=1, seed=seed, max_positions=64)
    recipe = parse_recipe(
        {
            "name": "r",
            "runs_dir": str(tmp_path),
            "model": {"path": str(tmp_path / "student"), "dtype": "float32", "device": "cpu"},
            "teacher": {"kind": "model", "path": str(tmp_path / "teacher")},
            "data": {"train": "arithmetic:merge-2:train", "task": "arithmetic", "limit": 8},
            "sampling": {"max_answer_tokens": 8},
            "method": {"name": "mine"},
            "train": {"steps": 1, "problems_per_step": 2},
        }
    )
    assert recipe.sampling.group_size == 8, "the method's defaults stand below the recipe"
    summary = train(recipe, console=Console(quiet=True))
    assert summary["method"] == "mine" and summary["counts"]["skipped_steps"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_short_file(name: str) -> None:
    """At most 120 lines; what methods share (`base.py`, `preference.py`, `weighting/`) is not a method."""
    path = Path(inspect.getfile(METHODS[name]))
    assert path.parent.name == "methods" and len(path.read_text().splitlines()) <= 120
