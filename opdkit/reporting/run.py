"""What a run folder holds, read for the report. What is missing or damaged is a sentence in `RunContents.missing`.

Public files only (`opdkit.run.folder`): recipe.toml, environment.json, metrics.jsonl, rows/, eval/, summary.json.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from opdkit.errors import UserError
from opdkit.metric_lines import WentBack, of_steps, went_back
from opdkit.reporting.files import MetricLines, checked, writer_lives
from opdkit.reporting.html.numbers import known
from opdkit.run.rows import load_rows
from opdkit.run.sums import changed
from opdkit.types import Example

T = TypeVar("T")
MOST_BYTES = 64 << 20  # of a recipe, a summary, an evaluation
MOST_ROW_BYTES = 8 << 30
Kind = Literal["before", "after", "best", "arm", "teacher"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems with its 95 % interval. None: unknown."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model on one dataset."""

    problems: int
    samples: int
    avg: Interval
    passes: Mapping[int, Interval]  # k -> pass@k
    maj: Interval
    counts: Mapping[str, float]  # num_answers, num_truncated, ..., as far as they were saved


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the headline figure."""

    label: str
    kind: Kind
    measured: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContents:
    folder: Path
    name: str
    recipe_text: str | None
    recipe: Mapping[str, Any]  # empty when recipe.toml is missing
    environment: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]  # the steps' lines of metrics.jsonl; its evaluations are read from eval/
    went_back: Sequence[WentBack]  # to checkpoints; of the steps taken again, `metrics` has the last try
    summary: Mapping[str, Any] | None
    headline: Mapping[str, Sequence[Entry]]  # dataset -> entries
    history: Mapping[str, Sequence[tuple[int, Measured]]]  # dataset -> (step, student), oldest first
    rows_step: int | None
    rows: Sequence[Example]
    missing: Sequence[str]  # what the report cannot show, one sentence each

    def setting(self, section: str, key: str) -> Any:
        """recipe[section][key]; None where either is missing."""
        content = self.recipe.get(section)
        return content.get(key) if isinstance(content, Mapping) else None


def read_run(folder: Path) -> RunContents:
    """Raises UserError only if `folder` holds nothing of a run."""
    missing: list[str] = []
    metrics = _piece(folder / "metrics.jsonl", lambda path: _metrics(path, missing), missing, "there are no curves")
    missing += [f"{sentence}." for sentence in changed(folder)]
    run = _read(folder, metrics or [], *_last_rows(folder / "rows", missing), missing)
    if not (run.recipe_text or metrics or run.summary or run.history or run.rows_step is not None):
        why = (
            "it holds no recipe.toml, metrics.jsonl, summary.json, eval/ or rows/"
            if folder.is_dir()
            else ("it is a file" if folder.exists() else "there is nothing at this path")
        )
        raise UserError(f"{folder} is not a run folder: {why}")
    return run


def _metrics(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The lines that can be read; of others, that they are there."""
    found = MetricLines(checked(path))
    found.read()
    if damage := found.damage(ended=not writer_lives(path.parent)):
        missing.append(damage)
    return found.lines


def read_progress(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> RunContents:
    """What a run has written so far, without its rows. metrics: the lines of metrics.jsonl, as far as they are read."""
    return _read(folder, metrics, None, (), [])


def _read(
    folder: Path,
    metrics: Sequence[Mapping[str, Any]],
    rows_step: int | None,
    rows: Sequence[Example],
    missing: list[str],
) -> RunContents:
    recipe_text = _piece(folder / "recipe.toml", _text, missing, "the recipe cannot be shown")
    recipe = _piece(folder / "recipe.toml", _toml, [], "") or {}
    environment = _piece(folder / "environment.json", _json, missing, "versions and hardware are unknown")
    summary = _piece(folder / "summary.json", _json, missing, "the run has not finished")
    evaluations = _evaluations(folder / "eval", missing)
    headline: Mapping[str, Sequence[Entry]] = {}
    try:
        headline = headline_of(summary) if summary else _headline_so_far(evaluations)
    except UserError as error:
        missing.append(f"{error}.")
    if not headline:
        missing.append("Nothing was evaluated, so there is no accuracy to show; set eval.data in the recipe.")
    return RunContents(
        folder=folder,
        name=str((summary or recipe).get("name", folder.name)),
        recipe_text=recipe_text,
        recipe=recipe,
        environment=environment,
        metrics=of_steps(metrics),
        went_back=went_back(metrics),
        summary=summary,
        headline=headline,
        history=_history(evaluations),
        rows_step=rows_step,
        rows=rows,
        missing=missing,
    )


def headline_of(summary: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """Dataset -> before, after, arms, teacher. Raises UserError for a summary that is not of the public form."""
    try:
        results: list[tuple[str, Kind, Mapping[str, Any] | None]] = [
            ("Student before", "before", summary["eval"]["student_before"]),
            (f"Student after {summary['method']}", "after", summary["eval"]["student_after"]),
            *_best(summary),
            *((arm["label"], "arm", arm["eval"]) for arm in summary.get("arms", {}).values()),
            ("Teacher", "teacher", summary["eval"]["teacher"]),
        ]
        return _by_dataset(results)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"summary.json is not of the form this opdkit writes ({error!r})") from None


def _headline_so_far(evaluations: Mapping[int | str, Mapping[str, Any]]) -> dict[str, list[Entry]]:
    """For a run without a summary: the first and the last evaluation of the student."""
    steps = sorted(key for key in evaluations if isinstance(key, int))
    results: list[tuple[str, Kind, Mapping[str, Any] | None]] = []
    if steps:
        results.append((f"Student at step {steps[0]}", "before", evaluations[steps[0]]))
    if len(steps) > 1:
        results.append((f"Student at step {steps[-1]}", "after", evaluations[steps[-1]]))
    results.append(("Teacher", "teacher", evaluations.get("teacher")))
    return _by_dataset(results)


def _by_dataset(results: Sequence[tuple[str, Kind, Mapping[str, Any] | None]]) -> dict[str, list[Entry]]:
    headline: dict[str, list[Entry]] = {}
    for label, kind, evaluation in results:
        for dataset, values in (evaluation or {}).items():
            headline.setdefault(dataset, []).append(Entry(str(label), kind, measured(values)))
    return headline


def _best(summary: Mapping[str, Any]) -> list[tuple[str, Kind, Mapping[str, Any] | None]]:
    """The step that `train.keep_best` chose, where that is not the last one."""
    best = summary.get("best")
    if not best or best["step"] == summary["steps"]:
        return []
    return [(f"Best, step {best['step']}", "best", best["eval"])]


def measured(values: Mapping[str, Any]) -> Measured:
    """`E` of summary.json. KeyError, TypeError, ValueError or OverflowError if it is something else."""
    return Measured(
        problems=int(values["problems"]),
        samples=int(values["samples"]),
        avg=_interval(values["avg_at_n"]),
        passes={int(k): _interval(estimate) for k, estimate in values["pass_at_k"].items()},
        maj=_interval(values["maj_at_n"]),
        counts={
            name: number
            for name, value in values.items()
            if name.startswith(("num_", "mean_")) and (number := known(value)) is not None
        },
    )


def _interval(estimate: Mapping[str, Any]) -> Interval:
    value, low, high = (None if estimate[key] is None else float(estimate[key]) for key in ("value", "low", "high"))
    if not all(number is None or math.isfinite(number) for number in (value, low, high)):
        raise ValueError(f"an interval is not finite: {dict(estimate)}")
    return Interval(value, low, high)


def _history(evaluations: Mapping[int | str, Mapping[str, Any]]) -> dict[str, list[tuple[int, Measured]]]:
    history: dict[str, list[tuple[int, Measured]]] = {}
    for step in sorted(key for key in evaluations if isinstance(key, int)):
        for dataset, values in evaluations[step].items():
            history.setdefault(dataset, []).append((step, measured(values)))
    return history


def _evaluations(folder: Path, missing: list[str]) -> dict[int | str, Mapping[str, Any]]:
    """Step, or a name such as "teacher" -> dataset -> E."""
    found: dict[int | str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        evaluation = _piece(path, _evaluation, missing, "this evaluation is left out")
        if evaluation is not None:
            match = re.fullmatch(r"step_(\d+)", path.stem)
            found[int(match[1]) if match else path.stem] = evaluation
    return found


def row_files(run_folder: Path) -> dict[int, Path]:
    """Step -> the file of its rows."""
    files = (run_folder / "rows").glob("*.parquet")
    return {int(match[1]): path for path in files if (match := re.fullmatch(r"step_(\d+)", path.stem))}


def _last_rows(folder: Path, missing: list[str]) -> tuple[int | None, Sequence[Example]]:
    steps = row_files(folder.parent)
    if not steps:
        missing.append("No rows were saved, so there are no answers to show; set train.save_rows_every in the recipe.")
        return None, ()
    rows = _piece(steps[max(steps)], _rows, missing, "there are no answers to show")
    return (None, ()) if rows is None else (max(steps), rows)


def _rows(path: Path) -> list[Example]:
    return load_rows(checked(path, MOST_ROW_BYTES))


def _piece(path: Path, read: Callable[[Path], T], missing: list[str], so: str) -> T | None:
    """What `read` makes of the file, or None and a sentence: what is missing, why, and `so` what."""
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not there: {so}.")
    except UserError as error:
        missing.append(f"{error}: {so}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}: {error}): {so}.")
    return None


def _text(path: Path) -> str:
    return checked(path, MOST_BYTES).read_text(encoding="utf-8")


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(_text(path))


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(_text(path))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _evaluation(path: Path) -> dict[str, Any]:
    content = _json(path)
    evaluation = dict(content.get("eval", content))  # {"step", "eval": {dataset: E}}, or the datasets alone
    for values in evaluation.values():
        measured(values)
    return evaluation


def mapping(content: object) -> Mapping[str, Any]:
    """What a file holds where it should hold one; {} for anything else."""
    return content if isinstance(content, Mapping) else {}


def flat(content: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text)."""
    if isinstance(content, Mapping):
        return [
            pair for key, value in content.items() for pair in flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(content, (list, tuple)):
        return [pair for index, value in enumerate(content) for pair in flat(value, f"{prefix}[{index}]")]
    return [
        (prefix, "unknown" if content is None else str(content).lower() if isinstance(content, bool) else str(content))
    ]
