"""The best checkpoint, an early end, the mean of the last checkpoints: one tiny run, and the same one resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from opdkit.measure.accuracy import Accuracy
from opdkit.recipe import Recipe
from opdkit.reporting.follow import Follower
from opdkit.training import evaluations
from opdkit.training.loop import train
from opdkit.training.saved import checkpoint

Make = Callable[..., Recipe]
TEST, DEV = "arithmetic:merge-3:test", "arithmetic:merge-2:test"
NAME = "eval/arithmetic_merge-2_test/avg_at_n"
KEYS = (
    *("train.steps=6", "train.save_every=2", "train.keep_checkpoints=2", "train.average_last=2"),
    *("train.schedule=constant", "train.problems_per_step=2", f"train.keep_best={NAME}"),
    *(f'eval.data="{TEST}"', f'eval.select_on="{DEV}"', "eval.limit=2", "eval.samples=2", "eval.every=1"),
)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """avg@n of the sets that are evaluated, one after another, the set to choose on last; a random model has none."""
    values: list[float] = []
    real = evaluations.measure

    def measure(*args: Any, **kwargs: Any) -> tuple[Accuracy, None]:
        found, _ = real(*args, **kwargs)
        if values:
            found["avg_at_n"] |= {"value": values.pop(0)}
        return found, None

    monkeypatch.setattr(evaluations, "measure", measure)
    return values


def test_the_best_is_kept_and_the_run_ends_early(recipe: Make, console: Console, scored: list[float]) -> None:
    """Chosen on the one set at step 1, where nothing else saves; the other set's best is another step. The last
    checkpoints' mean is theirs. Going on, the run has ended."""
    dev, test = [0.1, 0.7, 0.6, 0.7, 0.2], [0.0, 0.1, 0.2, 0.9, 0.4]
    scored.extend(value for pair in zip(test, dev, strict=True) for value in pair)
    chosen = recipe("sft", *KEYS, f'train.stop_when="{NAME} stalls for 3"')
    summary = train(chosen, console=console)
    assert summary["best"].pop("eval")[TEST]["avg_at_n"]["value"] == 0.1
    assert summary["best"] == {
        "step": 1, "chosen_on": NAME, "value": 0.7, "model": "checkpoints/step_000001/model",
    }  # fmt: skip
    assert summary["ended"] == {"step": 4, "why": f"train.stop_when: {NAME} stalls for 3"} and summary["steps"] == 4
    assert summary["eval"]["student_after"][TEST]["avg_at_n"]["value"] == 0.4
    folder = chosen.run_dir / "checkpoints"
    assert checkpoint.steps(folder) == [1, 2, 4] and Follower(chosen.run_dir).look().state == "finished"
    assert summary["average"]["steps"] == [2, 4] and set(summary["average"]["eval"]) == {TEST, DEV}
    mean, *parts = (
        load_file(folder / name / "model" / "model.safetensors") for name in ("average", "step_000002", "step_000004")
    )
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((parts[0][name].double() + parts[1][name].double()) / 2).float())
    again = train(chosen, console=console, resume=True)
    assert json.loads(json.dumps(again["best"]["step"])) == 1 and again["ended"] == summary["ended"]
    assert checkpoint.steps(folder) == [1, 2, 4]
    assert train(recipe("sft", *KEYS), console=console, resume=True)["steps"] == 6  # nothing ends it any more
    assert checkpoint.steps(folder) == [1, 4, 6]
