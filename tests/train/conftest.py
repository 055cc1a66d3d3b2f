"""Two tiny models of the arithmetic world, with random weights: fast, and wrong in interesting ways."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import Recipe, parse_recipe
from opdkit.tasks import arithmetic


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, width, seed in (("student", 32, 0), ("teacher", 48, 1)):
        make_model(
            folder / name,
            tokenizer=char_tokenizer(arithmetic.ALPHABET + "()"),
            hidden_size=width,
            num_layers=1,
            seed=seed,
            max_positions=96,
        )
    return {name: folder / name for name in ("student", "teacher")}


@pytest.fixture
def console() -> Console:
    return Console(width=200, force_terminal=False)


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Any:
    def make(method: str, *overrides: str) -> Recipe:
        with_model = method in ("opd", "topk_opd", "grpo_opd")
        teacher = {"kind": "model", "path": str(models["teacher"])} if with_model else {}
        context = {"opsd": {"kind": "reference_solution", "template": "prefix"}}.get(method, {"kind": "none"})
        raw = {
            "name": "run",
            "seed": 3,
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(models["student"]), "dtype": "float32", "device": "cpu"},
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 40},
            "context": context,
            "sampling": {"max_answer_tokens": 16, "group_size": 2, "temperature": 1.0},
            "method": {"name": method},
            "train": {"steps": 6, "problems_per_step": 5, "lr": 1e-3, "save_every": 2},
            **({"teacher": teacher} if teacher else {}),
        }
        return parse_recipe(raw, [override.replace("$TEACHER", str(models["teacher"])) for override in overrides])

    return make
