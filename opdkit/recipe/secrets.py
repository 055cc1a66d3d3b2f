"""What looks like a secret in a recipe: it would be written into the run's files, its page and its loggers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bxox[abposr]-[\w-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY|--(?:api-key|hf-token)\b"
)
_NAME = re.compile(r"(?:^|[_.])(?:api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_FREE = ("template_kwargs.",)  # keys that a recipe's reader makes up


def secret_faults(keys: Mapping[str, Any]) -> Iterator[str]:
    """keys: dotted key -> value. The values are never said."""
    for key, value in keys.items():
        is_named = any(f".{free}" in f".{key}" for free in _FREE) and _NAME.search(key) and value and value is not True
        if is_named or any(_VALUE.search(text) for text in _texts(value)):
            yield (
                f"{key} holds what looks like a secret, and a recipe is written into the run's files as it is: take it "
                "out, and put it into an environment variable (VLLM_API_KEY, HF_TOKEN, WANDB_API_KEY)"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
