"""How much a device's memory holds, and what is said when it does not.

Nothing here moves an answer: a batch of another size moves the last bits of a matrix product and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opdkit.engines.causal import CausalModel
from opdkit.engines.sampling.decode import Batch
from opdkit.errors import UserError

TOKENS_PER_BATCH = 65536  # that go through a model together, where nobody says otherwise
CACHE_SHARE = 0.5  # of memory without a tensor for the keys and values of a batch that is sampled; its passes need some


def cached_tokens(model: CausalModel) -> int:
    """Of how many tokens a batch that is sampled may hold keys and values: `TOKENS_PER_BATCH`, and on CUDA more if half
    of what the card has beside our tensors holds more. A power of two of it, so that a few MiB more or less plan the
    same batches, and not what is free: other processes and unused blocks plan nothing."""
    if model.device.type != "cuda":
        return TOKENS_PER_BATCH
    size = torch.cuda.get_device_properties(model.device).total_memory
    unused = size - torch.cuda.memory_allocated(model.device)
    return tokens_in(int(unused * CACHE_SHARE), bytes_per_token(model))


def tokens_in(num_bytes: int, bytes_per_token: int) -> int:
    """`TOKENS_PER_BATCH` times the largest power of two that still fits; at least that itself."""
    times = num_bytes // max(1, bytes_per_token) // TOKENS_PER_BATCH
    return TOKENS_PER_BATCH << max(0, times.bit_length() - 1)


@torch.no_grad()
def bytes_per_token(model: CausalModel) -> int:
    """Of keys and values, measured on two tokens: no config says it of every architecture."""
    with model.evaluating():
        return Batch.of(model, [[model.pad_id] * 3], 3, [2]).bytes_per_token


@contextmanager
def enough_memory(what: str, way_out: str) -> Iterator[None]:
    """Raises UserError where a device has no memory left inside the block. way_out: the settings that would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        reason = f" ({asked[0]})" if asked else ""
        raise UserError(
            f"out of memory while {what}{reason}: {way_out}. What is saved stays, and the same command (of a run: "
            "with --resume) goes on from it."
        ) from error


# Allocators and libraries that have no exception of their own.
_SAID = ("DefaultCPUAllocator: ", "can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_memory or any(said in str(error) for said in _SAID)
