"""Which devices opdkit runs on: CPU and CUDA. ROCm comes under the name of CUDA, and was never tried; the others are
refused (docs/reference/platforms.md)."""

from __future__ import annotations

import torch

_REFUSED = {
    "mps": "Apple's GPUs have no float64, in which tokens are drawn and norms are added up",
    "xpu": "opdkit was never run on Intel's GPUs, and nothing here shows that its numbers are right there",
}
_OTHER = "opdkit runs on the CPU and on CUDA, and was never run on that"
_KNOWN = ("cpu", "cuda", "meta")  # meta is no device to run on, and is found out by its numbers


def refused(device: torch.device) -> str | None:
    """Why nothing is run on that kind of device; None: it may be tried."""
    return None if device.type in _KNOWN else _REFUSED.get(device.type, _OTHER)


def doubts_of(device: torch.device, *, is_chosen: bool) -> list[str]:
    """What must be said of the device of a run. is_chosen: by opdkit, among those of the machine."""
    if device.type == "cuda" and torch.version.hip is not None:
        return ["this is ROCm, on which opdkit was never run: the proofs made at loading are all that is known of it"]
    there = {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    unused = [kind for kind, is_there in there.items() if is_there]
    if device.type == "cpu" and is_chosen and unused:
        return [f"the run is on the CPU: this machine has {unused[0]}, and {_REFUSED[unused[0]]}"]
    return []
