"""Overlap along the answer, a panel a quantity and a line a source: an SVG file, light or dark as the reader's system.

A bucket without a value breaks the line; a source of one bucket is a row of dots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact, ticks
from opdkit.reporting.html.style import STANDALONE
from opdkit.reporting.html.svg import figure_file

PANELS: Mapping[str, str] = {
    "ratio": "Overlap ratio",
    "mass_student": "Overlap mass, student",
    "mass_teacher": "Overlap mass, teacher",
    "advantage": "Overlap-token advantage",
    "entropy_gap": "Entropy gap, nats",
    "reverse_kl": "KL(student || teacher), nats",
}
LINES = ("#0072b2", "#c25200", "#00795a", "#8a5a00", "#7a4fa3", "#7a828d")  # Okabe and Ito's, told apart by all
DASHES = ("none", "6 3", "2 3", "8 3 2 3", "6 3", "none")
WIDTH, EDGE, ACROSS, GAP = 1080, 24, 3, 40  # pixels
LEFT, HEIGHT, HEAD, FOOT = 46, 120, 30, 34  # of a panel: room for tick labels, and its drawing
OWN = """
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:12px;fill:var(--quiet)}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke-width:1.75;stroke-linejoin:round}
"""


Buckets = Sequence[Mapping[str, Any]]  # in order, each with `from`, `to` and quantities' means or None


def overlap_figure(sources: Mapping[str, Buckets]) -> str:
    """By position in tokens; sources: name -> buckets."""
    title = "Do student and teacher look at the same tokens? By position in the answer"
    panels = [
        (label, {name: (buckets, quantity) for name, buckets in sources.items()}) for quantity, label in PANELS.items()
    ]
    return _figure(title, panels, list(sources), ("token 0", None))


def position_figure(tokens: Buckets, branches: Buckets) -> str:
    """By relative position: the two models' disagreement, and what became of branches (`measure.position.Bin`)."""
    viable = [
        {
            "from": b["start"],
            "to": b["end"],
            "num_tokens": b["branches"],
            "teacher": b["viability"]["value"],
            "own": b["own"]["value"],
        }
        for b in branches
    ]
    panels: list[tuple[str, Lines]] = [
        ("KL(student || teacher), nats", {"tokens": (tokens, "reverse_kl")}),
        ("Same likeliest token", {"tokens": (tokens, "top1_agreement")}),
        ("Overlap mass, teacher", {"tokens": (tokens, "mass_teacher")}),
        ("Entropy of the student, nats", {"tokens": (tokens, "student_entropy")}),
        ("Entropy of the teacher, nats", {"tokens": (tokens, "teacher_entropy")}),
        ("Reward", {"behind the teacher's token": (viable, "teacher"), "the answer as it was": (viable, "own")}),
    ]
    return _figure(
        "How far the teacher can be relied on, by relative position", panels, list(panels[-1][1]), ("0", 1.0)
    )


Lines = Mapping[str, tuple[Buckets, str]]  # name -> (buckets, which quantity)
Axis = tuple[str, float | None]  # what stands at its start, and where it ends; None: with the last bucket


def _figure(title: str, panels: Sequence[tuple[str, Lines]], names: Sequence[str], along: Axis) -> str:
    width = (WIDTH - 2 * EDGE - (ACROSS - 1) * GAP) / ACROSS
    top = EDGE + 30 + 18 * len(names)
    height = HEAD + HEIGHT + FOOT
    parts: list[Html] = [tag("text", title, class_="title", x=EDGE, y=EDGE + 10)]
    for index, name in enumerate(names):
        y = EDGE + 30 + 18 * index
        parts.append(tag("line", **_stroke(index), x1=EDGE, x2=EDGE + 28, y1=y, y2=y))
        parts.append(tag("text", name, class_="label", x=EDGE + 36, y=y + 4))
    for index, (label, lines) in enumerate(panels):
        row, column = divmod(index, ACROSS)
        x, y = EDGE + column * (width + GAP), top + row * height
        parts.append(
            tag("svg", *_panel(label, _coloured(lines, names), along, width), x=x, y=y, width=width, height=height)
        )
    bottom = top + height * -(-len(panels) // ACROSS) + 8
    return figure_file(*parts, style=STANDALONE + OWN, width=WIDTH, height=bottom, label=title)


def _coloured(lines: Lines, names: Sequence[str]) -> list[tuple[int, Buckets, str]]:
    """Each line with its colour's number: that of its name in the legend, the last and quiet one without."""
    return [
        (names.index(name) if name in names else len(LINES) - 1, buckets, quantity)
        for name, (buckets, quantity) in lines.items()
    ]


def _panel(label: str, lines: Sequence[tuple[int, Buckets, str]], along: Axis, width: float) -> list[Html]:
    parts = [tag("text", label, class_="label", x=0, y=14)]
    values = [bucket[quantity] for _, buckets, quantity in lines for bucket in buckets if bucket[quantity] is not None]
    if not values:
        return [*parts, tag("text", "not defined on these answers", x=LEFT, y=HEAD + HEIGHT / 2)]
    axis = ticks(min(values), max(values), about=3)
    start, last = along[0], along[1] or max(bucket["to"] for _, buckets, _ in lines for bucket in buckets)

    def x(bucket: Mapping[str, Any]) -> float:
        return LEFT + (width - LEFT - 6) * (bucket["from"] + bucket["to"]) / 2 / last

    def y(value: float) -> float:
        return HEAD + HEIGHT * (1 - (value - axis[0]) / (axis[-1] - axis[0]))

    for tick in axis:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=width, y1=y(tick), y2=y(tick)))
        parts.append(tag("text", compact(tick), x=LEFT - 8, y=y(tick) + 4, text_anchor="end"))
    parts.append(tag("text", start, x=LEFT, y=HEAD + HEIGHT + 20))
    parts.append(tag("text", compact(last), x=width, y=HEAD + HEIGHT + 20, text_anchor="end"))
    for index, buckets, quantity in lines:
        for stretch in _stretches(buckets, quantity):
            points = " ".join(f"{x(b):.1f},{y(b[quantity]):.1f}" for b in stretch)
            parts.append(tag("polyline", **_stroke(index), class_="line", points=points))
            parts += [_dot(b, quantity, x(b), y(b[quantity]), LINES[index % len(LINES)]) for b in stretch]
    return parts


def _stroke(index: int) -> dict[str, str]:
    return {
        "stroke": LINES[index % len(LINES)],
        "stroke_dasharray": DASHES[index % len(DASHES)],
        "stroke_width": "1.75",
    }


def _dot(bucket: Mapping[str, Any], quantity: str, x: float, y: float, colour: str) -> Html:
    said = f"{bucket['from']} to {bucket['to']}: {compact(bucket[quantity])}, of {bucket['num_tokens']:.0f}"
    return tag("circle", tag("title", said), cx=x, cy=y, r=3, fill=colour)


def _stretches(buckets: Buckets, quantity: str) -> list[list[Mapping[str, Any]]]:
    """Neighbouring buckets that have a value."""
    stretches: list[list[Mapping[str, Any]]] = []
    for bucket in buckets:
        if bucket[quantity] is None:
            continue
        if stretches and stretches[-1][-1]["to"] == bucket["from"]:
            stretches[-1].append(bucket)
        else:
            stretches.append([bucket])
    return stretches
