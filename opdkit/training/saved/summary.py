"""What a run says of itself: a few words after each step, and summary.json at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.recipe import Recipe
from opdkit.run.folder import RunFolder
from opdkit.run.history import Point
from opdkit.training.state import State


def summary_of(
    recipe: Recipe,
    state: State,
    results: Mapping[str, Any],
    warnings: Sequence[str],
    ended: str | None = None,
) -> dict[str, Any]:
    """results: of its evaluations. ended: why the run took fewer steps than its recipe has."""
    counters = dict(state.counters)
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "steps": state.step,
        **({} if ended is None else {"ended": {"step": state.step, "why": ended}}),
        "seconds": round(counters.pop("seconds", 0.0), 3),
        "tokens": {"answer": counters.pop("answer_tokens", 0.0), "teacher": counters.pop("teacher_tokens", 0.0)},
        "counts": counters,
        **results,
        "model": f"checkpoints/step_{state.step:06d}/model",
        "warnings": list(warnings),
    }


def best_of(recipe: Recipe, folder: RunFolder, best: Point | None) -> dict[str, Any]:
    """`train.keep_best`: the step that it chose, by what, and what was measured there. Step 0 is the model that the run
    began with: training never made it better."""
    if best is None:
        return {}
    evaluation = folder.evaluation(best.step)
    found = {
        "step": best.step,
        "chosen_on": recipe.train.keep_best,
        "value": best.value,
        "model": f"checkpoints/step_{best.step:06d}/model" if best.step else recipe.model.path,
        "eval": folder.read_evaluation(evaluation) if evaluation.exists() else None,
    }
    return {"best": found}


def note_of(seen: Mapping[str, float | None], speed: float) -> str:
    """Beside the bar. seen: the step's metrics."""
    parts = [f"loss {seen['train/loss']:.4f}"]
    if (reward := seen.get("rollout/reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    elif seen.get("rollout/num_ungraded"):
        parts.append("reward unknown")
    return "  ".join([*parts, f"{speed:,.0f} tok/s"])
