"""Writes into every shipped recipe of real models which GPUs it fits, by `opdkit plan`: the line "# Fits: ...".

python benchmarks/plan_fits.py
"""

from __future__ import annotations

import re
from pathlib import Path

from opdkit.cost.plan import Sizes, fitting_gpus
from opdkit.errors import UserError
from opdkit.recipe import load_recipe
from opdkit.recipe.load import read_toml
from opdkit.recipe.pipeline import is_pipeline

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
LINE = re.compile(r"^# Fits: .*\n", re.MULTILINE)
# Of a student that an earlier stage makes: the model that it began as.
BEGAN_AS = {"runs/thunlp-cold-start/checkpoints/step_006250/model": "Qwen/Qwen3-1.7B-Base"}


def fits_line(path: Path) -> str | None:
    """What a recipe has to say of itself; None: of models whose sizes nobody knows, or of a pipeline."""
    if is_pipeline(read_toml(path)):
        return None
    recipe = load_recipe(path)
    given = {"model.path": BEGAN_AS[recipe.model.path]} if recipe.model.path in BEGAN_AS else {}
    try:
        found = fitting_gpus(recipe, Sizes(given, may_build=False))
    except UserError:
        return None
    return f"# Fits: {', '.join(found) or 'no single GPU'} (`opdkit plan`, an estimate for one GPU).\n"


def main() -> None:
    for path in sorted(RECIPES.rglob("*.toml")):
        line = fits_line(path)
        text = LINE.sub("", path.read_text(encoding="utf-8"))
        if line is not None:
            first = re.search(r"^(?!#)", text, re.MULTILINE)
            assert first is not None
            text = text[: first.start()] + line + text[first.start() :]
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(RECIPES), line and line.strip())


if __name__ == "__main__":
    main()
