"""What a preparer makes of one row, before a template makes chat turns of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkit.data.files.sources import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A question with what is known of it, and nothing that asks how to answer."""

    question: str
    gold: str | None
    id: str | None = None  # None: the source has no ids
    solution: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    template: str = "none"  # the one its published prompt was written with
    was_unfilled: bool = False  # its published prompt had a literal `\boxed{{}}`
    is_unsplit: bool = False  # a row of the raw benchmark, which is split by the preparer


# A row as published -> its draft; None: the published filter leaves it out. Raises Unusable.
Read = Callable[[Row], Draft | None]

# Of `meta`, what is said of a prompt and its file, and so does not outlive them.
_ABOUT_THE_PROMPT = {"answer_style", "instruction", "template", "data_source", "ability", "kind"}


def without_prompt(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key not in _ABOUT_THE_PROMPT}
