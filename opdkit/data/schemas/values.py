"""Values of a row, wherever they stand and whatever they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from opdkit.data.schemas.conversations import as_text


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """A column, or a nested one by dots. A column literally called "a.b" wins. NaN counts as missing (pandas)."""
    value: Any = row.get(name)
    if value is None and "." in name:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return None if isinstance(value, float) and math.isnan(value) else value


def plain(value: Any) -> Any:
    """As JSON has it: what a Parquet column may hold beyond that (dates, decimals, bytes) becomes text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def column_text(value: Any, name: str) -> str:
    """A column's value as text; what is neither text nor a number, as JSON. Raises Unusable."""
    if isinstance(value, bool | list | tuple | dict):
        value = json.dumps(plain(value), ensure_ascii=False)
    return as_text(value if isinstance(value, str | int | float | bytes) else str(value), name)
