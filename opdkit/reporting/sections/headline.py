"""Before, after, baselines and teacher as dots with whiskers: in the page, and as a figure of its own for a README.

Every coordinate across is a percentage of the axis, so the same marks fit a phone and a desk without scaling the text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.reporting.figures.series import series
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact, score, ticks
from opdkit.reporting.html.style import FIGURE, STANDALONE
from opdkit.reporting.html.svg import figure_file
from opdkit.reporting.run import Entry, Interval, headline_of
from opdkit.run.folder import atomic_write

AXIS_HEIGHT = 22
WIDTH, EDGE, NUMBERS, LABEL_LENGTH = (
    860,
    28,
    170,
    34,
)  # of the figure in a file: pixels, and characters of a label's line
CAP = 6  # half the height of a whisker's ends, so that an interval narrower than its dot is still seen


def headline(entries: Sequence[Entry], runs: Sequence[str] = ()) -> Html:
    """The figure inside the page: labels and numbers are HTML and wrap, the marks are SVG.

    runs: labels of entries that have a colour of `series`, as their curves.
    """
    axis = axis_ticks(entries)
    bars = [
        tag(
            "div",
            tag("span", entry.label, class_="label"),
            tag("span", tag("b", score(avg.value)), tag("span", _range(avg), class_="quiet"), class_="value"),
            tag("div", track(entry, axis), class_="track"),
            class_=f"bar {entry.kind}" + (f" {series(runs.index(entry.label))}" if entry.label in runs else ""),
        )
        for entry, avg in ((entry, entry.measured.avg) for entry in entries)
    ]
    return tag("div", *bars, tag("div", tag("div", axis_labels(axis), class_="track"), class_="bar"), class_="bars")


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
    atomic_write(path, standalone(datasets))


def standalone(datasets: Mapping[str, Sequence[Entry]]) -> str:
    """The figure as a file: the same marks, with labels to the left and numbers to the right of them."""
    labels = {entry.label: _wrapped(entry.label) for entries in datasets.values() for entry in entries}
    label_width = 8.3 * max(len(line) for lines in labels.values() for line in lines)  # 14 px text, on the wide side
    track_x = EDGE + label_width + 20
    track_width = WIDTH - EDGE - NUMBERS - track_x
    parts: list[Html] = []
    y = EDGE
    for dataset, entries in datasets.items():
        axis = axis_ticks(entries)
        parts.append(tag("text", dataset, class_="title", x=EDGE, y=y + 14))
        parts.append(tag("text", explain(entries), x=EDGE, y=y + 34))
        y += 50
        for entry in entries:
            lines = labels[entry.label]
            height = 16 + 18 * len(lines)
            parts += [
                *_label(entry, lines, y + height / 2),
                tag("svg", track(entry, axis), class_=entry.kind, x=track_x, y=y, width=track_width, height=height),
            ]
            y += height
        parts.append(tag("svg", axis_labels(axis), x=track_x, y=y, width=track_width, height=AXIS_HEIGHT))
        y += AXIS_HEIGHT + EDGE
    return figure_file(
        *parts,
        style=FIGURE + STANDALONE,
        width=WIDTH,
        height=y,
        label="; ".join(_spoken(entry) for entries in datasets.values() for entry in entries),
    )


def _label(entry: Entry, lines: Sequence[str], middle: float) -> list[Html]:
    """The words to the left and the numbers to the right of a track."""
    strong = " strong" if entry.kind == "after" else ""
    avg = entry.measured.avg
    top = middle + 5 - 9 * (len(lines) - 1)
    words = [tag("text", line, class_=f"label{strong}", x=EDGE, y=top + 18 * index) for index, line in enumerate(lines)]
    numbers = [
        tag("text", score(avg.value), class_=f"value{strong}", x=WIDTH - EDGE - 96, y=middle + 5, text_anchor="end"),
        tag("text", _range(avg), x=WIDTH - EDGE, y=middle + 5, text_anchor="end"),
    ]
    return [*words, *numbers]


def explain(entries: Sequence[Entry]) -> str:
    """What the dots are, in words. Counts that differ between the models are given as a range."""
    samples = _counted({entry.measured.samples for entry in entries}, "answer")
    problems = _counted({entry.measured.problems for entry in entries}, "problem")
    return f"Mean reward of one sampled answer, from {samples} to each of {problems}; 95 % intervals over problems"


def _counted(counts: set[int], what: str) -> str:
    low, high = min(counts), max(counts)
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{number} {what}" if high == 1 else f"{number} {what}s"


def axis_ticks(entries: Sequence[Entry]) -> list[float]:
    """From 0 (or below) to just above the largest upper end, never past 1 for rewards of at most 1."""
    ends = [
        x for e in entries for x in (e.measured.avg.value, e.measured.avg.low, e.measured.avg.high) if x is not None
    ]
    return ticks(min([0.0, *ends]), max(ends, default=1.0) or 1.0)


def track(entry: Entry, axis: Sequence[float]) -> Html:
    """Grid lines, whisker and dot of one entry, in the middle of whatever holds it; the shape repeats the colour."""
    avg = entry.measured.avg
    marks = [tag("line", class_="grid", x1=_at(t, axis), x2=_at(t, axis), y1=0, y2="100%") for t in axis]
    if avg.low is not None and avg.high is not None:
        low, high = _at(avg.low, axis), _at(avg.high, axis)
        marks.append(tag("line", class_="whisker", x1=low, x2=high, y1="50%", y2="50%"))
        marks += [tag("svg", _WHISKER_END, x=end, y="50%") for end in (low, high)]
    if avg.value is not None:
        marks.append(tag("svg", _MARK[entry.kind], x=_at(avg.value, axis), y="50%"))
    return tag("svg", tag("title", _spoken(entry)), *marks, width="100%", height="100%")


# Drawn around an origin of their own, since a percentage cannot be moved by half a mark.
_WHISKER_END = tag("line", class_="whisker", y1=-CAP, y2=CAP)
_CIRCLE = tag("circle", class_="dot", r=4.5)
_MARK = {
    "before": _CIRCLE,
    "after": _CIRCLE,
    "best": tag("polygon", class_="dot", points="0,-6 5.5,4.5 -5.5,4.5"),
    "arm": tag("rect", class_="dot", x=-4, y=-4, width=8, height=8),
    "teacher": tag("polygon", class_="dot", points="0,-5.5 5.5,0 0,5.5 -5.5,0"),
}


def axis_labels(axis: Sequence[float]) -> Html:
    labels = [tag("text", compact(t), x=_at(t, axis), y=16, text_anchor="middle") for t in axis]
    return tag("svg", *labels, width="100%", height=AXIS_HEIGHT)


def _at(value: float, axis: Sequence[float]) -> str:
    return f"{100 * (value - axis[0]) / (axis[-1] - axis[0]):.2f}%"


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


def _wrapped(label: str) -> list[str]:
    """At most two lines; a longer label ends in an ellipsis."""
    return textwrap.wrap(label, LABEL_LENGTH, max_lines=2, placeholder=" …") or [""]
