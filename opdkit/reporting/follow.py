"""A run folder while somebody writes it: what has been written so far, whether its writer lives, and how far it is.

Only reads. It never touches the run's lock: a look at the wrong moment would keep a run from starting.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opdkit.errors import UserError
from opdkit.reporting.run import RunContents, read_progress

State = Literal["waiting", "running", "finished", "stopped"]

_OWNER = re.compile(r"process (\d+) on (\S+) since")  # what `train/run_folder.py` writes into .lock
SILENT_S = 1800.0  # a writer on another host is taken for gone after this long without a new line
NUM_PACED = 20  # steps whose mean length says how long the rest will take


@dataclass(slots=True)
class MetricLines:
    """The lines of a growing metrics.jsonl. Half a line waits for its rest; a file that was cut (--resume) or replaced
    (--overwrite) is read anew."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    num_broken: int = 0
    _file: tuple[int, int] = (0, 0)  # inode, bytes read
    _last: bytes = b""  # the last line that was read

    def read(self) -> bool:
        """Read what is new; whether anything was."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                inode, done = self._file
                if inode != status.st_ino or status.st_size < done or not self._still_there(file.fileno()):
                    self.lines, self.num_broken, self._last, done = [], 0, b"", 0
                file.seek(done)
                new = file.read()
        except FileNotFoundError:
            had = bool(self.lines)
            self.lines, self.num_broken, self._last, self._file = [], 0, b"", (0, 0)
            return had
        whole = new[: new.rfind(b"\n") + 1]
        self._file = (status.st_ino, done + len(whole))
        for raw in whole.splitlines(keepends=True):
            self._add(raw)
            self._last = raw
        return bool(whole)

    def _still_there(self, descriptor: int) -> bool:
        """Whether the last line that was read stands where it was: a resumed run may have cut it and grown past it."""
        return not self._last or os.pread(descriptor, len(self._last), self._file[1] - len(self._last)) == self._last

    def _add(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
            line["step"] + 0
        except (ValueError, KeyError, TypeError, RecursionError):
            self.num_broken += 1
        else:
            self.lines.append(line)


@dataclass(slots=True)
class Followed:
    """What `opdkit watch` knows of a run at one moment."""

    state: State
    run: RunContents
    step: int
    planned: int | None
    seconds_left: float | None
    num_broken: int


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
        return Followed(state, run, step, planned, left, self._metrics.num_broken)


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


def writer_lives(folder: Path) -> bool:
    """Whether the process that the lock names is there. It empties the file when it ends; kill -9 leaves the name."""
    try:
        owner = _OWNER.match((folder / ".lock").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    if owner is None:
        return False
    if owner[2] != socket.gethostname():  # cannot be asked: believed while the run grows
        newest = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
        return time.time() - newest < SILENT_S
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def seconds_left(lines: Sequence[Mapping[str, Any]], planned: int | None) -> float | None:
    """From the pace of the last steps, evaluations between them included. None: not known yet."""
    recent = [line for line in lines[-NUM_PACED - 1 :] if isinstance(line.get("time"), (int, float))]
    if planned is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, pace * (planned - recent[-1]["step"]) - (time.time() - recent[-1]["time"]))
