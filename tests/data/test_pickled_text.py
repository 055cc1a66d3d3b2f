"""Packed tests are read without unpickling: the same text as pickle gives, and nothing but a text."""

from __future__ import annotations

import base64
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from opdkit.data.files.pickled_text import NotPlainText, pickled_text, unpack


def packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


class Bomb:
    """What runs on unpickling."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call[0], self._call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["", "x", '[{"input": "ä\\n\\u2028"}]', "y" * 300, "z" * 70_000])
def test_equals_pickle(protocol: int, text: str) -> None:
    """Every protocol, short and long texts, and what is not ASCII."""
    raw = pickle.dumps(text, protocol)
    assert pickled_text(raw) == text == pickle.loads(raw)
    assert unpack(packed(raw)) == text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_runs(protocol: int, tmp_path: Path) -> None:
    """A pickle that would write a file, and one that hides the call behind a text, are refused and write nothing."""
    target = tmp_path / "made"
    for thing in (Bomb(os.mkdir, str(target)), ["text", Bomb(os.mkdir, str(target))]):
        with pytest.raises(NotPlainText, match="does more than hold a text"):
            unpack(packed(pickle.dumps(thing, protocol)))
    assert not target.exists()


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (packed(pickle.dumps(["a", "b"])), "does more than hold a text"),
        (packed(pickle.dumps(b"a")), "does more than hold a text"),
        (packed(pickle.dumps(7)), "does more than hold a text"),
        (packed(b"no pickle"), "not a pickle|does more"),
        (packed(b""), "not a pickle"),
        (packed(pickle.dumps("text")[:-1]), "not a pickle"),
        (packed(b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b."), "a pickle of 2 texts"),
        ("not base64!", "not base64 of zlib data"),
        (base64.b64encode(b"no zlib").decode(), "not base64 of zlib data"),
        (base64.b64encode(zlib.compress(pickle.dumps("y" * 999))[:-6]).decode(), "cut off in the middle"),
        (packed(pickle.dumps("a" * 20_000_000)), "more than 10,000,000 bytes when unpacked"),
    ],
)
def test_refusals(blob: str, said: str) -> None:
    """Anything else is a sentence, and a bomb is not unpacked beyond the limit."""
    with pytest.raises(NotPlainText, match=said):
        unpack(blob, max_bytes=10_000_000)
