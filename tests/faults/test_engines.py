"""An engine beside the trainer that is killed while it answers: no answer is lost, and none is there twice."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import HERE, Warm, differences, numbers

from opdkit.run.rows import load_rows

pytestmark = pytest.mark.faults
DEATHS = ("1", "2,3", "9")


def _run(warm: Warm, write_recipe: Callable[..., Path], folder: Path, model: Path, deaths: str) -> dict[str, Any]:
    folder.mkdir()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(HERE / "served.py"), str(model), str(port), deaths])
    try:
        for _ in range(600):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        write_recipe(
            folder,
            sampling={"engine": "server", "url": f"http://127.0.0.1:{port}", "max_answer_tokens": 6},
            weights={"problems": {"name": "paced"}},
            eval={"samples": 1},
        )
        done = warm("train", "recipe.toml", cwd=folder)
        assert done.status == 0, done.said
    finally:
        server.terminate()
        server.wait()
    found = numbers(folder / "runs/run")
    for step in (1, 2):
        rollouts = [row.rollout for row in load_rows(folder / f"runs/run/rows/step_{step:06d}.parquet")]
        counts = Counter((one.problem_id, one.sample_id) for one in rollouts)
        assert len(counts) == 6 and set(counts.values()) == {1}
        assert {one.policy_version for one in rollouts} == {step - 1}
    return {name: found[name] for name in found if name.startswith(("rows/", "checkpoints/", "eval/"))}


def test_an_engine_that_is_killed(
    warm: Warm, write_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
) -> None:
    """At its first answer, in the middle of a step, again and again, in an evaluation: rows, evaluations and
    checkpoints are the undisturbed run's. The engine is a fake one; its port comes back, as a supervisor's would."""
    whole = _run(warm, write_recipe, tmp_path / "whole", models["student"], "")
    for number, deaths in enumerate(DEATHS):
        found = _run(warm, write_recipe, tmp_path / str(number), models["student"], deaths)
        assert differences(found, whole) == [], deaths
