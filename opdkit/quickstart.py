"""`opdkit quickstart`: the main job from nothing, in minutes on a CPU.

A teacher and a student are made (no weights are downloaded), the student learns from its own answers under the teacher,
and the same student is given to the baselines with the same prompts and steps. Every arm is an ordinary run with an
ordinary recipe: `quickstart.toml`, and what `ARMS` changes in it.

`--agent` (`quickstart_agent.py`) does the same for a student that learns to call a tool.

    runs/quickstart/           the OPD run: recipe, metrics, rows, checkpoints, summary.json, report.html, figure.svg
    runs/quickstart-<arm>/     the baselines
    runs/quickstart-models/    teacher/ and student/, in Hugging Face format
"""

from __future__ import annotations

import os
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe
from opdkit.reporting import headline_figure, write_report
from opdkit.run.console import Console, Line, Table, say
from opdkit.run.folder import RunFolder
from opdkit.training.loop import train
from opdkit.training.make_model import lessons, make_model
from opdkit.types import Problem

DATA = "arithmetic:merge-4:train"
MARKER = ".made-by-opdkit-quickstart"
TEACHER_STEPS, STUDENT_STEPS = 300, 120
TEACHER_TRAIN = {"schedule": "linear"}
STUDENT_TRAIN = {"schedule": "constant"}  # stopped half-way: a student that can already do some of it
NO_TEACHER: dict[str, Any] = {"kind": "none", "path": None}


@dataclass(frozen=True, slots=True)
class Arm:
    """A baseline: what it changes in the recipe, with the learning rate that suits it best. A section of None goes."""

    label: str
    change: Mapping[str, dict[str, Any] | None]
    fresh: bool = False  # sees new problems with solutions at every step, instead of those of the recipe
    student: str = "student"  # which of the models begins; another one is measured before it learns


ARMS: Mapping[str, Arm] = {
    "sft": Arm(
        "SFT on solutions of the same problems",
        {"method": {"name": "sft"}, "teacher": NO_TEACHER, "train": {"lr": 2e-3}},
    ),
    "sft-teacher": Arm(
        "SFT on answers sampled by the teacher",
        {"method": {"name": "sft", "answers": "teacher"}, "train": {"lr": 8e-3}},
    ),
    "grpo": Arm(
        "GRPO on the grader's reward",
        {
            "method": {"name": "grpo"},
            "teacher": NO_TEACHER,
            "sampling": {"group_size": 8},
            "train": {"lr": 3e-4, "problems_per_step": 8},
        },
    ),
    "sft-unlimited": Arm(
        "SFT on unlimited solved problems",
        {"method": {"name": "sft"}, "teacher": NO_TEACHER, "train": {"lr": 8e-3}},
        fresh=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What is learned: by which recipe, from which models, beside what."""

    recipe: Path
    make_models: Callable[[Path, int, Console], None]  # folder, seed
    arms: Mapping[str, Arm]
    fresh: Callable[[int, int], Sequence[Problem]]  # solved problems for the arms that see new ones: how many, seed
    steps: tuple[str, str, str]  # what is being done, for the terminal
    change: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # of the recipe, for all arms


def quickstart(out: Path, *, kind: Kind, seed: int, console: Console) -> dict[str, Any]:
    """Run all of it; returns the summary of the OPD run with its arms. An earlier quickstart in `out` is replaced."""
    started = time.monotonic()
    # Models this small are faster on one thread, and its numbers are then the same whatever the number of cores.
    torch.set_num_threads(1)
    if not out.name:
        raise UserError(f"--out {out} has no name of its own; give a folder to be made, e.g. runs/quickstart")
    recipes = {arm: _recipe(kind, out, seed, arm) for arm in ("", *kind.arms)}
    _check_ours(out, out.with_name(f"{out.name}-models"))
    for recipe in recipes.values():  # before minutes of work
        RunFolder.locked(recipe.run_dir, overwrite=_exists(recipe.run_dir)).close()
    models = out.with_name(f"{out.name}-models")
    _say(console, f"1/3  {kind.steps[0]}")
    models.mkdir(parents=True, exist_ok=True)
    (models / MARKER).touch()
    for name in ("teacher", "student", *(arm.student for arm in kind.arms.values())):
        shutil.rmtree(models / name, ignore_errors=True)
    kind.make_models(models, seed, console)
    _say(console, f"2/3  {kind.steps[1]}")
    summary = train(recipes[""], console=console, overwrite=_exists(out))
    _say(console, f"3/3  {kind.steps[2]}")
    arms = {}
    for name, arm in kind.arms.items():
        recipe = recipes[name]
        fresh = kind.fresh(recipe.train.steps * recipe.train.problems_per_step, seed + 1) if arm.fresh else None
        done = train(recipe, console=console, overwrite=_exists(recipe.run_dir), problems=fresh)
        arms[name] = {"label": arm.label, "eval": done["eval"]["student_after"], "seconds": done["seconds"]}
        if done["eval"]["student_before"]:
            arms[name]["before"] = done["eval"]["student_before"]
    summary["arms"] = arms
    folder = RunFolder(out)
    folder.write_summary(summary)
    headline_figure(summary, out / "figure.svg")
    report = write_report(out)
    say(console, _table(summary))
    say(console, f"{time.monotonic() - started:.0f} s in all. Report: {report}")
    return summary


def _recipe(kind: Kind, out: Path, seed: int, arm: str) -> Recipe:
    raw = tomllib.loads(kind.recipe.read_text(encoding="utf-8"))
    name = f"{out.name}-{arm}" if arm else out.name
    models = out.with_name(f"{out.name}-models")
    raw |= {"name": name, "seed": seed, "runs_dir": str(out.parent)}
    for section, change in kind.change.items():
        raw[section] |= change
    raw["model"]["path"], raw["teacher"]["path"] = str(models / "student"), str(models / "teacher")
    if arm:
        if kind.arms[arm].fresh:
            # Made on the fly; the recipe that is kept says so, and names no file that would be other data.
            raw["data"]["train"] = f"lessons of {raw['data']['train']}"
        for section, own in kind.arms[arm].change.items():
            if own is None:
                del raw[section]
            else:
                raw[section] = own if section in ("method", "teacher") else {**raw.get(section, {}), **own}
        begins = kind.arms[arm].student
        raw["model"]["path"] = str(models / begins)
        raw["eval"] |= {"before": begins != "student", "teacher": False}  # the main run has measured the others
    return parse_recipe(raw, where="quickstart")


def _check_ours(out: Path, models: Path) -> None:
    """Raises UserError unless what stands there is an earlier quickstart: only that is replaced unasked."""
    if os.path.lexists(models) and not (models / MARKER).exists():
        raise UserError(f"{models} was not made by the quickstart; choose another --out, or remove it")
    if (out / "recipe.toml").exists() and RunFolder(out).read_recipe().get("model", {}).get("path") != str(
        models / "student"
    ):
        raise UserError(f"{out} holds a run that is no quickstart; choose another --out, or remove it")


def learned(summary: Mapping[str, Any]) -> bool:
    """Whether the student is measurably better than before: the 95 % intervals are apart, on every evaluation set."""
    before, after = summary["eval"]["student_before"], summary["eval"]["student_after"]
    return all(after[source]["avg_at_n"]["low"] > e["avg_at_n"]["high"] for source, e in before.items())


def _make_models(folder: Path, seed: int, console: Console) -> None:
    pool = load_problems(DATA, task="arithmetic", limit=512, seed=seed).problems  # what the recipe trains on
    fresh = lessons(DATA, num=TEACHER_STEPS * 64, seed=seed)
    for name, layers, steps, taught, how in (
        ("teacher", 3, TEACHER_STEPS, fresh, TEACHER_TRAIN),
        ("student", 2, STUDENT_STEPS, pool, STUDENT_TRAIN),
    ):
        make_model(
            folder / name,
            data=DATA,
            hidden_size=64,
            num_layers=layers,
            steps=steps,
            seed=seed,
            console=console,
            problems=taught,
            train_overrides=how,
            name=name,
        )


PLAIN = Kind(
    recipe=Path(__file__).with_suffix(".toml"),
    make_models=lambda folder, seed, console: _make_models(folder, seed, console),
    arms=ARMS,
    fresh=lambda num, seed: lessons(DATA, num=num, seed=seed),
    steps=(
        "Two models from nothing: a teacher, and a student that has seen 512 solved problems",
        "On-policy distillation: the student answers, the teacher scores every token",
        "The same student under the baselines: same problems, same number of answers",
    ),
)


def _exists(run: Path) -> bool:
    return (run / "recipe.toml").exists()


def _say(console: Console, text: str) -> None:
    say(console, "", Line((text, "bold")))


def _of_arm(arm: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    before = [(f"before {arm['label']}", arm["before"])] if "before" in arm else []
    return [*before, (f"after {arm['label']}", arm["eval"])]


def _table(summary: Mapping[str, Any]) -> Table:
    (after,) = summary["eval"]["student_after"].values()
    most = max(after["pass_at_k"], key=int)  # answers to each problem
    heads = ("one sampled answer", f"any of {most}") if int(most) > 1 else ("one sampled answer",)
    table = Table("", *heads, title=f"{after['problems']} held-out problems, 95 % intervals")
    shown = {
        "teacher": summary["eval"]["teacher"],
        "student before": summary["eval"]["student_before"],
        "student after OPD": summary["eval"]["student_after"],
        **{label: results for arm in summary["arms"].values() for label, results in _of_arm(arm)},
    }
    for label, results in shown.items():
        (e,) = results.values()
        avg, some = e["avg_at_n"], e["pass_at_k"][most]
        cells = (f"{avg['value']:.3f}  [{avg['low']:.3f}, {avg['high']:.3f}]", f"{some['value']:.3f}")
        table.add_row(label, *cells[: len(heads)])
    return table
