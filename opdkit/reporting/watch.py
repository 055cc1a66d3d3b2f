"""`opdkit watch`: a run in the terminal, while it is written or after. Every word of a model is made harmless first.

Redrawn in place on a terminal; elsewhere one plain line a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.reporting.decode import tokenizer_decode
from opdkit.reporting.figures.curves import PANELS, curve_of, number
from opdkit.reporting.figures.tokens import Decode
from opdkit.reporting.follow import Followed, Follower, runs_beside
from opdkit.reporting.html.numbers import compact, duration, score
from opdkit.reporting.run import Interval, RunContents, row_files
from opdkit.reporting.sections.warn import warnings
from opdkit.run.console import Console, Line, Table, Terminal, is_live, progress_bar, redrawn, say

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48  # values, each the mean of equally many steps
ANSWER_CHARACTERS, MAX_WARNINGS = 600, 5
_GRID: dict[str, Any] = {"box": None, "padding": (0, 2), "collapse_padding": True, "show_header": False,
                         "show_edge": False, "pad_edge": False}  # fmt: skip
# A line for each of these that the run measures, besides loss and reward, which always come first.
SHOWN = ("train/loss", "rollout/reward", "rollout/answer_tokens", "rollout/share_truncated", "student/entropy",
         "overlap/ratio", "train/grad_norm", "time/tokens_per_s")  # fmt: skip


def watch(folder: Path, console: Console, *, once: bool = False, every_s: float = 1.0) -> None:
    """Show the run until it ends; with `once`, as it is now. A run that is not there yet is waited for.

    Raises UserError for what is not a run folder, and, with `once`, for a run that is not there.
    """
    follower, answers = Follower(folder), Answers(folder)
    if once:
        seen = follower.look()
        if seen.state == "waiting":
            raise UserError(f"there is no run at {folder} yet{_beside(folder)}")
        say(console, *view(seen, answers))
    elif is_live(console):
        _redraw(follower, answers, console, every_s)
    else:
        _lines(follower, console, every_s)


def _redraw(follower: Follower, answers: Answers, console: Console, every_s: float) -> None:
    with redrawn(console) as show:
        while True:
            seen = follower.look()
            show(view(seen, answers))
            if seen.state in ("finished", "stopped"):
                return
            time.sleep(every_s)


def _lines(follower: Follower, console: Console, every_s: float) -> None:
    """One line for every step and evaluation that is new, and one for the end; or until nobody reads on."""
    said: set[str] = set()
    while True:
        seen = follower.look()
        for what, line in _plain(seen):
            if what not in said:
                say(console, line)
                said.add(what)
        if seen.state in ("finished", "stopped") or (isinstance(console, Terminal) and console.closed):
            return
        time.sleep(every_s)


def _plain(seen: Followed) -> Iterator[tuple[str, str]]:
    """(what it is about, the line): a step is said once, though its time left changes while it lasts."""
    if seen.state == "waiting":
        yield "waiting", _waiting(seen.run.folder)
        return
    for line in seen.run.metrics[-1:]:  # of steps that are faster than the looks only the newest is said
        parts = [f"{PANELS[name].lower()} {compact(value)}" for name in SHOWN[:2]
                 if (value := number(line, name)) is not None]  # fmt: skip
        yield f"step {seen.step}", "  ".join([f"{seen.run.name} {_progress(seen)}", *parts])
    yield from ((line, line) for line in _evaluations(seen.run))
    if seen.state != "running":
        yield "end", _status(seen)


def view(seen: Followed, answers: Answers) -> list[Line | Table]:
    """All that is known of the run at one moment."""
    if seen.state == "waiting":
        return [Line(_waiting(seen.run.folder))]
    parts: list[Line | Table] = [Line((_title(seen.run), "bold")), _bar(seen)]
    if seen.run.metrics:
        parts += [Line(), _numbers(seen.run.metrics)]
    if evaluations := list(_evaluations(seen.run)):
        parts += [Line(), *map(Line, evaluations)]
    found = warnings(seen.run, [seen.damage] if seen.damage else [])
    if found:
        more = [f"and {len(found) - MAX_WARNINGS} more"] if len(found) > MAX_WARNINGS else []
        parts += [Line(), *(Line((f"! {each}", "yellow")) for each in found[:MAX_WARNINGS] + more)]
    if answer := answers.newest(seen.run):
        parts += [Line(), *answer]
    return parts


def _title(run: RunContents) -> str:
    method = run.setting("method", "name")
    return run.name if method is None else f"{run.name}  ·  {method}"


def _bar(seen: Followed) -> Table:
    row = Table(**_GRID)
    style = {"stopped": "yellow", "finished": "green"}.get(seen.state, "")
    words = _progress(seen) if seen.state == "running" else f"{_progress(seen)}  {_status(seen)}"
    row.add_row(progress_bar(seen.step, seen.planned or 1, width=30), Line((words, style)))
    return row


def _progress(seen: Followed) -> str:
    steps = f"{seen.step}/{'?' if seen.planned is None else seen.planned}"
    if seen.seconds_left is None:
        return steps
    return f"{steps}  {duration(seen.seconds_left)} left" if seen.seconds_left else f"{steps}  a moment left"


def _status(seen: Followed) -> str:
    if seen.state == "stopped":
        return f"stopped at step {seen.step}; go on with: opdkit train {seen.run.folder}/recipe.toml --resume"
    seconds = number(seen.run.summary or {}, "seconds")
    return "finished" if seconds is None else f"finished, {duration(seconds)} of training"


def _numbers(metrics: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(**_GRID)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(no_wrap=True, overflow="crop")
    for name in SHOWN:
        values = _values(metrics, name)
        known = [value for value in values if value is not None]
        if known:
            table.add_row(Line((PANELS[name], "dim")), compact(known[-1]), Line((sparkline(values), "cyan")))
    return table


def _values(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    return [None if point is None else point.value for point in curve_of(metrics, name)]


def sparkline(values: Sequence[float | None], width: int = SPARK_WIDTH) -> str:
    """From the least to the largest value; a blank where nothing is known. What is 0 throughout is at the bottom, any
    other constant in the middle. More than `width` values are averaged."""
    size = max(1, math.ceil(len(values) / width))
    bins = [[v for v in values[start : start + size] if v is not None] for start in range(0, len(values), size)]
    means = [sum(each) / len(each) if each else None for each in bins]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(BLOCKS) - 1
    flat = top // 2 if low else 0
    return "".join(
        " " if mean is None else BLOCKS[round(top * (mean - low) / span) if span else flat] for mean in means
    )


def _evaluations(run: RunContents) -> Iterator[str]:
    """The newest of the student on each data set, and where it began; the teacher beside it."""
    for dataset, history in run.history.items():
        (first, before), (last, now) = history[0], history[-1]
        since = "" if last == first else f", {score(before.avg.value)} at step {first}"
        teacher = [e.measured for e in run.headline.get(dataset, ()) if e.kind == "teacher"]
        beside = f", teacher {score(teacher[0].avg.value)}" if teacher else ""
        where = f"{dataset}: avg@{now.samples}"
        yield f"step {last}  {where} {score(now.avg.value)}{_interval(now.avg)}{since}{beside}"


def _interval(avg: Interval) -> str:
    return "" if avg.low is None or avg.high is None else f" [{score(avg.low)}, {score(avg.high)}]"


@dataclass(slots=True)
class Answers:
    """The last answer that the run saved, read once for every file of rows."""

    folder: Path
    _shown: list[Line] = field(default_factory=list)
    _step: int | None = None
    _decode: Decode | None = None

    def newest(self, run: RunContents) -> list[Line]:
        files = row_files(self.folder)
        if files and max(files) != self._step:
            self._step = max(files)
            self._decode = self._decode or tokenizer_decode(run)
            self._shown = _last_answer(files[self._step], self._step, self._decode)
        return self._shown


def _last_answer(path: Path, step: int, decode: Decode | None) -> list[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["messages", "answer_ids", "reward", "finish"])
        row = table.slice(table.num_rows - 1).to_pylist()[0]
    except (pa.ArrowException, OSError, IndexError):
        return [Line((f"{path.name} holds no answer that can be read", "dim"))]
    ids = row["answer_ids"]
    text = decode(ids) if decode else f"{len(ids)} tokens; no tokenizer.json to read them with"
    question = dict(row["messages"][-1]).get("content", "") if row["messages"] else ""
    reward = "not graded" if row["reward"] is None else f"reward {compact(row['reward'])}"
    cut = ", cut at the limit" if row["finish"] == "length" else ""
    return [
        Line((f"an answer of step {step}: {reward}{cut}", "dim")),
        *(Line((line, "dim")) for line in _shortened(question, ANSWER_CHARACTERS // 2)),
        *map(Line, _shortened(text, ANSWER_CHARACTERS)),
    ]


def _shortened(text: str, length: int) -> list[str]:
    """The lines of the beginning and the end; a long answer's outcome stands at its end."""
    text = text.strip()
    text = text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
    return text.split("\n")


def _waiting(folder: Path) -> str:
    return f"waiting for a run at {folder}{_beside(folder)} (Ctrl-C to stop)"


def _beside(folder: Path) -> str:
    there = runs_beside(folder)
    return f"; runs there: {', '.join(there[:5])}" if there else ""
