"""A run folder while somebody writes it: what has been written so far, whether its writer lives, and how far it is.

Only reads. It never touches the run's lock: a look at the wrong moment would keep a run from starting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opdkit.errors import UserError
from opdkit.reporting.files import MetricLines, writer_lives
from opdkit.reporting.run import RunContents, read_progress

State = Literal["waiting", "running", "finished", "stopped"]
NUM_PACED = 20  # steps whose mean length says how long the rest will take


@dataclass(slots=True)
class Followed:
    """What `opdkit watch` knows of a run at one moment."""

    state: State
    run: RunContents
    step: int
    planned: int | None
    seconds_left: float | None
    damage: str | None  # of metrics.jsonl, in a sentence


class Follower:
    """Looks at a run folder again and again.

    Raises UserError for a folder (or a file) that is something else than a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = MetricLines(folder / "metrics.jsonl")

    def look(self) -> Followed:
        run_is_there = is_run(self.folder)
        alive = run_is_there and writer_lives(self.folder)  # before reading: what it wrote last is then read too
        self._metrics.read()
        run = read_progress(self.folder, self._metrics.lines)
        step = int(run.metrics[-1]["step"]) if run.metrics else 0
        planned = run.setting("train", "steps")
        planned = planned if isinstance(planned, int) else None
        if not run_is_there:
            state: State = "waiting"
        elif alive:
            state = "running"
        else:
            summary = run.summary or {}
            ended = isinstance(summary.get("ended"), Mapping) and summary.get("steps") == step
            state = "finished" if summary and (step >= (planned or 0) or ended) else "stopped"
        left = seconds_left(run.metrics, planned) if state == "running" else None
        return Followed(state, run, step, planned, left, self._metrics.damage(ended=state != "running"))


def is_run(folder: Path) -> bool:
    """False where nothing is yet. Raises UserError for something else than a run."""
    if (folder / "recipe.toml").exists() or (folder / "metrics.jsonl").exists():
        return True
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a run folder; give the folder that holds its recipe.toml")
    if folder.is_dir() and not (folder / ".lock").exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not a run folder: it holds no recipe.toml and no metrics.jsonl")
    return False


def runs_beside(folder: Path) -> list[str]:
    """The runs that are where this one is expected, newest first."""
    try:
        found = [path.parent for path in folder.absolute().parent.glob("*/recipe.toml")]
    except OSError:
        return []
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def seconds_left(lines: Sequence[Mapping[str, Any]], planned: int | None) -> float | None:
    """From the pace of the last steps, evaluations between them included. None: not known yet."""
    recent = [line for line in lines[-NUM_PACED - 1 :] if isinstance(line.get("time"), (int, float))]
    if planned is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, pace * (planned - recent[-1]["step"]) - (time.time() - recent[-1]["time"]))
