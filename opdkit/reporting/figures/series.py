"""The colours of several curves in one figure, and the words that go with them."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.reporting.html.markup import Html, tag

NUM_COLOURS = 6  # classes s0, s1, ... in style.py


def series(index: int) -> str:
    """The class that colours the curve of this number."""
    return f"s{index % NUM_COLOURS}"


def legend(labels: Sequence[str], words: str = "") -> Html:
    """A line of `words`, then each curve's colour and name."""
    names = [tag("span", tag("b", "—", class_=series(index)), f" {label}") for index, label in enumerate(labels)]
    return tag("p", f"{words} " if words else None, *names, class_="legend quiet small")
