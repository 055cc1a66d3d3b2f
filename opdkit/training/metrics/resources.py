"""What a step costs: seconds of its parts, positions that models computed in them, and memory at its peak."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from opdkit.engines.model import LanguageModel
from opdkit.metrics import Metric


class Resources:
    """Measures from its making on, one step long.

    memory/peak_gib is of this step and of tensors alone on CUDA; elsewhere it is the process's largest resident memory
    since it began, and unknown where the system does not say (Windows).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, dict[str, float]()
        self._positions: dict[str, Counter[str]] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def during(self, part: str, models: Callable[[], Iterable[LanguageModel]] = tuple) -> Iterator[None]:
        """Adds the seconds of the block to `time/<part>_s`; on CUDA, until what it started is done. models: those that
        read in it, asked when it is over; what they computed is counted."""
        started = time.monotonic()
        yield
        for model in models():
            self._positions.setdefault(part, Counter()).update(model.positions)
            model.positions.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - started

    def metrics(self) -> list[Metric]:
        seconds = [Metric(f"time/{part}_s", value, "max") for part, value in self._seconds.items()]
        read = [metric for part, count in self._positions.items() if count for metric in _passes(part, count)]
        return [*seconds, *read, Metric("memory/peak_gib", _peak_gib(self._device), "max")]


def _passes(part: str, positions: Counter[str]) -> list[Metric]:
    """Positions that were computed for each that had to be, and the share of all rows' tokens that had to be."""
    return [
        Metric(f"passes/{part}_padding", positions["computed"] / positions["distinct"]),
        Metric(f"passes/{part}_distinct", positions["distinct"] / positions["rows"]),
    ]


def _peak_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
