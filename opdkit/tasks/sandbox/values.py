"""Plain values as JSON, so that a test in one process can call a function in another. Nothing is unpickled.

Numbers, strings, booleans and None stand for themselves; all else is [kind, content]. Subclasses become their plain
base, so no `__eq__` or `__len__` of a graded program ever runs on the testing side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MAX_ITEMS = 1_000_000  # of an iterator, which may be endless
_PLAIN_INTEGERS = 1 << 63  # longer ones are written in hexadecimal: decimal digits are limited by the interpreter


def encode(value: Any) -> Any:
    """TypeError for a value without a plain form (an object, a function, an open file)."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < _PLAIN_INTEGERS else ["int", hex(number)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    for kind, base, write in _WRITERS:
        if isinstance(value, base):
            return [kind, write(value)]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return encode(value.tolist())
    if hasattr(value, "__iter__"):  # generators, map, zip, views of dictionaries
        items = list(islice(value, MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise TypeError(f"an iterator of more than {MAX_ITEMS:,} items")
        return ["iterator" if isinstance(value, Iterator) else "list", _items(items)]
    raise TypeError(f"a value of type {type(value).__name__!r} has no plain form")


def decode(tree: Any) -> Any:
    """ValueError, TypeError or RecursionError for anything `encode` does not make."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if not isinstance(tree, list) or len(tree) != 2 or tree[0] not in _READERS:
        raise ValueError("not an encoded value")
    return _READERS[tree[0]](tree[1])


def _items(value: Any) -> list[Any]:
    return [encode(item) for item in value]


def _pairs(value: Mapping[Any, Any]) -> list[Any]:
    return [[encode(key), encode(item)] for key, item in value.items()]


def _read_items(tree: Sequence[Any]) -> list[Any]:
    return [decode(item) for item in tree]


_WRITERS: tuple[tuple[str, type, Callable[[Any], Any]], ...] = (
    ("list", list, _items),
    ("tuple", tuple, _items),
    ("dict", dict, _pairs),
    ("set", set, _items),
    ("frozenset", frozenset, _items),
    ("deque", deque, _items),
    ("bytes", bytes, bytes.hex),
    ("bytearray", bytearray, bytearray.hex),
    ("complex", complex, lambda value: [value.real, value.imag]),
    ("range", range, lambda value: [value.start, value.stop, value.step]),
    ("decimal", Decimal, str),
    ("fraction", Fraction, lambda value: [encode(value.numerator), encode(value.denominator)]),
)
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda tree: int(tree, 16),
    "list": _read_items,
    "tuple": lambda tree: tuple(_read_items(tree)),
    "dict": lambda tree: {decode(key): decode(item) for key, item in tree},
    "set": lambda tree: set(_read_items(tree)),
    "frozenset": lambda tree: frozenset(_read_items(tree)),
    "deque": lambda tree: deque(_read_items(tree)),
    "iterator": lambda tree: iter(_read_items(tree)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda tree: complex(*tree),
    "range": lambda tree: range(*tree),
    "decimal": Decimal,
    "fraction": lambda tree: Fraction(*_read_items(tree)),
}
