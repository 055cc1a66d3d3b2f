"""environment.json: what a reader needs to judge a number, and nothing secret (no environment variables, no user)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "pyarrow", "math-verify")


def environment(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """`fingerprints`: data source -> digest of its problems as they were loaded."""
    accelerator = torch.accelerator.is_available()
    return {
        "opdkit": importlib.metadata.version("opdkit"),
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if accelerator else [],
        "data": dict(fingerprints),
    }


def _commit() -> str | None:
    """Of the checkout opdkit is imported from; None where it is installed as a package."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
