"""What is read of a `metrics.jsonl`: one line a step, and one for each evaluation.

A run that went back to a checkpoint (`[sentinels] action = "rollback"`) takes some steps again. Nothing is deleted: the
lines of the later try carry `"attempt": 2` (then 3, ...; lines without it are of the first), and stand behind the lines
that they replace. `of_last_attempt` leaves those out, and every reader of a run's numbers goes through it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opdkit.errors import UserError

EVALUATIONS = ("eval", "eval_teacher")  # areas of the lines that are evaluations, and not steps

SENTINELS = "sentinels/"  # with its name behind it: 1 in a step in which one found something

Line = Mapping[str, Any]


class WentBack(NamedTuple):
    """A run went back from one step to another, and began the try `attempt` at those between."""

    attempt: int
    from_step: int
    to_step: int
    found_by: tuple[str, ...] = ()  # sentinels


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`. A last line that is being written right now is left out."""
    return [line for line, _ in _lines(path)]


def of_steps(lines: Iterable[Line]) -> list[Line]:
    """One line a step: without those of evaluations, and without steps that were taken again later."""
    return [line for line in of_last_attempt(lines) if area_of(line) not in EVALUATIONS]


def of_last_attempt(lines: Iterable[Line]) -> list[Line]:
    """The lines that the run's result rests on."""
    return _attempts(lines)[0]


def went_back(lines: Iterable[Line]) -> list[WentBack]:
    """Every time that steps were taken again, in order."""
    return _attempts(lines)[1]


def _attempts(lines: Iterable[Line]) -> tuple[list[Line], list[WentBack]]:
    kept: list[Line] = []
    back: list[WentBack] = []
    newest = 1
    for line in lines:
        if (attempt := attempt_of(line)) > newest:
            newest, last = attempt, kept[-1] if kept else {"step": 0}
            while kept and kept[-1]["step"] >= line["step"]:
                kept.pop()
            back.append(WentBack(attempt, last["step"], line["step"] - 1, found(last)))
        kept.append(line)
    return kept, back


def found(line: Line) -> tuple[str, ...]:
    """The sentinels that found something in a step (`run/sentinels.py`)."""
    names = (name.removeprefix(SENTINELS) for name in line if name.startswith(SENTINELS) and line[name])
    return tuple(name for name in names if name != "num_found")


def attempt_of(line: Line) -> int:
    attempt = line.get("attempt", 1)
    return attempt if type(attempt) is int else 1


def area_of(line: Line) -> str:
    """Of the line's first metric: a line of an evaluation has no other."""
    return next((name.partition("/")[0] for name in line if "/" in name), "")


def cut_after(path: Path, step: int, attempt: int) -> tuple[int, set[tuple[int, str]]]:
    """Cut off what a run writes anew that goes on from `step` with this try: the try's own lines of later steps, and
    later tries. Returns the last step before (-1: none), and (step, area) of every evaluation up to there."""
    end, left = 0, list[Line]()
    if path.exists():
        for line, line_end in _lines(path):
            if attempt_of(line) > attempt or (attempt_of(line) == attempt and line["step"] > step):
                break
            end = line_end
            left.append(line)
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    left = [line for line in of_last_attempt(left) if line["step"] <= step]
    evaluated = {(line["step"], area) for line in left if (area := area_of(line)) in EVALUATIONS}
    return left[-1]["step"] if left else -1, evaluated


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each complete line with the offset of its end."""
    end = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore it from a copy, or remove it") from None
    with file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return  # cut short by a crash, or being written
            end += len(raw)
            try:
                line = json.loads(raw)
                line["step"] + 0
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}:{number} is not a metrics line; it was changed by something else: delete that line"
                ) from None
            yield line, end
