"""Files of one JSON object a line that survive a crash: what is whole is kept, what was cut is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.train.run_folder import atomic_write

Row = dict[str, Any]


def open_lines(path: Path) -> list[Row]:
    """The rows of a file that will be appended to; [] if there is none. A last line that a crash cut is removed."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {path.parent} ({error.strerror}); choose another folder") from error
        return []
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if len(rows) < len(lines):
        atomic_write(path, _text(rows))
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


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
