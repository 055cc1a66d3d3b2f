"""Fresh memory for large arrays.

A process pays for the first touch of every page. On a CPU, in pages of 4 KiB, that costs a large array more than the
arithmetic that fills it; Linux gives pages of 2 MiB to who asks for them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An array of this shape, not filled. A large one on a CPU lies on whole huge pages where the system has some."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    room = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    skipped = -room.data_ptr() % HUGE_PAGE
    array = room[skipped : skipped + num_bytes]
    # Advice: a system that does not take it gives small pages, as it would have done anyway.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(array.data_ptr()), ctypes.c_size_t(num_bytes), mmap.MADV_HUGEPAGE)
    return array.view(dtype).view(shape)


def cast(array: Tensor, dtype: torch.dtype) -> Tensor:
    """`array` in another dtype; itself if it has that one. Not for autograd."""
    return array if array.dtype == dtype else empty(array.shape, dtype, array.device).copy_(array)


def at_least(num_rows: int, array: Tensor) -> Tensor:
    """`array`, or if it has fewer rows a new one with so many; what it held is gone."""
    return array if len(array) >= num_rows else empty((num_rows, *array.shape[1:]), array.dtype, array.device)
