"""Write TOML. The standard library reads it (tomllib) and does not write it; what is written here reads back equal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def dumps(document: Mapping[str, Any]) -> str:
    """Nested dicts of str, int, float, bool, lists and dicts as TOML text, keys in their given order.

    Dicts in dicts become [tables]; dicts inside lists become inline tables. Raises ValueError for anything TOML cannot
    say: None (leave the key out), a NaN with no way to be equal to itself, half a surrogate pair, other types.
    """
    lines = _table(document, ())
    return "\n".join(lines).strip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = ["", f"[{'.'.join(_key(part) for part in path)}]"] if path else []
    # Plain values first: after a [sub.table] header they would belong to it.
    for name, value in table.items():
        if not isinstance(value, Mapping):
            lines.append(f"{_key(name)} = {_value(value, (*path, name))}")
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, name))
    return lines


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value, path)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and not math.isnan(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, path) for item in value) + "]"
    if isinstance(value, Mapping):
        items = (f"{_key(name)} = {_value(item, (*path, name))}" for name, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    raise ValueError(f"{'.'.join(map(str, path))} = {value!r} cannot be written as TOML")


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the key {name!r} is {type(name).__name__}; TOML keys are text")
    return name if _BARE_KEY.fullmatch(name) else _string(name, (name,))


def _string(text: str, path: tuple[str, ...]) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{'.'.join(path)!r} = {text!r} holds half a surrogate pair, which is not text") from None
    return '"' + "".join(_ESCAPES.get(char) or _printable(char) for char in text) + '"'


def _printable(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else char
