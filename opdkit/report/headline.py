"""Before, after, baselines and teacher as dots with whiskers: in the page, and as a figure of its own for a README.

Every coordinate across is a percentage of the axis, so the same marks fit a phone and a desk without scaling the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.report.markup import Html, tag
from opdkit.report.numbers import compact, score, ticks
from opdkit.report.run import Entry, Interval, headline_of
from opdkit.report.style import COLOURS, FIGURE, STANDALONE

TRACK_HEIGHT = 22
AXIS_HEIGHT = 20


def headline(entries: Sequence[Entry]) -> Html:
    """The figure inside the page: labels and numbers are HTML and wrap, the marks are SVG."""
    axis = axis_ticks(entries)
    bars = [
        tag(
            "div",
            tag("span", entry.label, class_="label"),
            tag("span", tag("b", score(avg.value)), tag("span", _range(avg), class_="quiet"), class_="value"),
            track(entry, axis),
            class_=f"bar {entry.kind}",
        )
        for entry, avg in ((entry, entry.measured.avg) for entry in entries)
    ]
    return tag("div", *bars, tag("div", axis_labels(axis), class_="bar axis"), class_="bars")


def headline_figure(summary: Mapping[str, Any], path: Path) -> None:
    """Write the headline of `summary` (what summary.json holds) as an SVG file, light or dark as the reader's system.

    Raises UserError for another suffix than .svg, a summary that is not of the public form, or one without evaluations.
    """
    if path.suffix != ".svg":
        raise UserError(
            f"the headline figure is an SVG file, not {path.name!r}; name it {path.with_suffix('.svg').name}"
        )
    datasets = headline_of(summary)
    if not datasets:
        raise UserError("the summary holds no evaluation, so there is no figure to draw; set eval.data in the recipe")
    path.write_text(standalone(datasets), encoding="utf-8")


def standalone(datasets: Mapping[str, Sequence[Entry]]) -> str:
    """The figure as a file: the same marks, with labels to the left and numbers to the right of them."""
    width, edge, row = 860, 28, 34
    longest = max(len(entry.label) for entries in datasets.values() for entry in entries)
    label_width = min(360, 24 + 7.2 * longest)  # a guess at the width of 14 px text, on the wide side
    number_width = 160
    track_x, track_width = edge + label_width, width - 2 * edge - label_width - number_width
    parts: list[Html] = []
    y = edge
    for dataset, entries in datasets.items():
        axis = axis_ticks(entries)
        parts.append(tag("text", dataset, class_="title", x=edge, y=y + 14))
        parts.append(tag("text", explain(entries), x=edge, y=y + 34))
        y += 52
        for entry in entries:
            strong = " strong" if entry.kind == "after" else ""
            middle = y + TRACK_HEIGHT / 2 + 5
            parts += [
                tag("text", _shortened(entry.label, 50), class_=f"label{strong}", x=edge, y=middle),
                tag("svg", track(entry, axis), class_=entry.kind, x=track_x, y=y, width=track_width, height=row),
                tag("text", score(entry.measured.avg.value), class_=f"value{strong}", x=width - edge - 104, y=middle,
                    text_anchor="end"),
                tag("text", _range(entry.measured.avg), x=width - edge, y=middle, text_anchor="end"),
            ]  # fmt: skip
            y += row
        parts.append(tag("svg", axis_labels(axis), x=track_x, y=y - 4, width=track_width, height=AXIS_HEIGHT))
        y += AXIS_HEIGHT + edge
    return tag(
        "svg",
        tag("style", Html(COLOURS + FIGURE + STANDALONE)),
        tag("rect", class_="paper", width="100%", height="100%"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {y}",
        width=width,
        height=y,
        role="img",
        aria_label="Accuracy with 95 % intervals: " + "; ".join(_spoken(e) for es in datasets.values() for e in es),
    )


def explain(entries: Sequence[Entry]) -> str:
    """What the dots are, in words. Counts that differ between the models are given as a range."""
    samples = sorted({entry.measured.samples for entry in entries})
    problems = sorted({entry.measured.problems for entry in entries})
    n = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    p = f"{problems[0]:,}" if len(problems) == 1 else f"{problems[0]:,} to {problems[-1]:,}"
    return f"Mean reward of one sampled answer; {n} answers to each of {p} problems; 95 % intervals over problems"


def axis_ticks(entries: Sequence[Entry]) -> list[float]:
    """From 0 (or below) to just above the largest upper end, never past 1 for rewards of at most 1."""
    ends = [
        x for e in entries for x in (e.measured.avg.value, e.measured.avg.low, e.measured.avg.high) if x is not None
    ]
    return ticks(min([0.0, *ends]), max(ends, default=1.0) or 1.0)


def track(entry: Entry, axis: Sequence[float]) -> Html:
    """Grid lines, whisker and dot of one entry. The shape says what the colour says."""
    middle = TRACK_HEIGHT / 2
    avg = entry.measured.avg
    marks: list[Html] = [
        tag("line", class_="grid", x1=_at(t, axis), x2=_at(t, axis), y1=-6, y2=TRACK_HEIGHT + 6) for t in axis
    ]
    if avg.low is not None and avg.high is not None:
        marks.append(tag("line", class_="whisker", x1=_at(avg.low, axis), x2=_at(avg.high, axis), y1=middle, y2=middle))
    if avg.value is not None:
        marks.append(_dot(entry.kind, _at(avg.value, axis), middle))
    return tag("svg", tag("title", _spoken(entry)), *marks, width="100%", height=TRACK_HEIGHT)


def axis_labels(axis: Sequence[float]) -> Html:
    labels = [
        tag("text", compact(t), x=_at(t, axis), y=14, text_anchor=_anchor(index, len(axis)))
        for index, t in enumerate(axis)
    ]
    return tag("svg", *labels, width="100%", height=AXIS_HEIGHT)


def _dot(kind: str, x: str, y: float) -> Html:
    if kind == "arm":  # a square; it takes a nested origin, since a percentage cannot be moved by half a side
        return tag("svg", tag("rect", class_="dot", x=-4.5, y=-4.5, width=9, height=9), x=x, y=y)
    if kind == "teacher":
        return tag("svg", tag("polygon", class_="dot", points="0,-6.5 6.5,0 0,6.5 -6.5,0"), x=x, y=y)
    return tag("circle", class_="dot", cx=x, cy=y, r=5.5)


def _at(value: float, axis: Sequence[float]) -> str:
    return f"{100 * (value - axis[0]) / (axis[-1] - axis[0]):.2f}%"


def _anchor(index: int, count: int) -> str:
    return "start" if index == 0 else "end" if index == count - 1 else "middle"


def _range(avg: Interval) -> str:
    if avg.value is None:
        return "not graded"
    return "no interval" if avg.low is None or avg.high is None else f"[{score(avg.low)}, {score(avg.high)}]"


def _spoken(entry: Entry) -> str:
    avg = entry.measured.avg
    if avg.value is None:
        return f"{entry.label}: not measured"
    between = "" if avg.low is None or avg.high is None else f", 95 % interval {score(avg.low)} to {score(avg.high)}"
    return f"{entry.label}: {score(avg.value)}{between}"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
