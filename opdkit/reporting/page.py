"""The run report: one self-contained HTML file that says what happened in a run, every word of a model escaped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from opdkit.measure.intervals import FEW, Difference, side_of
from opdkit.reporting.decode import tokenizer_decode
from opdkit.reporting.figures.tokens import Decode
from opdkit.reporting.html.document import Live, Part, document, facts, notes, part, small, write_page
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import compact, duration, known, score
from opdkit.reporting.run import Entry, RunContents, flat, mapping, read_run
from opdkit.reporting.sections.answers import answers
from opdkit.reporting.sections.happened import what_happened
from opdkit.reporting.sections.headline import explain, headline
from opdkit.reporting.sections.held_out import Moved, held_out, moved
from opdkit.reporting.sections.problems import problems
from opdkit.reporting.sections.results import results_table
from opdkit.reporting.sections.training import training
from opdkit.reporting.sections.warn import warnings


def write_report(run_folder: Path, decode: Decode | None = None, *, out: Path | None = None) -> Path:
    """Write `report.html` into the run folder from the folder's public files, or another file, and return its path.

    decode: token ids -> text for the sampled answers; by default the run's own tokenizer, when its file is at hand.
    What is missing (no evaluation, an interrupted run, a damaged file) is said on the page. Raises UserError only if
    the folder holds nothing of a run, or cannot be written to.
    """
    run = read_run(Path(run_folder))
    path = out or run.folder / "report.html"
    write_page(path, page(run, decode or tokenizer_decode(run)))
    return path


def page(run: RunContents, decode: Decode | None, live: Live | None = None) -> str:
    by_problem, unread = moved(run)
    parts = [
        _results(run, by_problem),
        _warnings(run, unread),
        training(run),
        _answers(run, decode),
        problems(run),
        _setting(run),
    ]
    return document(run.name, _header(run, by_problem), parts, _footer(run), live)


def _header(run: RunContents, by_problem: Mapping[str, Moved]) -> Html:
    summary = run.summary
    method = run.setting("method", "name") if summary is None else summary.get("method")
    facts = [None if method is None else f"method {method}"]
    if summary is None:
        planned = run.setting("train", "steps")
        last = run.metrics[-1]["step"] if run.metrics else 0
        facts.append(f"stopped or still running at step {compact(last)}")
        facts.append(None if planned is None else f"{planned} planned")
    else:
        steps, seconds = known(summary.get("steps")), known(summary.get("seconds"))
        facts.append(None if steps is None else f"{compact(steps)} steps")
        facts.append(None if seconds is None else f"{duration(seconds)} of training")
        for whose, count in mapping(summary.get("tokens")).items():
            facts.append(f"{compact(known(count))} {whose} tokens" if known(count) else None)
    line = " · ".join(fact for fact in facts if fact)
    return tag(
        "header",
        tag("h1", run.name),
        tag("p", line, class_="quiet"),
        *_leads(run, by_problem),
        _best(run),
        _how(run),
        _who(run),
    )


def _who(run: RunContents) -> Html | None:
    """Who learned from whom, on what, from the recipe."""
    weights, context = run.setting("teacher", "weights"), run.setting("context", "kind")
    teachers = {"model": run.setting("teacher", "path"), "self": f"the student itself, {weights} weights"}
    said = {
        "Method": _method(run.setting("method", "name"), context),
        "Student": run.setting("model", "path"),
        "Teacher": teachers.get(run.setting("teacher", "kind")),
        "It also reads": None if context == "none" else context,
        "Problems": run.setting("data", "train"),
        "Started": mapping(run.environment).get("time"),
    }
    there = {key: str(value) for key, value in said.items() if value is not None}
    return facts(there) if there else None


def _how(run: RunContents) -> Html | None:
    words = what_happened(run)
    return None if words is None else tag("p", words, class_="quiet")


def _best(run: RunContents) -> Html | None:
    """Which step `train.keep_best` chose; and that choosing by a set flatters the numbers on it."""
    best = mapping(mapping(run.summary).get("best"))
    if not best:
        return None
    by, value = str(best.get("chosen_on")), known(best.get("value"))
    flattered = any(f"/{dataset}/" in f"/{by}/" for dataset in run.headline)
    words = f"The best step is {best.get('step')}, chosen by {by} ({compact(value)}): {best.get('model')}."
    return tag("p", words + " Its numbers on that set flatter it." * flattered, class_="quiet")


def _method(name: object, context: object) -> str | None:
    """What its file says it is; of what peers a teacher reads, the page says what this run showed."""
    from opdkit.methods import METHODS

    method = METHODS.get(name) if isinstance(name, str) else None
    about = (sys.modules[method.__module__].__doc__ or "").strip().splitlines() if method else []
    return f"{name}: {about[0].partition(':')[0] if context == 'peers' else about[0]}" if about else None


def _leads(run: RunContents, by_problem: Mapping[str, Moved]) -> list[Html]:
    """What happened, in a sentence for each dataset."""
    leads = []
    for dataset, entries in run.headline.items():
        by_kind = {entry.kind: entry for entry in entries if entry.kind != "arm"}
        before, after, teacher = (by_kind.get(kind) for kind in ("before", "after", "teacher"))
        if before and after:
            paired = by_problem[dataset].difference if dataset in by_problem else None
            leads.append(tag("p", f"On {dataset}, {_change(before, after, paired)}{_beside(teacher)}", class_="lead"))
        elif after and after.measured.avg.value is not None:
            told = f"On {dataset}, the student ended at {score(after.measured.avg.value)}; it was not measured before."
            leads.append(tag("p", f"{told}{_beside(teacher)}", class_="lead"))
    return leads


def _change(before: Entry, after: Entry, paired: Difference | None) -> str:
    """No more than the intervals allow: the paired one where the answers were kept, else those of the two means."""
    b, a = before.measured.avg, after.measured.avg
    if b.value is None or a.value is None:
        return "the student's answers could not be graded."
    numbers = f"from {score(b.value)} to {score(a.value)}"
    num_problems = min(before.measured.problems, after.measured.problems) if paired is None else paired["problems"]
    if num_problems < FEW or b.low is None or b.high is None or a.low is None or a.high is None:
        counted = "1 problem is" if num_problems == 1 else f"{num_problems} problems are"
        return f"the student went {numbers}; {counted} too few to tell whether that is chance."
    if paired is not None:
        by = f"{paired['value']:+.3f} on the same problems, 95 % interval [{paired['low']:+.3f}, {paired['high']:+.3f}]"
        side = side_of(paired)
        if side == "unsettled":
            return f"the student went {numbers}; the difference, {by}, may be chance."
        return f"the student {'rose' if side == 'above' else 'fell'} {numbers}: {by}."
    if a.low > b.high:
        return f"the student rose {numbers}; the 95 % intervals are apart."
    if a.high < b.low:
        return f"the student fell {numbers}; the 95 % intervals are apart."
    return f"the student went {numbers}; the 95 % intervals overlap, so this run alone does not settle that it changed."


def _beside(teacher: Entry | None) -> str:
    value = teacher.measured.avg.value if teacher else None
    return "" if value is None else f" The teacher stands at {score(value)}."


def _results(run: RunContents, by_problem: Mapping[str, Moved]) -> Part | None:
    parts: list[Html] = []
    for dataset, entries in run.headline.items():
        parts += [
            tag("h3", dataset),
            small(f"{explain(entries)}."),
            headline(entries),
            results_table(entries),
            *([held_out(by_problem[dataset])] if dataset in by_problem else []),
        ]
    return part("Results", *parts) if parts else None


def _warnings(run: RunContents, unread: Sequence[str]) -> Part:
    found = warnings(run, [*run.missing, *unread])
    if not found:
        return part("Warnings", small("In training nothing was cut, left out, ungraded or skipped."))
    return part("Warnings", notes(found), count=len(found))


def _answers(run: RunContents, decode: Decode | None) -> Part | None:
    return part("Answers", answers(run, decode)) if run.rows else None


def _setting(run: RunContents) -> Part | None:
    parts = []
    if run.recipe_text:
        parts.append(tag("details", tag("summary", "Recipe, resolved"), tag("pre", run.recipe_text)))
    if run.environment:
        parts.append(tag("details", tag("summary", "Environment and data"), facts(dict(flat(run.environment)))))
    return part("Setting", *parts) if parts else None


def _footer(run: RunContents) -> Html:
    versions = mapping(mapping(run.environment).get("versions"))
    by = f"opdkit {versions['opdkit']}" if versions.get("opdkit") else "opdkit"
    return tag("footer", tag("p", join(f"Written by {by} from the files of {run.folder.name}/.")))
