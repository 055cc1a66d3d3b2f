"""Files of one JSON object a line that survive a crash: what is whole is kept, what was cut is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.run.folder import atomic_write
from opdkit.run.sums import note_so_far

Row = dict[str, Any]
Pair = tuple[str, int]  # a problem and the number of its answer


def open_lines(path: Path) -> list[Row]:
    """The rows of a file that will be appended to; [] if there is none. A last line that a crash cut is removed.

    Raises UserError for a broken line in the middle: no crash leaves one, and what follows it is not thrown away.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {path.parent} ({error.strerror}); choose another folder") from error
        return []
    rows: list[Row] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or choose another name") from None
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}:{number} is not a JSON object: it is a file of something else; choose another")
        except (json.JSONDecodeError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path}:{number} is not JSON: the file was changed, not cut by a crash; restore it, or choose "
                    "another name"
                ) from None
    if text and not rows and not text.startswith('{"'):
        raise UserError(f"{path} is a file of something else; choose another name")
    if lines[-1]:  # cut inside a line, or just before its end
        atomic_write(path, _text(rows))
        note_so_far(path)
    return rows


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """On disk when it returns. Raises UserError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_text(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}); what was written before is kept: mend that, and run the same "
            "command again"
        ) from error


def put_in_order(path: Path, pairs: Iterable[Pair], pair_of: Callable[[Row], Pair], *, header: bool) -> None:
    """Lines in the order of their pairs, what else is there after them: the same file however often it was begun.

    header: its first line stays first. Read by nobody else at this moment: it is replaced if it changes.
    """
    rows, place = open_lines(path), {pair: number for number, pair in enumerate(pairs)}
    ordered = rows[: int(header)] + sorted(rows[int(header) :], key=lambda row: place.get(pair_of(row), len(place)))
    if ordered != rows:
        atomic_write(path, _text(ordered))


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
