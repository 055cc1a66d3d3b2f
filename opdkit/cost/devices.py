"""GPUs by name: what they hold and how fast they are. A vendor's figures; what of them is reached is an assumption."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from opdkit.errors import UserError

GIB = 2**30
FLOPS_REACHED, BANDWIDTH_REACHED = 0.6, 0.8  # of the peak: matrix products of thousands of rows; long reads
LAUNCH_S = 600e-6  # of one layer in one decoding step: about 42 kernels, started one by one from Python
CONTEXT_BYTES, FRAGMENTED = 1 * GIB, 0.04  # what CUDA itself takes; of the rest, what the allocator cannot use


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """flops: {dtype of a product: of it a second}, bandwidth: bytes a second, both as reached; None: speed unknown."""

    name: str
    capacity: int  # bytes
    flops: dict[str, float] | None = None
    bandwidth: float | None = None
    launch_s: float = LAUNCH_S
    is_cpu: bool = False

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return self.capacity if self.is_cpu else int((self.capacity - CONTEXT_BYTES) * (1 - FRAGMENTED))


def _gpu(name: str, gib: int, tflops: float, gb_per_s: float, tflops_32: float) -> Device:
    flops = {"bfloat16": tflops * 1e12 * FLOPS_REACHED, "float32": tflops_32 * 1e12 * FLOPS_REACHED}
    return Device(name=name, capacity=gib * GIB, flops=flops, bandwidth=gb_per_s * 1e9 * BANDWIDTH_REACHED)


# Dense bfloat16 with sums in float32, and plain float32 (no TF32, as torch has it by default), in TFLOP/s; GB/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("l4", 24, 121, 300, 30),
        _gpu("a10", 24, 125, 600, 31),
        _gpu("rtx3090", 24, 71, 936, 36),
        _gpu("rtx4090", 24, 165, 1008, 83),
        _gpu("rtx5090", 32, 210, 1792, 105),
        _gpu("a100-40", 40, 312, 1555, 19.5),
        _gpu("a6000", 48, 155, 768, 39),
        _gpu("l40s", 48, 362, 864, 92),
        _gpu("a100-80", 80, 312, 2039, 19.5),
        _gpu("h100", 80, 989, 3350, 67),
        _gpu("h200", 140, 989, 4800, 67),
        _gpu("b200", 180, 2250, 8000, 75),
    )
}
_CAPACITY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)", re.IGNORECASE)


def device_named(name: str) -> Device:
    """A GPU of the table, or a capacity alone ("24GB", taken as GiB as vendors mean it). Raises UserError otherwise."""
    key = name.strip().lower()
    if key in GPUS:
        return GPUS[key]
    capacity = _CAPACITY.fullmatch(key)
    if capacity and 1 < float(capacity[1]) <= 2**20:
        return Device(name=f"{float(capacity[1]):g} GiB", capacity=int(float(capacity[1]) * GIB))
    near = difflib.get_close_matches(key, GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--gpu {name[:40]} is no GPU that opdkit knows{hint} (known: {', '.join(GPUS)}); or give its memory alone, "
        "e.g. --gpu 24GB"
    )
