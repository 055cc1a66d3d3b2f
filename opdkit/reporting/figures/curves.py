"""Curves over training: one small panel for each quantity, from the lines of metrics.jsonl and the evaluations.

Across, a panel is drawn in thousandths of its width, so it fits any column. Unknown values are gaps, not zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.reporting.figures.series import series
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact, known, ticks
from opdkit.reporting.run import Interval, Measured

HEIGHT, TOP = 104, 8  # of the drawing area, and above it, in pixels
LABELS = 46  # width of the column of tick labels
MAX_POINTS = 400  # longer curves are drawn as means of equally many steps
SMOOTH_FROM = 24  # points; shorter curves have no running mean

# Shown first, in this order; every other metric of the run has its panel below.
PANELS: Mapping[str, str] = {
    "train/loss": "Loss",
    "rollout/reward": "Reward",
    "rollout/answer_tokens": "Answer length, tokens",
    "rollout/share_truncated": "Share cut at the limit",
    "student/entropy": "Entropy, nats",
    "overlap/ratio": "Overlap of likely tokens",
    "overlap/reverse_kl": "KL(student || teacher), nats",
    "overlap/entropy_gap": "Entropy gap to the teacher, nats",
    "train/grad_norm": "Gradient norm",
    "train/lr": "Learning rate",
    "time/tokens_per_s": "Tokens per second",
}


@dataclass(frozen=True, slots=True)
class Point:
    step: float
    value: float
    low: float | None = None
    high: float | None = None


# None breaks the line: the value of that step is unknown.
Curve = Sequence[Point | None]


def main_panels(metrics: Sequence[Mapping[str, Any]]) -> list[Html]:
    return [panel(title, curve) for name, title in PANELS.items() if any(curve := curve_of(metrics, name))]


def other_panels(metrics: Sequence[Mapping[str, Any]]) -> list[Html]:
    return [panel(name, curve) for name in other_names(metrics) if any(curve := curve_of(metrics, name))]


def other_names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return list({name: None for line in metrics for name in line if "/" in name and name not in PANELS})


def evaluation_panel(title: str, history: Sequence[tuple[int, Measured]]) -> Html | None:
    """The student on held-out problems; None when it was not evaluated in between."""
    points = evaluation_curve(history)
    return panel(title, points) if len(points) > 2 and any(points) else None


def evaluation_curve(history: Sequence[tuple[int, Measured]]) -> list[Point | None]:
    return [_point(step, measured.avg) for step, measured in history]


def panel(title: str, curve: Curve) -> Html:
    """One figure of one curve, with its first and last value. `curve` has at least one known point."""
    return overlay(title, [curve], _first_and_last([point for point in _binned(curve)[0] if point]))


def overlay(
    title: str,
    curves: Sequence[Curve],
    said: str = "",
    *,
    names: Sequence[str] = (),
    along: str = "step",
    smooth: bool = True,
) -> Html:
    """One figure of several curves, in the colours of `series`; those without a known point are not drawn.

    said: beside the title. names: of the curves, for the values that are shown where somebody points, or moves with the
    arrow keys. along: what is counted across. smooth: long curves get a running mean.
    """
    drawn = [_Drawn(index, *_binned(curve)) for index, curve in enumerate(curves) if any(curve)]
    known = [point for each in drawn for point in each.curve if point]
    axis = ticks(
        min(min(p.value, p.low if p.low is not None else p.value) for p in known),
        max(max(p.value, p.high if p.high is not None else p.value) for p in known),
        about=3,
    )
    place = _Place(min(p.step for p in known), max(p.step for p in known), axis[0], axis[-1])
    grid = [tag("line", class_="grid", x1=0, x2="100%", y1=place.y(t), y2=place.y(t)) for t in axis]
    lines, marks = [], []
    for each in drawn:
        mean = _running_mean(each.curve) if smooth else []
        raw = _lines(each.curve, place, "raw" if mean else "mean")
        shapes = [*_bands(each.curve, place), *raw, *_lines(mean, place, "mean")]
        lines.append(tag("g", *shapes, class_=series(each.index), **_values(each, names)))
        marks.append(tag("g", *_marks(each.curve, place), class_=series(each.index)))
    note = next((each.note for each in drawn if each.note), None)
    drawing = _drawing(grid, lines, marks, place, along)
    reader: dict[str, str | float | None] = {
        "role": "slider",
        "tabindex": 0,
        "aria_label": f"{title}, by {along}",
        "aria_valuemin": place.first,
        "aria_valuemax": place.last,
        "aria_valuenow": place.last,
        "aria_valuetext": said or None,
        "data_along": along,
    }
    return tag(
        "figure",
        tag("figcaption", title, tag("span", said) if said else None),
        tag("div", _tick_labels(axis, place), drawing, class_="curve", **reader),
        tag("p", note, class_="quiet small") if note else None,
    )


def _values(drawn: _Drawn, names: Sequence[str]) -> dict[str, str | None]:
    """What the page's script reads out: known steps, and the value of each with its interval."""
    known = [point for point in drawn.curve if point]
    texts = [
        compact(p.value)
        if p.low is None or p.high is None
        else f"{compact(p.value)} [{compact(p.low)}, {compact(p.high)}]"
        for p in known
    ]
    return {"data_x": " ".join(f"{p.step:.10g}" for p in known), "data_y": ";".join(texts),
            "data_n": names[drawn.index] if names else None}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Drawn:
    index: int  # among the curves that were given: its colour
    curve: Curve
    note: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    """From data to the drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        """In thousandths of the width."""
        return 500.0 if self.last == self.first else 1000 * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """In pixels from the top."""
        return TOP + HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def _drawing(grid: list[Html], lines: list[Html], marks: list[Html], place: _Place, along: str) -> Html:
    first, last, whole = place.first, place.last, TOP + HEIGHT + 18
    stretched = tag("svg", *lines, width="100%", height=whole, viewBox=f"0 0 1000 {whole}", preserveAspectRatio="none")
    start, end = f"{along} {compact(first)}", compact(last)
    labels = [tag("text", start, x=0, y=whole)] + (
        [tag("text", end, x="100%", y=whole, text_anchor="end")] if last > first else []
    )
    return tag("svg", *grid, stretched, *marks, *labels, width="100%", height=whole + 3)


def _tick_labels(axis: Sequence[float], place: _Place) -> Html:
    labels = [tag("text", compact(t), x=LABELS - 8, y=place.y(t) + 4, text_anchor="end") for t in axis]
    return tag("svg", *labels, width=LABELS, height=TOP + HEIGHT + 21)


def _lines(curve: Curve, place: _Place, class_: str) -> list[Html]:
    """One polyline for each stretch of at least two known points."""
    return [
        tag(
            "polyline", class_=class_, points=" ".join(f"{place.x(p.step):.0f},{place.y(p.value):.1f}" for p in stretch)
        )
        for stretch in _stretches(curve)
        if len(stretch) > 1
    ]


def _bands(curve: Curve, place: _Place) -> list[Html]:
    """The intervals of each stretch of points that have one."""
    with_interval = [p if p and p.low is not None and p.high is not None else None for p in curve]
    bands = []
    for stretch in _stretches(with_interval):
        upper = [f"{place.x(p.step):.0f},{place.y(p.high or 0.0):.1f}" for p in stretch]
        lower = [f"{place.x(p.step):.0f},{place.y(p.low or 0.0):.1f}" for p in reversed(stretch)]
        bands.append(tag("polygon", class_="band", points=" ".join(upper + lower)))
    return bands if len(with_interval) > 1 else []


def _marks(curve: Curve, place: _Place) -> list[Html]:
    """Points that stand alone, and points that have an interval."""
    alone = [stretch[0] for stretch in _stretches(curve) if len(stretch) == 1]
    marks: list[Html] = []
    for p in [point for point in curve if point and (point in alone or point.low is not None)]:
        x = f"{place.x(p.step) / 10:.2f}%"
        if p in alone and p.low is not None and p.high is not None:
            marks.append(tag("line", class_="whisker", x1=x, x2=x, y1=place.y(p.low), y2=place.y(p.high)))
        marks.append(tag("circle", class_="point", cx=x, cy=place.y(p.value), r=3))
    return marks


def _stretches(curve: Curve) -> Iterator[list[Point]]:
    stretch: list[Point] = []
    for point in [*curve, None]:
        if point is not None:
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []


def _running_mean(curve: Curve) -> list[Point | None]:
    """Centred, over about a twelfth of the curve; empty for short curves. Unknown values are left out of the means."""
    if len(curve) < SMOOTH_FROM:
        return []
    half = max(1, len(curve) // 24)
    means: list[Point | None] = []
    for index, point in enumerate(curve):
        near = [p.value for p in curve[max(0, index - half) : index + half + 1] if p]
        means.append(Point(point.step, sum(near) / len(near)) if point else None)
    return means


def _binned(curve: Curve) -> tuple[Curve, str | None]:
    size = -(-len(curve) // MAX_POINTS)
    if size == 1:
        return curve, None
    bins: list[Point | None] = []
    for start in range(0, len(curve), size):
        known = [p for p in curve[start : start + size] if p]
        middle = sum(p.step for p in known) / len(known) if known else 0.0
        bins.append(Point(middle, sum(p.value for p in known) / len(known)) if known else None)
    return bins, f"Each point is the mean of {size} steps."


def curve_of(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point | None]:
    """Truncated answers are shown as a share of the step's answers; everything else as it was written.

    A step that did not measure it (the name is absent) does not break the line; one where it is unknown (null) does.
    """
    if name == "rollout/share_truncated":
        pairs = [(line, number(line, "rollout/num_truncated"), number(line, "rollout/num_rows")) for line in metrics]
        return [Point(line["step"], cut / rows) if cut is not None and rows else None for line, cut, rows in pairs]
    values = [(line["step"], number(line, name)) for line in metrics if name in line]
    return [None if value is None else Point(step, value) for step, value in values]


def number(line: Mapping[str, Any], name: str) -> float | None:
    """None for what is absent, null or no finite number."""
    return known(line.get(name))


def _point(step: int, avg: Interval) -> Point | None:
    return None if avg.value is None else Point(step, avg.value, avg.low, avg.high)


def _first_and_last(known: Sequence[Point]) -> str:
    first, last = compact(known[0].value), compact(known[-1].value)
    return last if first == last else f"{first} → {last}"
