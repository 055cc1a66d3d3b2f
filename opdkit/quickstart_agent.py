"""`opdkit quickstart --agent`: a student that has never called a tool learns it from a teacher that can.

The problems are products of two numbers, and the tool is a calculator. The student has been taught to answer at once,
which it cannot do well; that there is a tool it learns from its own episodes, in which the teacher scores every token
that the student wrote. The recipe is recipes/agents/calculator.toml, and what `ARMS` changes in it.

`--whole` gives the baselines as many steps, evaluates on more problems, and has an arm with peers: a third model, which
was taught some calls, learns from its own successes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.quickstart import NO_TEACHER, Arm, Kind
from opdkit.recipe.shipped import recipe_file
from opdkit.run.console import Console
from opdkit.training.make_model import BATCH, make_model
from opdkit.training.problems.demonstrations import WORDING
from opdkit.training.problems.tool_lessons import calculator_tokenizer, direct_lessons, tool_lessons
from opdkit.types import Problem

DATA = "arithmetic:multiply-2:train"
TEACHER_STEPS, STUDENT_STEPS, HALF_STEPS = 200, 40, 160
POSITIONS = 192  # a peer's transcript, a problem and an episode
WHOLE_CHANGE = {"eval": {"limit": 512}}
SHORT = {"steps": 20}  # of the baselines, an eighth of the recipe's


def _grpo(label: str, train: Mapping[str, int]) -> Arm:
    change: dict[str, dict[str, Any] | None] = {"method": {"name": "grpo"}, "teacher": NO_TEACHER}
    how: dict[str, dict[str, Any] | None] = {
        "sampling": {"group_size": 8},
        "train": {"lr": 3e-4, "problems_per_step": 8, **train},
    }
    return Arm(label, change | how)


def _no_tool(label: str, train: Mapping[str, int]) -> Arm:
    change: dict[str, dict[str, Any] | None] = {"method": {"name": "sft"}, "teacher": NO_TEACHER, "episode": None}
    return Arm(label, {**change, "train": dict(train)}, fresh=True)


ARMS: Mapping[str, Arm] = {
    "grpo": _grpo("GRPO with the calculator, an eighth of the steps", SHORT),
    "no-tool": _no_tool("SFT without the calculator, an eighth of the steps", SHORT),
}
WHOLE_ARMS: Mapping[str, Arm] = {
    "peers": Arm(
        "self-distillation of a half-taught student that reads a peer's success",
        {
            "teacher": {"kind": "self", "weights": "initial"},
            "context": {"kind": "peers", "slots": ["success"], "feedback": "never", "wording": WORDING.model_dump()},
            "sampling": {"group_size": 8},
            "train": {"problems_per_step": 8, "lr": 2e-3},
        },
        student="half-taught",
    ),
    "grpo": _grpo("GRPO with the calculator, on the grader's reward", {}),
    "no-tool": _no_tool("SFT on unlimited products, without the calculator", {}),
}


def _make_models(folder: Path, seed: int, console: Console) -> None:
    _make(folder / "teacher", tool_lessons(DATA, num=TEACHER_STEPS * BATCH, seed=seed), seed, console)
    _make(folder / "student", direct_lessons(DATA, num=STUDENT_STEPS * BATCH, seed=seed), seed, console)


def _make_all_models(folder: Path, seed: int, console: Console) -> None:
    _make_models(folder, seed, console)
    half = tool_lessons(DATA, num=HALF_STEPS * BATCH, seed=seed + 1, with_peer=3)
    _make(folder / "half-taught", half, seed, console)


def _make(out: Path, taught: Sequence[Problem], seed: int, console: Console) -> None:
    make_model(
        out,
        data=DATA,
        hidden_size=64,
        num_layers=2,
        steps=len(taught) // BATCH,
        seed=seed,
        console=console,
        problems=taught,
        tokenizer=calculator_tokenizer(),
        max_positions=POSITIONS,
        name=out.name,
    )


AGENT = Kind(
    recipe=recipe_file(Path("agents/calculator")),
    make_models=_make_models,
    arms=ARMS,
    fresh=lambda num, seed: direct_lessons(DATA, num=num, seed=seed),
    steps=(
        "Two models from nothing: a teacher that calls the calculator, and a student that answers at once",
        "On-policy distillation in episodes: the student acts, the teacher scores every token that it wrote",
        "The same student by reward alone, and without the tool",
    ),
)
WHOLE_AGENT = replace(AGENT, make_models=_make_all_models, arms=WHOLE_ARMS, change=WHOLE_CHANGE)
