"""What a run says of itself: a few words after each step, and summary.json at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.measure.accuracy import Accuracy
from opdkit.recipe import Recipe
from opdkit.training.state import State


def summary_of(
    recipe: Recipe,
    state: State,
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    teacher: dict[str, Accuracy] | None,
    warnings: Sequence[str],
    ended: str | None = None,
) -> dict[str, Any]:
    """ended: why the run took fewer steps than its recipe has."""
    counters = dict(state.counters)
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "steps": state.step,
        **({} if ended is None else {"ended": {"step": state.step, "why": ended}}),
        "seconds": round(counters.pop("seconds", 0.0), 3),
        "tokens": {"answer": counters.pop("answer_tokens", 0.0), "teacher": counters.pop("teacher_tokens", 0.0)},
        "counts": counters,
        "eval": {"student_before": before, "student_after": after, "teacher": teacher},
        "model": f"checkpoints/step_{state.step:06d}/model",
        "warnings": list(warnings),
    }


def note_of(seen: Mapping[str, float | None], speed: float) -> str:
    """Beside the bar. seen: the step's metrics."""
    parts = [f"loss {seen['train/loss']:.4f}"]
    if (reward := seen.get("rollout/reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    elif seen.get("rollout/num_ungraded"):
        parts.append("reward unknown")
    return "  ".join([*parts, f"{speed:,.0f} tok/s"])
