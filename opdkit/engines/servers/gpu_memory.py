"""Weights that stay where they are: an engine on the trainer's GPU reads them out of the trainer's memory (CUDA IPC).

What goes over the line is a name, a form and CUDA's handles for each tensor; `in_vllm/opdkit_worker.py` reads it. The
tensors must live, unchanged, until the engine has said that it has loaded them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from opdkit.errors import UserError


def gpu_name(device: torch.device) -> str:
    """The GPU's own number, the same in every process; "" for no CUDA GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def layout_of(weights: Mapping[str, Tensor]) -> str:
    """As JSON. Raises UserError where the memory cannot be shared."""
    try:
        return json.dumps({name: _entry(tensor.detach()) for name, tensor in weights.items()}, separators=(",", ":"))
    except RuntimeError as error:
        raise UserError(
            f"the student's weights cannot be shared with the engine on the same GPU ({str(error)[:200]}); unset "
            "PYTORCH_CUDA_ALLOC_CONF if it asks for expandable_segments, or give trainer and engine a GPU each"
        ) from None


def _entry(tensor: Tensor) -> dict[str, object]:
    _, shared = reduce_tensor(tensor)
    _, shape, stride, offset, _, dtype, _, handle, size, start, _, counter, counter_at, event, event_sync = shared
    return {
        "shape": list(shape),
        "stride": list(stride),
        "offset": offset,
        "dtype": str(dtype).removeprefix("torch."),
        "handle": handle.hex(),
        "storage_bytes": size,
        "storage_offset": start,
        "counter": counter.hex(),
        "counter_offset": counter_at,
        "event": event.hex(),
        "event_sync": event_sync,
    }
