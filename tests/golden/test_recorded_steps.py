"""Two training steps per method, recorded. A drift that every other test forgives shows here.

Rewrite the record with `python tests/golden/test_recorded_steps.py`, and say in the commit why the numbers moved.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import train

RECORD = Path(__file__).with_name("recorded_steps.json")
NAMES = ("train/loss", "train/grad_norm", "student/entropy", "student/logprob", "rollout/answer_tokens")
# The published sentences hold characters that the tiny tokenizer does not know.
WORDING = {"layout": "{question}{success}{another}{failure}"} | dict.fromkeys(
    ("success", "another", "failure", "feedback", "summary", "failed_summary"), ";{text}"
)
PEERS = {"kind": "peers", "feedback": "never", "wording": WORDING}
CASES: dict[str, dict[str, Any]] = {
    "opd": {"method": {"name": "opd"}, "teacher": {"kind": "model", "path": "teacher"}},
    "opd sampled": {"method": {"name": "opd", "support": "sampled"}, "teacher": {"kind": "model", "path": "teacher"}},
    "opd jsd top-8": {
        "method": {
            "name": "opd",
            "divergence": "jsd",
            "teacher_share": 0.5,
            "support": "student_topk",
            "k": 8,
            "reduction": "sequence",
        },
        "teacher": {"kind": "model", "path": "teacher"},
    },
    "opsd ema": {
        "method": {"name": "opsd"},
        "teacher": {"kind": "self", "weights": "ema", "ema_rate": 0.1},
        "context": {"kind": "reference_solution", "template": "prefix"},
    },
    "pw_opsd": {
        "method": {"name": "pw_opsd"},
        "context": {"kind": "reference_solution", "template": "prefix"},
    },
    "eopd": {
        "method": {"name": "eopd"},
        "context": {"kind": "reference_solution", "template": "prefix"},
        "weights": {"importance": {"cap": 1.5}},
    },
    "reopold": {
        "method": {"name": "reopold", "switch_step": 1},
        "context": {"kind": "reference_solution", "template": "prefix"},
    },
    "opd soft_or": {
        "method": {"name": "opd"},
        "teacher": {"kind": "model", "path": "teacher"},
        "weights": {"tokens": {"name": "soft_or", "keep": 0.5}},
    },
    "sft": {"method": {"name": "sft"}},
    "topk_opd advantage": {
        "method": {"name": "topk_opd", "form": "advantage", "support": "union", "k": 4},
        "teacher": {"kind": "model", "path": "teacher"},
    },
    # Nobody is right here, so the teacher reads failures alone, and the reward's part of a mixture is 0.
    "mopd": {"method": {"name": "mopd"}, "context": PEERS},
    "sdpo trust region": {
        "method": {"name": "sdpo"},
        "context": {**PEERS, "slots": ["failure"]},
        "teacher": {"weights": "trust_region", "student_share": 0.2},
    },
    "grpo_opd": {"method": {"name": "grpo_opd"}, "teacher": {"kind": "model", "path": "teacher"}},
}


def record(case: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    for name, width, seed in (("student", 32, 0), ("teacher", 48, 1)):
        if not (folder / name).exists():
            tokenizer = char_tokenizer(arithmetic.ALPHABET + "()")
            make_model(folder / name, tokenizer=tokenizer, hidden_size=width, num_layers=2, seed=seed, max_positions=96)
    raw: dict[str, Any] = {
        "name": "golden",
        "seed": 7,
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(folder / "student"), "dtype": "float32", "device": "cpu"},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 32},
        "sampling": {"max_answer_tokens": 12, "group_size": 2},
        "train": {
            "steps": 2,
            "problems_per_step": 8,
            "lr": 1e-2,
            "schedule": "constant",
            "save_every": 0,
            "warmup_steps": 0,
        },
        **case,
    }
    if raw.get("teacher", {}).get("path"):
        raw["teacher"] = {**raw["teacher"], "path": str(folder / raw["teacher"]["path"])}
    recipe = parse_recipe(raw)
    train(recipe, console=Console(quiet=True), overwrite=(recipe.run_dir / "recipe.toml").exists())
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in NAMES} for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps(name: str, tmp_path: Path) -> None:
    """The second step's numbers pass through sampling, scoring, the loss, the optimizer and the teacher update.
    Recorded on one CPU: other kernels may differ in the fifth digit, and flip a token where two ids nearly tie."""
    recorded = json.loads(RECORD.read_text())[name]
    for step, (now, then) in enumerate(zip(record(CASES[name], tmp_path), recorded, strict=True)):
        assert now == pytest.approx(then, rel=2e-4, abs=1e-6), (
            f"step {step + 1} of {name!r} moved. Was it meant to alter what is learned? If not, this is the bug; "
            "if so, record anew and say why."
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = {name: record(case, Path(folder)) for name, case in CASES.items()}
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
    sys.exit(0)
