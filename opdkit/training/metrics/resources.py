"""What a step costs: seconds of its parts, and memory at its peak."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opdkit.metrics import Metric


class Resources:
    """Measures from its making on, one step long.

    memory/peak_gib is of this step and of tensors alone on CUDA; elsewhere it is the process's largest resident memory
    since it began, and unknown where the system does not say (Windows).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, dict[str, float]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Adds the seconds of the block to `time/<part>_s`; on CUDA, until what it started is done."""
        started = time.monotonic()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - started

    def metrics(self) -> list[Metric]:
        seconds = [Metric(f"time/{part}_s", value, "max") for part, value in self._seconds.items()]
        return [*seconds, Metric("memory/peak_gib", _peak_gib(self._device), "max")]


def _peak_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
