"""Several ranks, as a process group of `torch.distributed`: gloo between CPUs, NCCL between GPUs.

Objects are pickled by torch, between processes of one run and nobody else's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opdkit.ranks.base import MOST_SAID, RankLost, Ranks, heard

T = TypeVar("T")

# torch 2.13 renames both, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group(Ranks):
    """The default process group, which is there already (`join.py`)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # torchrun sets both, and so does the launcher.
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def gather(self, mine: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _answering():
            dist.all_gather_object(found, mine)
        return found

    def gather_on_first(self, mine: T) -> list[T]:
        found: list[Any] | None = [None] * self.size if self.is_first else None
        with _answering():
            dist.gather_object(mine, found, dst=0)
        return found or []

    def from_first(self, make: Callable[[], T]) -> T:
        said: list[Any] = [None, None]
        failed: Exception | None = None
        if self.is_first:
            try:
                said[0] = make()
            except Exception as error:
                failed, said[1] = error, heard(error, 0)
        try:
            with _answering():
                dist.broadcast_object_list(said, src=0)
        except RankLost:
            if failed is None:
                raise
        if failed is not None:
            raise failed
        if said[1] is not None:
            raise said[1]
        return said[0]

    def wait(self) -> None:
        with _answering():
            dist.barrier()

    @contextmanager
    def hearing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(name in str(error) for name in ("gloo", "NCCL")):
                raise
            raise _lost(error) from error

    # Tensors, in place. Every rank's shard of a matrix is equally large: the last rows may be padding.

    def gather_rows(self, whole: Tensor, own: Tensor) -> None:
        """whole: [size * rows, ...], own: [rows, ...] of each rank."""
        with _answering():
            _all_gather(whole, own)

    def sum_rows(self, own: Tensor, whole: Tensor) -> None:
        """own: this rank's rows of the sum of all ranks' `whole`."""
        with _answering():
            _reduce_scatter(own, whole)

    def send_from(self, rank: int, tensor: Tensor) -> None:
        with _answering():
            dist.broadcast(tensor, src=rank)

    def sum_on(self, rank: int, tensor: Tensor) -> None:
        with _answering():
            dist.reduce(tensor, dst=rank)

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Sums of float64 numbers, the same to the bit on all ranks."""
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        with _answering():
            dist.all_reduce(summed)
        return list(summed.tolist())


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL: a closed connection, or no answer within the group's timeout
        raise _lost(error) from error


def _lost(error: RuntimeError) -> RankLost:
    return RankLost(" ".join(str(error).split())[:MOST_SAID])
