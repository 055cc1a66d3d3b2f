"""What a run has measured so far, as decisions read it: a value of a name at each step or evaluation that has one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from opdkit.metric_lines import EVALUATIONS, SENTINELS, area_of, attempt_of, of_last_attempt

Line = Mapping[str, Any]


class Point(NamedTuple):
    step: int
    value: float


@dataclass(slots=True)
class History:
    """The lines of metrics.jsonl up to now, in order; steps that were taken again have their last values."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)  # of the student
    names: Collection[str] | None = None  # of the metrics that are kept of a step; None: of all

    @classmethod
    def of(cls, lines: Iterable[Line], up_to: int, names: Collection[str] | None = None) -> History:
        """What a run knows that goes on behind the step `up_to`."""
        found = cls(names=names)
        for line in of_last_attempt(lines):
            if line["step"] <= up_to:
                found.add(line)
        return found

    def add(self, line: Line) -> None:
        area = area_of(line)
        if area == EVALUATIONS[0]:
            self.evaluations.append(line)
        elif area not in EVALUATIONS:
            self.steps.append({name: value for name, value in line.items() if self._is_kept(name)})

    def _is_kept(self, name: str) -> bool:
        return self.names is None or name in self.names or "/" not in name or name.startswith(SENTINELS)

    def points(self, name: str) -> list[Point]:
        """Of every line that knows the name: evaluations by "eval/...", else steps."""
        lines = self.evaluations if name.startswith(f"{EVALUATIONS[0]}/") else self.steps
        return [Point(line["step"], float(line[name])) for line in lines if is_known(line, name)]

    def newest(self, name: str, most: int) -> list[float]:
        """The last values that are known, in order."""
        lines = self.evaluations if name.startswith(f"{EVALUATIONS[0]}/") else self.steps
        known = (float(line[name]) for line in reversed(lines) if is_known(line, name))
        return [*islice(known, most)][::-1]

    @property
    def num_rollbacks(self) -> int:
        return attempt_of(self.steps[-1]) - 1 if self.steps else 0

    def first(self, window: int) -> Sequence[Line]:
        return self.steps[:window]

    def last(self, window: int) -> Sequence[Line]:
        return self.steps[-window:]


def values(lines: Iterable[Line], name: str) -> list[float]:
    """Those that are known."""
    return [float(line[name]) for line in lines if is_known(line, name)]


def shares(lines: Iterable[Line], name: str, of: str) -> list[float]:
    """Of one count in another, line by line."""
    known = [line for line in lines if is_known(line, name) and line.get(of)]
    return [float(line[name]) / float(line[of]) for line in known]


def is_known(line: Line, name: str) -> bool:
    """What is not finite is not: metrics.jsonl has null for it."""
    value = line.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
