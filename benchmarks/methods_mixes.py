"""Which lessons must a student have had, for a teacher that reads right and wrong peers to help it? Prints a table.

    python benchmarks/methods_mixes.py

For each mix of lessons a student is made as in `methods.py`, its reading is measured (`methods_reading.py`), and it is
trained by `mopd` as `methods.py` trains it (right, right, wrong; frozen teacher). About 4 minutes of one core.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import methods
import torch
from methods_reading import measure_reading

from opdkit.errors import Interrupted, UserError
from opdkit.training.make_model import BATCH, make_model
from opdkit.training.problems.demonstrations import MIX, Shown, demonstration_lessons

SEED = methods.TRIAL_SEED
FOLDER = Path("runs/methods-mixes")
MIXES: Mapping[str, Mapping[tuple[Shown, ...], int]] = {
    "one right answer": {(): 8, ("success",): 8},
    "all that a context shows": MIX,
}


def main() -> None:
    for name, mix in MIXES.items():
        path = FOLDER / "results" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        methods.once(path, {"mix": [[list(shown), share] for shown, share in mix.items()]}, _results, path.stem, mix)
        result = methods.read(path)
        print(f"\nlessons: {name}; mopd {_value(result['before'])} -> {_value(result['after'])}")
        for row in result["rows"]:
            known = {key: number for key, number in row.items() if isinstance(number, float)}
            print(f"  {row['shown']:24}" + "  ".join(f"{key} {value:.3f}" for key, value in known.items()), flush=True)


def _results(name: str, mix: Mapping[tuple[Shown, ...], int]) -> dict[str, Any]:
    how, model = methods.MODELS["student"], FOLDER / "models" / name
    data = f"{methods.WORLD}:train"
    if not model.exists():
        make_model(
            model,
            data=data,
            hidden_size=64,
            num_layers=how["num_layers"],
            steps=how["steps"],
            seed=how["seed"],
            reads_demonstrations=True,
            console=methods.quiet(),
            problems=demonstration_lessons(
                data, num=how["steps"] * BATCH, pool=how["limit"], seed=how["seed"], mix=mix
            ),
            train_overrides={"lr": how["lr"], "schedule": how["schedule"]},
        )
    here = [f"model.path={model}", f"runs_dir={FOLDER}", f"name={name}"]
    recipe = methods.recipe_of("mopd", SEED, here)
    rows = measure_reading(recipe, methods.recipe_of("opsd", SEED, here))
    done = methods.arm_results(recipe)
    before = methods.accuracy_of(Path(recipe.model.path), recipe)
    return {"rows": rows, "before": before, "after": done["accuracy"]}


def _value(accuracy: Mapping[str, Any]) -> str:
    estimate = accuracy["avg_at_n"]
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except (UserError, Interrupted) as stop:
        sys.exit(str(stop))
