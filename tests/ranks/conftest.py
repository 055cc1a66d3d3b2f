"""Several ranks of a test, on this machine's CPUs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import warm

SCRIPT = Path(__file__).with_name("step_on_ranks.py")


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a job of step_on_ranks.py, or of another script, on so many ranks."""

    def run(job: Mapping[str, Any], num_ranks: int, script: Path = SCRIPT) -> Any:
        path = tmp_path_factory.mktemp("ranks") / "job.json"
        path.write_text(json.dumps(job))
        done = warm().run(script=str(script), job=str(path), ranks=num_ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(path.with_suffix(".pt"), weights_only=False)

    return run
