"""A teacher whose tokenizer merges digits, beside one that has the student's own. Prints a table.

    python benchmarks/another_tokenizer.py                # seed 0; 7 arms, about 5 minutes of one idle core
    python benchmarks/another_tokenizer.py --seeds 0 1 2

The student and the control's teacher are those of `methods.py`. The other teacher is taught the same lessons in tokens
of two digits ("4567" is "45", "67"), so what the student writes as two tokens is one to it. An arm is `methods.toml`
with `opd` and what `ARMS` says; finished arms are kept in runs/another-tokenizer/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import methods
import torch

from opdkit.errors import Interrupted, UserError
from opdkit.recipe import Recipe, load_recipe
from opdkit.training.make_model import BATCH, lessons, make_model

FOLDER = Path("runs/another-tokenizer")
TEACHER = FOLDER / "models" / "teacher"
STUDENT = methods.FOLDER / "models" / "student"
SAMPLED = ("method.support=sampled", "train.lr=1e-3")
LISTS = ("method.support=student_topk", "method.k=4", "train.lr=4e-3")
ALIGN = ("teacher.tokens=align", f"teacher.path={TEACHER}")
OWN = (f"teacher.path={methods.FOLDER / 'models' / 'teacher'}",)
ARMS: Mapping[str, tuple[str, ...]] = {
    "exact": (*ALIGN, *SAMPLED),
    "even": (*ALIGN, *SAMPLED, "teacher.span=even"),
    "macro": (*ALIGN, *SAMPLED, "teacher.span=macro"),
    "lists": (*ALIGN, *LISTS),
    "proportional": (*ALIGN, *SAMPLED, "teacher.span=proportional"),
    "same-sampled": (*OWN, *SAMPLED),
    "same-lists": (*OWN, *LISTS),
}
SHARES = ("said", "one_to_one", "merged", "masked", "digits_one_to_one")


def main() -> None:
    options = _options()
    methods.make_models()
    methods.once(_result("teacher"), {"models": methods.MODELS}, _teacher_results)
    print("| arm | seed | accuracy | 95 % interval | said | one to one | merged | masked | digits one to one |")
    print("|---|---|---|---|---|---|---|---|---|")
    made = methods.read(methods.FOLDER / "results" / "models.json")
    _print("student", "", made["student"]["accuracy"], {})
    _print("its own tokens: teacher", "", made["teacher"]["accuracy"], {})
    _print("tokens of two digits: teacher", "", methods.read(_result("teacher"))["accuracy"], {})
    for seed in options.seeds:
        for name in ARMS:
            recipe = recipe_of(name, seed)
            methods.once(_result(recipe.name), {"recipe": recipe.as_dict(), "models": methods.MODELS}, _arm, recipe)
            found = methods.read(_result(recipe.name))
            _print(name, str(seed), found["accuracy"], found["shares"])


def recipe_of(name: str, seed: int) -> Recipe:
    own = [f"name={name}-{seed}", f"seed={seed}", f"runs_dir={FOLDER}", f"model.path={STUDENT}"]
    own += ["method.name=opd", "teacher.kind=model"]
    return load_recipe(methods.RECIPE, [*own, *ARMS[name]])


def _teacher_results() -> dict[str, Any]:
    how, data = methods.MODELS["teacher"], f"{methods.WORLD}:train"
    make_model(
        TEACHER,
        data=data,
        hidden_size=64,
        num_layers=how["num_layers"],
        steps=how["steps"],
        seed=how["seed"],
        reads_demonstrations=True,  # to have the student's characters
        digits_per_token=2,
        console=methods.quiet(),
        problems=lessons(data, num=how["steps"] * BATCH, seed=how["seed"]),
        train_overrides={"lr": how["lr"], "schedule": how["schedule"]},
    )
    return {"accuracy": methods.accuracy_of(TEACHER, methods.recipe_of("grpo", methods.TRIAL_SEED))}


def _arm(recipe: Recipe) -> dict[str, Any]:
    results = methods.arm_results(recipe)
    lines = (recipe.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    means = {}
    for share in SHARES:
        values = [line[key] for line in told if line.get(key := f"teacher/share_{share}") is not None]
        means[share] = sum(values) / len(values) if values else None
    return {**results, "shares": means}


def _print(name: str, seed: str, accuracy: Mapping[str, Any], shares: Mapping[str, float | None]) -> None:
    estimate = accuracy["avg_at_n"]
    known = [shares.get(share) for share in SHARES]
    shown = ["" if share is None else f"{100 * share:.0f} %" for share in known]
    interval = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
    print(f"| {name} | {seed} | {estimate['value']:.3f} | {interval} | {' | '.join(shown)} |", flush=True)


def _result(name: str) -> Path:
    return FOLDER / "results" / f"{name}.json"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except (UserError, Interrupted) as stop:
        sys.exit(str(stop))
