"""Numbers of a run, by step: what a metric is, how values of one step become one, and where they are written.

Always to `metrics.jsonl` (a public contract: one line a step, and one for each evaluation); also to TensorBoard, W&B or
Trackio where asked. Each of those is imported inside the one function that wraps it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from opdkit.errors import UserError
from opdkit.metric_lines import EVALUATIONS, cut_after
from opdkit.printable import printable

Reduce = Literal["mean", "sum", "max", "min", "last"]
Values = dict[str, float | None]

_NAME = re.compile(r"[\w.@+-]+(/[\w.@+-]+)+")
_SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """One number. `name` is `area/quantity`; `reduce` says how several of one name in a step become one.

    value None: unknown here. It is left out of the reduction and written as null if nothing else is known.
    """

    name: str
    value: float | None
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"metric name {self.name!r} is not of the form area/quantity")


def reduce_metrics(metrics: Iterable[Metric]) -> Values:
    """One value per name, in order of first appearance. "mean" is the plain mean of the values given."""
    groups: dict[str, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(metric.name, []).append(metric)
    return {name: _reduced(name, group) for name, group in groups.items()}


def _reduced(name: str, group: Sequence[Metric]) -> float | None:
    reductions = {metric.reduce for metric in group}
    if len(reductions) > 1:
        raise ValueError(f"metric {name} is reduced as {' and as '.join(sorted(reductions))}; choose one")
    values = [float(metric.value) for metric in group if metric.value is not None]
    if not values:
        return None
    match group[0].reduce:
        case "mean":
            return sum(values) / len(values)
        case "sum":
            return sum(values)
        case "max":
            return math.nan if any(map(math.isnan, values)) else max(values)
        case "min":
            return math.nan if any(map(math.isnan, values)) else min(values)
        case "last":
            return values[-1]


class Sink(Protocol):
    """Somewhere beside `metrics.jsonl` that values go. Only finite values reach it."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes the metrics of a run: one line a step, and one for each evaluation. A context manager.

    path: `metrics.jsonl`; the sinks put their files beside it.
    sinks: names from `SINKS`, beside the JSONL file that is always written.
    resume_at: the step of the checkpoint the run goes on from, 0 for a new run; attempt: which try at the steps behind
        it this is (`metric_lines`). Lines of that try and later steps, and a last line that a crash cut short, are cut
        off (by one truncation, so a crash here loses nothing either).
    project: of W&B and Trackio; None: as the environment says, else "opdkit".
    config: shown by W&B and Trackio; values of keys that look like secrets are hidden.

    Raises UserError: unknown sink, missing extra (with the pip command), a sink that cannot start, a full disk, a
    broken line in a file to be resumed. A sink that fails later is reported once and counted in
    `metrics/num_sink_failures`; the run goes on.
    """

    def __init__(
        self,
        path: Path,
        *,
        sinks: Sequence[str] = (),
        resume_at: int = 0,
        attempt: int = 1,
        run_name: str = "",
        project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for name in sinks:
            if name not in SINKS:
                raise UserError(_unknown_sink(name))
        self.path = path
        self.sink_failures: dict[str, int] = {}
        is_resumed = path.exists()
        self._attempt = {"attempt": attempt} if attempt > 1 else {}
        self._last_step, self._evaluated = cut_after(path, resume_at, attempt)
        self._file = _open_lines(path)
        start = SinkStart(
            folder=path.parent,
            run_name=run_name or path.parent.name,
            project=project,
            config=_hidden(config or {}),
            resume_at=resume_at if is_resumed else None,
        )
        self._sinks: dict[str, Sink] = {}
        try:
            for name in sinks:
                self._sinks[name] = _open_sink(name, start)
        except BaseException:
            self.close()
            raise

    def write(self, step: int, metrics: Iterable[Metric]) -> Values:
        """Reduce, write one line, pass on to the sinks; returns what was written.

        Infinite and NaN values are written as null and counted in `metrics/num_non_finite`.
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}: one line a step, in order")
        reduced = reduce_metrics(metrics)
        finite = {name: value for name, value in reduced.items() if value is not None and math.isfinite(value)}
        num_non_finite = sum(value is not None and not math.isfinite(value) for value in reduced.values())
        finite["metrics/num_non_finite"] = num_non_finite
        for name, sink in self._sinks.items():
            self._pass_on(name, sink, step, finite)
        finite["metrics/num_sink_failures"] = sum(self.sink_failures.values())
        values: Values = {name: finite.get(name) for name in (*reduced, *finite)}
        self._put(step, values)
        return values

    def write_evaluation(self, step: int, metrics: Sequence[Metric]) -> None:
        """A line of its own: of the student after `step` steps, or of the teacher, which is measured before the first.

        All names are of one area, "eval" or "eval_teacher". A resumed run gives its earlier evaluations again: what has
        its line is not written twice, and what has none (of a run that opdkit 0.1 began) is no longer in time for one.
        """
        (area,) = {metric.name.partition("/")[0] for metric in metrics}
        if area not in EVALUATIONS:
            raise ValueError(f"an evaluation's metrics are eval/... or eval_teacher/..., not {area}/...")
        if step < self._last_step or (step, area) in self._evaluated:
            return
        values = reduce_metrics(metrics)
        known = {name: value for name, value in values.items() if value is not None}
        for name, sink in self._sinks.items():
            self._pass_on(name, sink, step, known)
        self._put(step, values)
        self._evaluated.add((step, area))

    def _put(self, step: int, values: Values) -> None:
        line = (
            json.dumps({"step": step, "time": round(time.time(), 3), **self._attempt, **values}, allow_nan=False) + "\n"
        )
        try:
            rest = line.encode()
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(
                f"cannot write step {step} to {self.path} ({error.strerror}); the lines before it are safe: "
                "free some disk space and run again with --resume"
            ) from error
        self._last_step = step

    def _pass_on(self, name: str, sink: Sink, step: int, values: Mapping[str, float]) -> None:
        try:
            sink.write(step, values)
        except Exception as error:  # a logging service must not end a training run; it is counted and said
            self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.sink_failures[name] = self.sink_failures.get(name, 0) + 1
        if self.sink_failures[name] == 1:
            _log.warning("%s failed and may miss steps; %s has them all (%s)", name, self.path, _safe_words(error))

    def close(self) -> None:
        """Close the file and every sink. Safe to call twice."""
        self._file.close()
        for name in list(self._sinks):
            try:
                self._sinks.pop(name).close()
            except Exception as error:
                self._failed(name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_lines(path: Path) -> FileIO:
    """Unbuffered: a line is in the file when `write` returns, and a full disk is met once, not again at closing."""
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot open {path} for writing ({error.strerror})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkStart:
    """What a sink may use to start."""

    folder: Path
    run_name: str
    project: str | None  # None: as the service's own environment variable says
    config: Mapping[str, Any]
    resume_at: int | None  # None: a new run


class _TensorBoard:
    def __init__(self, start: SinkStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if start.resume_at is None else start.resume_at + 1
        self._writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Online or offline as the environment says (WANDB_MODE, WANDB_PROJECT, ...). A resumed run continues its curve."""

    def __init__(self, start: SinkStart) -> None:
        import wandb

        id_file = start.folder / "wandb_id"
        run_id = id_file.read_text().strip() if start.resume_at is not None and id_file.exists() else None
        self._run = wandb.init(
            project=start.project or os.environ.get("WANDB_PROJECT", "opdkit"),
            name=start.run_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(start.folder),
            config=dict(start.config),
            save_code=False,
        )
        id_file.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, start: SinkStart) -> None:
        import trackio

        self._run = trackio.init(
            project=start.project or os.environ.get("TRACKIO_PROJECT", "opdkit"),
            name=start.run_name,
            config=dict(start.config),
            resume="allow" if start.resume_at is not None else "never",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[SinkStart], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def is_installed(sink: str) -> bool:
    """Whether what a sink of `SINKS` imports is there; it is not imported."""
    return importlib.util.find_spec(sink) is not None


def _open_sink(name: str, start: SinkStart) -> Sink:
    try:
        return SINKS[name](start)
    except ImportError:
        raise UserError(f"metrics cannot go to {name}: it is not installed; pip install 'opdkit[{name}]'") from None
    except Exception as error:  # no key, no network, no disk: said before the first step rather than at every one
        raise UserError(f"{name} could not start ({_safe_words(error)}); repair that or leave {name} out") from error


def _unknown_sink(name: str) -> str:
    near = difflib.get_close_matches(name, SINKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SINKS)}; metrics.jsonl is always written"
    return f"metrics cannot go to {name!r}: there is no such sink; {hint}"


def _hidden(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every value of a key that looks like a secret replaced, at any depth."""
    return {
        name: "(hidden)" if _SECRET_NAME.search(name) and isinstance(value, str) else _hidden_value(value)
        for name, value in config.items()
    }


def _hidden_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _hidden(value)
    return [_hidden_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def _safe_words(error: Exception) -> str:
    """The message of a foreign exception in one line, without any value of a secret environment variable."""
    text = printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "(hidden)")
    return text[:300]
