"""Command lines that are killed, starved and lied to, in forks of one warm process (`warm.py`); what must be the same.

To put another command under the suite: a `Case` in test_kills.py, which says how it is begun, how it goes on, and what
of it must be the same.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Done:
    status: int  # -9: killed
    said: str
    orphans: int
    seconds: float  # of processors


class Warm:
    """opdkit command lines, without the start of an interpreter."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder, self.calls = folder, itertools.count()
        env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        command = [sys.executable, str(HERE / "warm.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        assert self._answer() == "ready"

    def __call__(self, *argv: str | Path, cwd: Path, **job: Any) -> Done:
        """below, nth, error, stays: see file_events.c. log: a file for the events. kill_after: seconds. uid: who runs
        it. clock_back, looks: the clock."""
        output = self.folder / f"{next(self.calls)}.log"
        job |= {"argv": list(map(str, argv)), "cwd": str(cwd), "output": str(output)}
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self._answer()
        said = output.read_text(errors="replace")
        output.unlink()
        return Done(answer["status"], said, answer["orphans"], answer["seconds"])

    def events(self, *argv: str | Path, cwd: Path, below: Path) -> list[str]:
        """What a command that is left alone does to files below a folder: "operation path", in order."""
        log = self.folder / "events"
        done = self(*argv, cwd=cwd, below=str(below), log=str(log))
        assert done.status == 0, done.said
        return log.read_text().splitlines()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm process has ended"
        return json.loads(line)


RECIPE: dict[str, Any] = {
    "name": "run", "seed": 3, "runs_dir": "runs",
    "model": {"dtype": "float32", "device": "cpu", "lora": {"r": 2, "alpha": 4}},
    "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 12},
    "context": {"kind": "reference_solution", "template": "prefix"},
    "teacher": {"kind": "self", "weights": "ema", "ema_rate": 0.1},
    "sampling": {"max_answer_tokens": 8, "group_size": 2, "temperature": 1.2},
    "method": {"name": "opsd"},
    "weights": {"tokens": {"name": "soft_or", "keep": 0.5},
                "problems": {"name": "paced", "pass_rate": "measured", "samples": 2, "floor": 0.5}},
    "schedule": {"sampling": {"temperature": {"points": [[0.0, 1.2], [1.0, 0.8]], "shape": "linear"}}},
    "train": {"steps": 2, "problems_per_step": 3, "lr": 1e-3, "save_every": 1, "updates_per_step": 2,
              "keep_checkpoints": 1},
    "eval": {"data": "arithmetic:merge-3:test", "limit": 2, "samples": 2, "every": 1},
    "diagnostics": {"every": 0},
}  # fmt: skip


CLOCKS = ("time", "memory")


def numbers(run: Path) -> dict[str, Any]:
    """What a run must have whatever happened to it: every file, the bits of checkpoints, rows and evaluations, and the
    metrics without clocks."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or path.name in (".lock", "environment.json", "report.html", "sums.txt"):
            continue
        try:
            found[name] = _told(path)
        except (ValueError, OSError):  # damaged on purpose; a Parquet file says OSError
            found[name] = path.read_bytes()
    return found


def _told(path: Path) -> Any:
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]
        for line in lines:
            line.get("identity", {}).pop("clock", None)
        return lines
    if path.name in ("state.json", "summary.json", "pipeline.json"):
        return _without_seconds(json.loads(path.read_text()))
    if path.suffix == ".parquet":  # turns of episodes hold a clock
        return repr([_without_seconds(row) for row in pq.read_table(path).to_pylist()])
    return None if path.name in ("README.md", "SHA256SUMS") else path.read_bytes()


def _without_seconds(value: Any) -> Any:
    """summary.json says in `warnings` that a run was resumed, and that a line was lost."""
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if "seconds" not in k and k != "warnings"}
    return [_without_seconds(one) for one in value] if isinstance(value, list) else value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
