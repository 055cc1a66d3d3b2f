"""`opdkit quickstart --agent`: a student that has never called a tool learns it from a teacher that can.

The problems are products of two numbers, and the tool is a calculator. The student has been taught to answer at once,
which it cannot do well; that there is a tool it learns from its own episodes, in which the teacher scores every token
that the student wrote. In the arm with peers a third model, which was taught some calls, learns from its own successes.
The recipe is recipes/agents/calculator.toml, and what `ARMS` changes in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from opdkit.quickstart import NO_TEACHER, Arm, Kind
from opdkit.recipe.shipped import recipe_file
from opdkit.run.console import Console
from opdkit.training.make_model import BATCH, make_model
from opdkit.training.problems.demonstrations import WORDING
from opdkit.training.problems.tool_lessons import calculator_tokenizer, direct_lessons, tool_lessons

DATA = "arithmetic:multiply-2:train"
TEACHER_STEPS, STUDENT_STEPS, HALF_STEPS = 300, 40, 160
POSITIONS = 192  # a peer's transcript, a problem and an episode

ARMS: Mapping[str, Arm] = {
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
    "grpo": Arm(
        "GRPO with the calculator, on the grader's reward",
        {
            "method": {"name": "grpo"},
            "teacher": NO_TEACHER,
            "sampling": {"group_size": 8},
            "train": {"lr": 3e-4, "problems_per_step": 8},
        },
    ),
    "no-tool": Arm(
        "SFT on unlimited products, without the calculator",
        {"method": {"name": "sft"}, "teacher": NO_TEACHER, "episode": None},
        fresh=True,
    ),
}


def _make_models(folder: Path, seed: int, console: Console) -> None:
    for name, steps, taught in (
        ("teacher", TEACHER_STEPS, tool_lessons(DATA, num=TEACHER_STEPS * BATCH, seed=seed)),
        ("half-taught", HALF_STEPS, tool_lessons(DATA, num=HALF_STEPS * BATCH, seed=seed + 1, with_peer=3)),
        ("student", STUDENT_STEPS, direct_lessons(DATA, num=STUDENT_STEPS * BATCH, seed=seed)),
    ):
        make_model(
            folder / name,
            data=DATA,
            hidden_size=64,
            num_layers=2,
            steps=steps,
            seed=seed,
            console=console,
            problems=taught,
            tokenizer=calculator_tokenizer(),
            max_positions=POSITIONS,
            name=name,
        )


AGENT = Kind(
    recipe=recipe_file(Path("agents/calculator")),
    make_models=_make_models,
    arms=ARMS,
    fresh=lambda num, seed: direct_lessons(DATA, num=num, seed=seed),
    steps=(
        "Two models from nothing: a teacher that calls the calculator, and a student that answers at once",
        "On-policy distillation in episodes: the student acts, the teacher scores every token that it wrote",
        "The same student otherwise: same problems, same number of answers",
    ),
)
