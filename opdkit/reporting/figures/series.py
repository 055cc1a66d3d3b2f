"""The colours of several curves in one figure, and the words that go with them."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.reporting.html.markup import Html, tag

NUM_COLOURS = 6  # classes s0, s1, ... in style.py


def series(index: int) -> str:
    """The class that colours the curve of this number."""
    return f"s{index % NUM_COLOURS}"


def legend(labels: Sequence[str], words: str = "") -> Html:
    """A line of `words`, then each curve's line, as it is drawn, and its name."""
    names = [tag("span", _sample(series(index)), label) for index, label in enumerate(labels)]
    return tag("p", f"{words} " if words else None, *names, class_="legend quiet small")


def _sample(class_: str) -> Html:
    return tag("svg", tag("line", x1=0, x2=22, y1=2, y2=2), width=22, height=4, class_=class_, aria_hidden="true")
