"""What a continued run may change about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.errors import UserError

# Nothing that moves a number that is already on disk, or to come.
CHANGEABLE = (
    "runs_dir",
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.save_rows_every",
    "eval.every",
    "log.sinks",
)


def check_same_recipe(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError naming every key in which a resumed run would differ from the run it continues."""
    was, now = _flat(old), _flat(new)
    differ = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*was, *now} - {*CHANGEABLE})
        if was.get(key) != now.get(key)
    ]
    if differ:
        raise UserError(
            f"--resume continues a run with its own recipe, but {'; '.join(differ)}; "
            "undo that, or start a run of another name"
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
