"""What is written reads back equal, by the standard library's own reader."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdkit import toml

text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(text, st.booleans(), st.integers(), st.floats(allow_nan=False))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))


@given(st.dictionaries(text, values, max_size=6))
def test_round_trip(document: dict[str, Any]) -> None:
    """Any nesting, any key, any text, infinite floats: equal and of equal types (True is not 1, 1.0 is not 1)."""
    back = tomllib.loads(toml.dumps(document))
    assert back == document and _types(back) == _types(document)


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    return [_types(item) for item in value] if isinstance(value, list) else type(value)


def test_reads_like_a_recipe() -> None:
    """Order is kept, nested dicts are headed tables, dicts in lists are inline."""
    recipe = {
        "model": {"path": "Qwen/Qwen3-4B", "lora": {"r": 64}},
        "seed": 42,
        "weights": {"tokens": [{"name": "soft_or", "keep": 0.5}], "lr": 1e-6, "on": True, "none": {}},
    }
    assert toml.dumps(recipe) == (
        'seed = 42\n\n[model]\npath = "Qwen/Qwen3-4B"\n\n[model.lora]\nr = 64\n\n[weights]\n'
        'tokens = [{ name = "soft_or", keep = 0.5 }]\nlr = 1e-06\non = true\n\n[weights.none]\n'
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": {"b": None}}, r"a\.b = None cannot be written"),
        ({"a": [float("nan")]}, "a = nan cannot be written"),
        ({"a": "\ud800"}, "half a surrogate pair"),
        ({1: 2}, "the key 1 is int"),
        ({"a": object()}, "cannot be written"),
    ],
)
def test_refusals(document: Any, message: str) -> None:
    """What TOML cannot say is refused with the key, never written as something else."""
    with pytest.raises(ValueError, match=message):
        toml.dumps(document)
