"""Several ranks of a test, on this machine's CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.launch import HOST, environment_of

SCRIPT = Path(__file__).with_name("step_on_ranks.py")


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs a job of step_on_ranks.py, or of another script, on so many ranks."""

    def run(job: Mapping[str, Any], num_ranks: int, script: Path = SCRIPT) -> dict[str, Any]:
        path = tmp_path_factory.mktemp("ranks") / "job.json"
        path.write_text(json.dumps(job))
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            listener.listen(num_ranks)
            ranks = [
                subprocess.Popen(
                    [sys.executable, str(script), str(path)],
                    env={**environment_of(rank, num_ranks, listener), "PYTHONPATH": os.pathsep.join(sys.path)},
                    pass_fds=[listener.fileno()],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(num_ranks)
            ]
        said = [rank.communicate()[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(said)[-4000:]
        found: dict[str, Any] = torch.load(path.with_suffix(".pt"), weights_only=False)
        return found

    return run
