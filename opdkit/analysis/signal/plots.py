"""Figures of an analysis: conditions down, one panel for each metric, dots with 95 % whiskers. SVG, light or dark.

A dashed line marks what a teacher that knows nothing would have; base is a ring, every other condition a disc.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.measure.signal import BASE, BUCKETS
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact, score, ticks
from opdkit.reporting.html.style import FIGURE, STANDALONE
from opdkit.reporting.html.svg import figure_file

PANELS: Mapping[str, str] = {
    "spearman": "Spearman",
    "kendall_tau": "Kendall's tau",
    "pairwise_accuracy": "Pairwise accuracy",
    "success_auc": "AUC of success",
    "success_point_biserial": "Point-biserial",
    "success_brier_sigmoid": "Brier (lower: better)",
}
CHANCE: Mapping[str, float] = {  # of scores that say nothing of the answers, without ties
    "spearman": 0.0,
    "kendall_tau": 0.0,
    "pairwise_accuracy": 0.5,
    "success_auc": 0.5,
    "success_point_biserial": 0.0,
}
WIDTH, EDGE, LABELS, GAP = 1080, 24, 292, 26  # pixels
ROW, HEAD, FOOT = 17, 34, 30  # of one condition; above and below a panel
ACROSS = 3
OWN = ".chance{stroke:var(--quiet);stroke-width:1;stroke-dasharray:3 3}svg .name{font-size:11px;fill:var(--ink)}"

Conditions = Mapping[str, Mapping[str, Any]]  # condition -> ConditionSignal


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    metric: str
    estimates: Mapping[str, Mapping[str, Any]]  # condition -> estimate


def main_figure(conditions: Conditions) -> str:
    """Six metrics over all problems."""
    panels = [
        _Panel(title, metric, {name: part["metrics"][metric] for name, part in conditions.items()})
        for metric, title in PANELS.items()
    ]
    return _figure(panels, list(conditions), "Does the teacher rank answers as the verifier does?")


def by_difficulty(conditions: Conditions) -> str:
    """The same metrics for easy, medium and hard problems, side by side."""
    panels = [
        _Panel(
            f"{title}, {bucket}",
            metric,
            {name: part["by_bucket"][bucket][metric] for name, part in conditions.items()},
        )
        for metric, title in PANELS.items()
        for bucket in BUCKETS
    ]
    return _figure(panels, list(conditions), "The same by difficulty: half or more right, some, none")


def _figure(panels: Sequence[_Panel], names: Sequence[str], title: str) -> str:
    width = (WIDTH - 2 * EDGE - LABELS - (ACROSS - 1) * GAP) / ACROSS
    height = HEAD + ROW * len(names) + FOOT
    top = EDGE + 34
    parts: list[Html] = [tag("text", title, class_="title", x=EDGE, y=EDGE + 12)]
    for index, panel in enumerate(panels):
        row, column = divmod(index, ACROSS)
        x, y = EDGE + LABELS + column * (width + GAP), top + row * height
        if column == 0:
            parts += [
                tag("text", name, class_="name", x=x - 12, y=y + HEAD + ROW * (place + 0.5) + 4, text_anchor="end")
                for place, name in enumerate(names)
            ]
        parts.append(tag("svg", *_panel(panel, names, width), x=x, y=y, width=width, height=height))
    bottom = top + height * -(-len(panels) // ACROSS) + EDGE
    return figure_file(*parts, style=FIGURE + STANDALONE + OWN, width=WIDTH, height=bottom, label=title)


def _panel(panel: _Panel, names: Sequence[str], width: float) -> list[Html]:
    parts = [tag("text", panel.title, class_="label", x=0, y=16)]
    known = [estimate for estimate in panel.estimates.values() if estimate["value"] is not None]
    if not known:
        return [*parts, tag("text", "not defined on these problems", x=0, y=HEAD + ROW / 2 + 4)]
    ends = [x for estimate in known for x in (estimate["value"], estimate["low"], estimate["high"]) if x is not None]
    chance = CHANCE.get(panel.metric)
    axis = ticks(min([*ends, *([] if chance is None else [chance])]), max(ends), about=3)
    bottom = HEAD + ROW * len(names)

    def at(value: float) -> float:
        return 4 + (width - 8) * (value - axis[0]) / (axis[-1] - axis[0])

    for tick in axis:
        parts.append(tag("line", class_="grid", x1=at(tick), x2=at(tick), y1=HEAD - 4, y2=bottom))
        parts.append(tag("text", compact(tick), x=at(tick), y=bottom + 15, text_anchor="middle"))
    if chance is not None and axis[0] <= chance <= axis[-1]:
        parts.append(tag("line", class_="chance", x1=at(chance), x2=at(chance), y1=HEAD - 4, y2=bottom))
    for place, name in enumerate(names):
        parts += _marks(name, panel.estimates[name], HEAD + ROW * (place + 0.5), at)
    return parts


def _marks(name: str, estimate: Mapping[str, Any], y: float, at: Any) -> list[Html]:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return []
    said = f"{name}: {score(value)}"
    marks = []
    if low is not None and high is not None:
        said += f", 95 % interval {score(low)} to {score(high)}"
        marks.append(tag("line", class_="whisker", x1=at(low), x2=at(high), y1=y, y2=y))
    dot = tag("circle", tag("title", f"{said}, {estimate['problems']} problems"), class_="dot", cx=at(value), cy=y, r=4)
    return [tag("g", *marks, dot, class_="before" if name == BASE else "after")]
