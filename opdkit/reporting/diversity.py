"""The page of `opdkit analyse diversity`: measures side by side, pass@k, diversity against pass@n, and case studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opdkit.reporting.figures.curves import Curve, Point, overlay
from opdkit.reporting.figures.series import legend
from opdkit.reporting.html.document import Part, document, part, small, table
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import score
from opdkit.reporting.run import Entry, Interval, Measured
from opdkit.reporting.sections.headline import headline

if TYPE_CHECKING:
    from opdkit.measure.diversity import Case, SetDiversity

# Measure -> what it is called, and which way it points. Those of this table that a result has are drawn.
TITLES: Mapping[str, str] = {
    "distance": "Distance of two answers (0: alike)",
    "success_distance": "Distance of two right answers",
    "self_bleu": "Self-BLEU (1: alike)",
    "success_self_bleu": "Self-BLEU of right answers",
    "distinct2": "Distinct 2-grams",
    "success_distinct2": "Distinct 2-grams of right answers",
    "unique_ratio": "Share of different texts",
    "text_distance": "Distance of characters, as published",
    "tree_distance": "Distance of syntax trees (0: alike)",
    "success_tree_distance": "Distance of right programs' trees",
}
NUM_CASES, NUM_ANSWERS, NUM_CHARACTERS = 6, 4, 1200  # shown on the page; the files beside it hold more
NUM_BINS = 8


def diversity_page(results: Mapping[str, SetDiversity]) -> str:
    """results: data set -> what was measured."""
    header = tag("header", tag("h1", "Diversity of answers"), tag("p", ", ".join(results), class_="quiet"))
    return document("Diversity of answers", header, [_section(name, found) for name, found in results.items()])


def _section(name: str, found: SetDiversity) -> Part:
    runs = list(found["runs"])
    said = f"{found['problems']} problems, at most {found['answers_each']} answers each, the same number in every run."
    left = [f"{count} problems of {run} are not in all runs" for run, count in found["left_out"].items() if count]
    return part(
        name,
        small(" ".join([said, *(f"{words}." for words in left)])),
        legend(runs),
        tag("div", *_figures(found, runs), class_="panels"),
        *_measures(found),
        _correlations(found),
        tag("h3", "Where the runs differ most" if len(runs) > 1 else "The least diverse problems"),
        *(_case(case) for case in found["cases"][:NUM_CASES]),
    )


def _measures(found: SetDiversity) -> Iterator[Html]:
    for key, title in TITLES.items():
        estimates = {name: run["measures"][key] for name, run in found["runs"].items() if key in run["measures"]}
        if any(estimate["value"] is not None for estimate in estimates.values()):
            counts = sorted({estimate["problems"] for estimate in estimates.values()})
            over = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            yield tag("h3", title)
            yield small(f"Mean over the {over} problems where it is defined; 95 % intervals.")
            yield headline([_entry(name, e, first=i == 0) for i, (name, e) in enumerate(estimates.items())])


def _entry(name: str, estimate: Any, *, first: bool) -> Entry:
    interval = Interval(estimate["value"], estimate["low"], estimate["high"])
    nothing = Interval(None, None, None)
    measured = Measured(problems=estimate["problems"], samples=0, avg=interval, passes={}, maj=nothing, counts={})
    return Entry(name, "before" if first else "arm", measured)


def _figures(found: SetDiversity, runs: Sequence[str]) -> Iterator[Html]:
    passes = [_pass_curve(found, run) for run in runs]
    if any(any(curve) for curve in passes):
        yield overlay("pass@k", passes, names=runs, along="k =", smooth=False)
    binned = [_binned(found, run) for run in runs]
    if any(any(curve) for curve in binned):
        title = f"pass@{found['answers_each']} of problems, by the distance of their answers"
        yield overlay(title, binned, names=runs, along="distance", smooth=False)


def _pass_curve(found: SetDiversity, run: str) -> Curve:
    points: list[Point | None] = []
    for key, estimate in found["runs"][run]["measures"].items():
        if key.startswith("pass@") and estimate["value"] is not None:
            k = int(key.removeprefix("pass@"))
            points.append(Point(k, estimate["value"], estimate["low"], estimate["high"]))
    return sorted((p for p in points if p), key=lambda point: point.step)


def _binned(found: SetDiversity, run: str) -> Curve:
    """Equally many problems to a point, in the order of their distance."""
    key = f"pass@{found['answers_each']}"
    rows = [rows[run] for rows in found["per_problem"].values()]
    pairs = sorted(
        (row["distance"], row[key]) for row in rows if row["distance"] is not None and row.get(key) is not None
    )
    bins = [each for each in np.array_split(np.array(pairs, dtype=np.float64), NUM_BINS) if len(each)]
    return [Point(float(each[:, 0].mean()), float(each[:, 1].mean())) for each in bins] if pairs else []


def _correlations(found: SetDiversity) -> Html:
    keys = list(dict.fromkeys(key for run in found["runs"].values() for key in run["correlation_with_pass"]))
    rows = [
        [name, *(score(run["correlation_with_pass"].get(key)) for key in keys)] for name, run in found["runs"].items()
    ]
    return tag(
        "div",
        small(f"Correlation of a problem's measure with its pass@{found['answers_each']}; - where it is not defined."),
        table([None, *keys], rows),
    )


def _case(case: Case) -> Html:
    parts: list[Html | None] = [
        tag("p", f"problem {case['problem_id']}", class_="role"),
        tag("pre", case["question"][:NUM_CHARACTERS]) if case["question"] else None,
    ]
    for run, answers in case["answers"].items():
        distance = score(case["distances"].get(run))
        shown = f", {NUM_ANSWERS} of {len(answers)} answers" if len(answers) > NUM_ANSWERS else ""
        parts.append(tag("p", f"{run}: distance {distance}{shown}", class_="role"))
        parts += [tag("pre", _text(answer), class_="answer") for answer in answers[:NUM_ANSWERS]]
    return tag("article", *parts)


def _text(answer: Mapping[str, Any]) -> str:
    reward = answer["reward"]
    text = answer["text"]
    cut = f" (its first {NUM_CHARACTERS} characters)" if len(text) > NUM_CHARACTERS else ""
    return f"[reward {'unknown' if reward is None else f'{reward:g}'}{cut}]\n{text[:NUM_CHARACTERS]}"
