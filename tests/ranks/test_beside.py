"""What stands beside the trainer, on ranks: answers that lag, what teachers said kept and read again, and engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from some_runs import apart, steps, trained, weights

from opdkit.recipe import Recipe
from opdkit.recipe.replay import replay_recipe
from opdkit.run.rows import load_rows

Make = Callable[..., Recipe]
SHORT = ("train.steps=3", "train.problems_per_step=3", "sampling.max_answer_tokens=8", "diagnostics.every=0")
TWO = ("--ranks", "2")


def rows(run: Path, step: int) -> list[object]:
    found = load_rows(run / f"rows/step_{step:06d}.parquet")
    return [(row.rollout.key, row.rollout.policy_version, row.rollout.answer_ids) for row in found]


@pytest.mark.ranks
def test_answers_lag_on_ranks_as_in_one_process(recipe: Make) -> None:
    """The first two steps learn from answers of the weights that all began with. A run that was stopped with answers
    waiting goes on with them, on as many ranks to the same bits."""
    chosen = (*SHORT, "sampling.lag=1", "train.save_every=1", "train.keep_checkpoints=9", "train.steps=4")
    alone = trained(recipe("opd", *chosen, "name=alone"))
    whole = trained(recipe("opd", *chosen, "name=whole"), *TWO)
    assert [line["rollout/lag"] for line in steps(whole)] == [0, 1, 1, 1]
    assert all(rows(whole, step) == rows(alone, step) for step in (1, 2))
    assert apart(weights(whole, 2), weights(alone, 2)) < 1e-5
    for flags in (TWO, ()):
        part = shutil.copytree(whole, whole.with_name(f"part-{len(flags)}"))
        for later in (3, 4):
            shutil.rmtree(part / f"checkpoints/step_{later:06d}")
        assert (part / "checkpoints/step_000002/queue/step_000002.parquet").exists()
        assert trained(recipe("opd", *chosen, f"name={part.name}"), *flags, "--resume") == part
        assert rows(part, 3) == rows(whole, 3)
        assert apart(weights(part, 4), weights(whole, 4)) <= (0 if flags else 1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["gathered", "sharded"])
def test_a_spool_of_ranks_is_read_again(strategy: str, recipe: Make) -> None:
    """Each keeps what it heard of its own rows. Read again by as many ranks it gives the same weights to the bit, by
    one process to rounding. The teacher moves, so its head is another one in every step."""
    chosen = ("opsd", "teacher.weights=ema", "teacher.ema_rate=0.5", *SHORT, f"parallel.strategy={strategy}")
    run = trained(recipe(*chosen, "spool.max_gib=1"), *TWO)
    assert len([*(run / "spool").glob("step_*-of-00002.safetensors")]) == 6
    assert len([*(run / "spool").glob("head_*")]) == 3
    assert replay_recipe(run).train.steps == 3
    for flags in (TWO, ()):
        line = [sys.executable, "-m", "opdkit", "replay", str(run), "--name", f"again-{len(flags)}", *flags]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        again = run.with_name(f"again-{len(flags)}")
        assert rows(again, 3) == rows(run, 3)
        assert apart(weights(again, 3), weights(run, 3)) <= (0 if flags else 1e-5)
