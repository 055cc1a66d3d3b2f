"""Several runs on one page: who ended where, what the paired differences are, their curves over each other, and in
what their recipes differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.measure.intervals import Difference, side_of
from opdkit.reporting.figures.curves import PANELS, Curve, curve_of, evaluation_curve, other_names, overlay
from opdkit.reporting.figures.series import NUM_COLOURS, legend
from opdkit.reporting.html.document import Live, Part, document, notes, part, small, table, write_page
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import UNKNOWN, compact, duration, known, score
from opdkit.reporting.run import Entry, RunContents, flat, mapping, read_run
from opdkit.reporting.sections.headline import explain, headline
from opdkit.reporting.sections.results import results_table
from opdkit.reporting.sections.warn import weighed

# Keys in which two runs always differ.
_OWN_KEYS = ("name", "runs_dir")
PAIRED = ("avg", "maj@")  # of the metrics that `opdkit compare` prints, those that begin so


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write one page over several run folders. The first is what the others are compared with.

    Raises UserError for a folder that holds nothing of a run, the same one twice, and for more runs than colours.
    """
    if len(folders) > NUM_COLOURS:
        raise UserError(f"{len(folders)} runs are more than the {NUM_COLOURS} colours of a page; compare fewer at once")
    resolved = [Path(os.path.realpath(folder)) for folder in folders]
    twice = [folder for index, folder in enumerate(resolved) if folder in resolved[:index]]
    if twice:
        raise UserError(f"{twice[0]} is given twice; a run is compared with another one")
    write_page(path, comparison([read_run(Path(folder)) for folder in folders]))
    return path


def comparison(runs: Sequence[RunContents], live: Live | None = None) -> str:
    labels = _labels(runs)
    title = " · ".join(labels)
    header = tag("header", tag("h1", title), legend(labels), _facts(runs, labels))
    parts = [_results(runs, labels), _warnings(runs, labels), _curves(runs, labels), _recipes(runs, labels)]
    return document(title, header, parts, live=live)


def _labels(runs: Sequence[RunContents]) -> list[str]:
    """Their names; with the folder where two runs have the same one."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs]


def _facts(runs: Sequence[RunContents], labels: Sequence[str]) -> Html:
    rows = []
    for run, label in zip(runs, labels, strict=True):
        summary = run.summary or {}
        last = run.metrics[-1]["step"] if run.metrics else 0
        tokens, seconds = mapping(summary.get("tokens")), known(summary.get("seconds"))
        rows.append(
            [
                label,
                str(run.setting("method", "name") or UNKNOWN),
                compact(last) if run.summary else f"{compact(last)}, not finished",
                UNKNOWN if seconds is None else duration(seconds),
                compact(known(tokens.get("answer"))),
                compact(known(tokens.get("teacher"))),
            ]
        )
    return table(["", "method", "steps", "training", "answer tokens", "teacher tokens"], rows)


def _results(runs: Sequence[RunContents], labels: Sequence[str]) -> Part:
    datasets = dict.fromkeys(dataset for run in runs for dataset in run.headline)
    if not datasets:
        return part("Results", small("None of these runs was evaluated, so there is no accuracy to compare."))
    parts: list[Html] = []
    for dataset in datasets:
        entries = _entries(runs, labels, dataset)
        parts += [tag("h3", dataset), small(f"{explain(entries)}."), headline(entries, labels), results_table(entries)]
    return part("Results", *parts, *_paired(runs, labels))


def _entries(runs: Sequence[RunContents], labels: Sequence[str], dataset: str) -> list[Entry]:
    """Every run's student, before (once, where all agree) and after; and the first teacher that was measured."""
    ends = [
        Entry(label, "after", entry.measured)
        for run, label in zip(runs, labels, strict=True)
        for entry in run.headline.get(dataset, ())
        if entry.kind == "after"
    ]
    befores = [
        Entry(f"{label}, before", "before", entry.measured)
        for run, label in zip(runs, labels, strict=True)
        for entry in run.headline.get(dataset, ())
        if entry.kind == "before"
    ]
    if befores and all(entry.measured == befores[0].measured for entry in befores):
        befores = [Entry("Student before", "before", befores[0].measured)]
    teachers = [entry for run in runs for entry in run.headline.get(dataset, ()) if entry.kind == "teacher"]
    return [*befores, *ends, *teachers[:1]]


def _paired(runs: Sequence[RunContents], labels: Sequence[str]) -> list[Html]:
    """Each run against the first, problem by problem; or why that cannot be."""
    from opdkit.evaluation.compare_runs import compare_runs

    rows: list[list[str]] = []
    notes: list[str] = []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        try:
            found = compare_runs(str(runs[0].folder), str(run.folder))
        except UserError as error:
            notes.append(f"{label}: {error}.")
            continue
        for dataset, one in found["sets"].items():
            shown = [(metric, each) for metric, each in one["metrics"].items() if metric.startswith(PAIRED)]
            rows += [[f"{label}, {dataset}", metric, *_difference(each)] for metric, each in shown]
            notes += [f"{label}, {dataset}: {note}." for note in one["notes"]]
        notes += [f"{label}: {note}." for note in found["notes"]]
    words = f"Each run minus {labels[0]}, on the problems both answered: paired, so the problems' difficulty drops out."
    head = ["", "metric", labels[0], "this run", "difference", "95 % interval", ""]
    return [
        tag("h3", "Problem by problem"),
        *([small(words), table(head, rows)] if rows else []),
        *(tag("p", note, class_="quiet small") for note in notes),
    ]


def _difference(found: Difference) -> list[str]:
    value, low, high = found["value"], found["low"], found["high"]
    interval = UNKNOWN if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"
    said = {"above": "better", "below": "worse", "unsettled": "not settled", "too_few": "too few to tell"}
    verdict = "" if value is None else said[side_of(found)]
    difference = UNKNOWN if value is None else f"{value:+.3f}"
    return [score(found["before"]), score(found["after"]), difference, interval, verdict]


def _curves(runs: Sequence[RunContents], labels: Sequence[str]) -> Part | None:
    names = dict.fromkeys(name for run in runs for name in other_names(run.metrics))
    held_out = dict.fromkeys(dataset for run in runs for dataset in run.history)
    shown = [
        *_overlays(
            labels, {f"Held-out: {d}": [evaluation_curve(run.history.get(d, ())) for run in runs] for d in held_out}
        ),
        *_overlays(labels, {title: [curve_of(run.metrics, name) for run in runs] for name, title in PANELS.items()}),
    ]
    others = _overlays(labels, {name: [curve_of(run.metrics, name) for run in runs] for name in names})
    if not shown and not others:
        return None
    return part(
        "Training",
        legend(labels, "Thin: every step. Thick: running mean. Shaded: 95 % intervals."),
        tag("div", *shown, class_="panels"),
        tag("details", tag("summary", "All other metrics"), tag("div", *others, class_="panels")) if others else None,
    )


def _overlays(labels: Sequence[str], figures: Mapping[str, Sequence[Curve]]) -> list[Html]:
    return [
        overlay(title, curves, names=labels) for title, curves in figures.items() if any(any(curve) for curve in curves)
    ]


def _recipes(runs: Sequence[RunContents], labels: Sequence[str]) -> Part:
    settings: list[dict[str, Any]] = [dict(flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if key not in _OWN_KEYS)
    differ = [key for key in keys if len({each.get(key, UNKNOWN) for each in settings}) > 1]
    rows = [[key, *(each.get(key, UNKNOWN) for each in settings)] for key in differ]
    return part(
        "Recipes",
        small("What they do not share; everything else is the same.") if rows else small("The same, key by key."),
        table(["", *labels], rows) if rows else None,
    )


def _warnings(runs: Sequence[RunContents], labels: Sequence[str]) -> Part | None:
    """Each once, with the runs that it is true of."""
    whose: dict[str, list[str]] = {}
    found = [(each, label) for run, label in zip(runs, labels, strict=True) for each in weighed(run, run.missing)]
    for each, label in sorted(found, key=lambda pair: -pair[0].weight):
        if label not in whose.setdefault(each.sentence, []):
            whose[each.sentence].append(label)
    said = [f"{', '.join(names)}: {sentence}" for sentence, names in whose.items()]
    return part("Warnings", notes(said), count=len(said)) if said else None
