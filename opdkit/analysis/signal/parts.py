"""The folder of an analysis: one file for each step, and what each of them says about itself.

    rollouts.jsonl    the answers, with their token ids and rewards
    contexts.jsonl    what the teacher reads: condition, problem, chat turns, and which answers are scored behind them
    scores.jsonl      condition, answer, score
    metrics.json, metrics.csv, report.md, signal.svg, signal_by_difficulty.svg

The first line of a JSONL file is its header: {"identity": what was asked, ...}. A step whose file is there is not done
again; a file made by another question, or from another earlier file, is refused and never mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.run.folder import atomic_write
from opdkit.run.stored_answers import read_lines

STEPS = ("rollouts", "contexts", "scores", "metrics", "plots")
CONTEXTS_FILE, SCORES_FILE, METRICS_FILE = "contexts.jsonl", "scores.jsonl", "metrics.json"
Row = dict[str, Any]


def as_json(value: Any) -> Any:
    """As it will be read again: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


def read_part(path: Path, step: str) -> tuple[Row, list[Row]]:
    """(header, lines). Raises UserError where the step that writes it was not run, or the file is something else."""
    if not path.exists():
        raise UserError(f"there is no {path}: run the step {step} first, with --steps {step} or without --steps")
    rows = read_lines(path)
    if not rows or "identity" not in rows[0]:
        raise UserError(f"{path} was not written by this step; choose another folder, or remove it")
    return rows[0], rows[1:]


def read_whole(path: Path, step: str) -> tuple[Row, list[Row]]:
    """The same, of a file that is finished. Raises UserError where its step was stopped."""
    header, rows = read_part(path, step)
    if len(rows) != header["num_lines"]:
        raise UserError(
            f"{path} has {len(rows)} of its {header['num_lines']} lines: its step was stopped; run the same command "
            "again to go on"
        )
    return header, rows


def write_part(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole file or no change."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path.parent} ({error.strerror}); choose another folder") from None
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in (header, *rows)))


def check_part(path: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless the file answers the question that is asked now."""
    found, asked = _flat(header["identity"]), _flat(as_json(wanted))
    differ = sorted(key for key in {*found, *asked} if found.get(key) != asked.get(key))
    if differ:
        said = ", ".join(f"{key} = {_short(found.get(key))} (now {_short(asked.get(key))})" for key in differ)
        raise UserError(
            f"{path} was made by another question: {said}; choose another folder, or remove the file and those of the "
            "steps after it"
        )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested keys with dots, so that a difference is named where it is."""
    flat: Row = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
