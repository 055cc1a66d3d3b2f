"""What a run runs on: versions, hardware, commit. No environment variable, path, user or host name: it is shared."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import opdkit

PACKAGES = (
    "opdkit", "torch", "transformers", "tokenizers", "peft", "datasets", "numpy", "pyarrow", "math-verify", "vllm",
)  # fmt: skip


def describe_environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """{"time", "versions", "hardware", "commit"}, ready for JSON. What cannot be found out is None.

    devices: that the run is on ("cpu", "cuda:1"); of the cards only these are the run's.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": _hardware(devices),
        "commit": _commit(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What moves a number's last bits and is another one than in an earlier description, a sentence each."""
    said = []
    if (was := before.get("ranks", 1)) != (are := now.get("ranks", 1)):
        said.append(
            f"the run had {was} ranks when it was last written, and has {are}: sums are taken in another order, so "
            "from here on the last bits, and with them now and then a sampled token, may differ"
        )
    for what, keys in (("versions", ("python", *PACKAGES)), ("hardware", ("cpu", "torch_threads", "gpus", "cuda"))):
        old, new = before.get(what), now.get(what)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        said += [
            f"{key} was {_told(old.get(key))} when this run was last written, is {_told(new.get(key))}: numbers "
            "from here on may differ from those of an uninterrupted run"
            for key in keys
            if old.get(key) != new.get(key)
        ]
    return said


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(gpu.get("name")) for gpu in value if isinstance(gpu, Mapping)) or "none"
    return "not installed" if value is None else str(value)


def _version(package: str) -> str | None:
    if package == "opdkit":  # of the code that runs: an installation's record may be of an older one
        return opdkit.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware(devices: Sequence[str]) -> dict[str, Any]:
    import torch

    cards = [torch.device(name) for name in dict.fromkeys(devices) if name.startswith("cuda")]
    gpus = [torch.cuda.get_device_properties(card) for card in cards]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 1)


def _cpu_name() -> str | None:
    """The model name; `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _commit() -> dict[str, Any] | None:
    """The commit of opdkit itself, if it runs from its repository (not one that merely surrounds an installed copy)."""
    folder = Path(opdkit.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return None if commit is None else {"id": commit, "changed": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
