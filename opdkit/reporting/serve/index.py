"""The list of the runs of a folder: how far each is, what it measures, and which are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from opdkit.errors import UserError
from opdkit.reporting.figures.curves import PANELS, curve_of, panel
from opdkit.reporting.follow import Followed, Follower
from opdkit.reporting.html.document import Live, document, notes, part, small
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import UNKNOWN, duration, score
from opdkit.reporting.sections.warn import warnings

CURVES = ("train/loss", "rollout/reward")  # beside each run that is being written
MOST_CURVES = 6  # runs
HEAD = ("", "run", "state", "step", "left", "method", "held-out", "warnings")


def index_page(title: str, runs: Mapping[str, Path], leading_out: Callable[[Path], str | None], mark: str) -> str:
    """leading_out: why a run is not read, or None."""
    seen: dict[str, Followed] = {}
    why: list[str] = []
    for name, folder in runs.items():
        try:
            if sentence := leading_out(folder):
                raise UserError(sentence)
            seen[name] = Follower(folder).look()
        except UserError as error:
            why.append(f"{name}: {error}.")
        except Exception as error:  # a stranger's files
            why.append(f"{name} cannot be read ({type(error).__name__}: {error}).")
    running = sum(one.state == "running" for one in seen.values())
    told = f"{len(seen):,} runs, {running:,} of them running. This page follows them."
    head = tag("header", tag("h1", title), tag("p", told, class_="quiet"))
    curves = [figure for name, one in list(seen.items())[:MOST_CURVES] if one.state == "running"
              for figure in _curves(name, one)]  # fmt: skip
    parts = [
        part("Runs", _table(seen), count=len(seen)),
        part("Running now", tag("div", *curves, class_="panels")) if curves else None,
        part("Warnings", notes(why), count=len(why)) if why else None,
    ]
    return document(title, head, parts, live=Live(mark))


def address(name: str) -> str:
    return f"run/{quote(name, safe='')}/"


def _curves(name: str, seen: Followed) -> Iterator[Html]:
    for metric in CURVES:
        if any(curve := curve_of(seen.run.metrics, metric)):
            yield panel(f"{name}: {PANELS[metric].lower()}", curve)


def _table(seen: Mapping[str, Followed]) -> Html:
    rows = [tag("tr", *(tag("td", cell) for cell in _cells(name, one))) for name, one in seen.items()]
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in HEAD)))
    whole = tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll runs")
    words = small("The topmost that is ticked is what the others are compared with; at most six.")
    go = tag("p", tag("button", "Compare the ticked runs", type="submit"))
    return tag("form", whole, *([go, words] if len(seen) > 1 else []), action="compare", method="get")


def _cells(name: str, seen: Followed) -> Iterator[str]:
    run = seen.run
    yield tag("input", type="checkbox", name="run", value=name, aria_label=f"compare {name}")
    yield tag("a", name, href=address(name))
    yield seen.state
    yield f"{seen.step:,} of {UNKNOWN if seen.planned is None else f'{seen.planned:,}'}"
    yield UNKNOWN if seen.seconds_left is None else duration(seen.seconds_left)
    yield str(run.setting("method", "name") or UNKNOWN)
    ends = [f"{dataset} {score(history[-1][1].avg.value)}" for dataset, history in run.history.items()]
    yield ", ".join(ends) or UNKNOWN
    found = warnings(run, [seen.damage] if seen.damage else [])
    yield tag("span", f"{len(found):,}", title=found[0], class_="flag") if found else "0"
