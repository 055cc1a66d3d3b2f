"""A figure as a file of its own."""

from __future__ import annotations

from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.style import COLOURS


def figure_file(*parts: str, style: str, width: float, height: float, label: str) -> Html:
    """label: what is read out in its place."""
    return tag(
        "svg",
        tag("style", Html(COLOURS + style)),
        tag("rect", class_="paper", width="100%", height="100%"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )
