"""What happened while the student learned: curves over the steps, and along the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.reporting.figures.curves import Curve, Point, evaluation_panel, main_panels, number, other_panels, overlay
from opdkit.reporting.figures.position import position_panels
from opdkit.reporting.figures.series import legend
from opdkit.reporting.html.document import Part, part, small
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.run import RunContents

WORDS = (
    "Loss: what training makes small. Reward: the grader's mean over the step's sampled answers. Entropy: how "
    "undecided the student is at each token. Overlap: how many of the tokens that one model finds likely the other "
    "does too; 1 is all."
)
_BUCKET = re.compile(r"(?P<name>.+)@(?P<first>\d+)-(?P<end>\d+)")  # a metric of the tokens at these places of an answer
BY_BUCKET: Mapping[str, str] = {
    "overlap/reverse_kl": "KL(student || teacher), nats",
    "overlap/forward_kl": "KL(teacher || student), nats",
    "overlap/ratio": "Overlap ratio",
    "overlap/entropy_gap": "Entropy gap, nats",
}


def training(run: RunContents) -> Part | None:
    evaluated = [evaluation_panel(f"Held-out: {dataset}", history) for dataset, history in run.history.items()]
    shown = [figure for figure in evaluated if figure] + main_panels(run.metrics)
    others = other_panels(run.metrics)
    if not shown and not others:
        return None
    more = None
    if others:
        more = tag("details", tag("summary", "All other metrics"), tag("div", *others, class_="panels"))
    thick = " Thin: every step. Thick: running mean." if len(run.metrics) > 1 else ""
    return part(
        "Training",
        small(WORDS + thick),
        tag("div", *shown, class_="panels"),
        _bucket_panels(run.metrics),
        position_panels(run),
        more,
    )


def _bucket_panels(metrics: Sequence[Mapping[str, Any]]) -> Html | None:
    """The metrics that are measured by position in the answer, first and last time. None for a single bucket."""
    measured = [line for line in metrics if any(_BUCKET.fullmatch(name) for name in line)]
    steps = [measured[0], measured[-1]][-len(measured) :] if measured else []
    figures, names = [], [f"step {line['step']}" for line in reversed(steps)]
    for name, title in BY_BUCKET.items():
        curves = [_by_bucket(line, name) for line in reversed(steps)]
        if any(len(curve) > 1 and any(curve) for curve in curves):
            figures.append(overlay(title, curves, names=names, along="token", smooth=False))
    if not figures:
        return None
    words = "Whole distributions of student and teacher, compared at the tokens of some answers."
    return join(
        tag("h3", "Student and teacher, by position in the answer"),
        legend(names, words),
        tag("div", *figures, class_="panels"),
    )


def _by_bucket(line: Mapping[str, Any], name: str) -> Curve:
    """One point for each bucket, in its middle."""
    found = {
        (int(match["first"]), int(match["end"])): number(line, key)
        for key in line
        if (match := _BUCKET.fullmatch(key)) and match["name"] == name
    }
    return [None if value is None else Point((first + end) / 2, value) for (first, end), value in sorted(found.items())]
