"""A model whose decoder layers several ranks keep in parts, with torch's `fully_shard`.

    kept        1 / ranks of every layer, in the module's own parameters
    in a pass   one layer or two, gathered as the computation reads them; on the way back their gradients too, which are
                summed into the parts at once
    whole       what is outside the layers (embedding, last norm, head): whoever owns it gathers it

So a pass is made by all ranks together, and all make equally many (`CausalModel.in_step`). Other weights of the same
model (an average, the initial ones) are put into the parts for the length of a block (`holding`), not into the module:
torch would read its own parts all the same, and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opdkit.ranks.group import Group


class Shards:
    """The layers of one model, which are in parts from now on."""

    def __init__(
        self,
        body: nn.Module,
        layers: Mapping[str, nn.Module],
        group: Group,
        *,
        mesh: DeviceMesh,
        reads: torch.dtype | None,
        offload: bool = False,
    ) -> None:
        """layers: by their names in the whole module; they go to the mesh's device one at a time. reads: what a layer
        is gathered as; None: as it is kept. offload: parts and their gradients are in host memory."""
        self._group, self._layers = group, list(layers.values())
        own = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        policy = MixedPrecisionPolicy(
            param_dtype=reads, reduce_dtype=None if reads is None else torch.float32, cast_forward_inputs=False
        )
        how: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        if offload:
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        self.num_parts = mesh.shape[-1]  # neighbouring ranks keep one copy; the next ones the next
        for layer in self._layers:
            unit: Any = fully_shard(layer, reshard_after_forward=True, **how)
            # Sums, not means; each of these is of one unit and not of what is below it.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            if hasattr(unit, "set_reduce_scatter_unused_params"):  # before torch 2.13 each rank must reach every weight
                unit.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank went to
        outside = {parameter for parameter in body.parameters() if id(parameter) not in own}
        self._root: Any = fully_shard(body, ignored_params=outside, **how)
        self._kept: dict[str, nn.Parameter] = {
            f"{name}.{leaf}": parameter
            for name, layer in layers.items()
            for leaf, parameter in layer.named_parameters()
        }

    def __contains__(self, name: str) -> bool:
        """Whether a parameter of the whole module is in parts."""
        return name in self._kept

    def part(self, name: str) -> Tensor:
        """This rank's rows of a parameter, in the memory that passes read."""
        return _local(self._kept[name])

    def gradients(self) -> dict[str, Tensor]:
        """This rank's rows of the sums of all ranks' gradients."""
        return {name: _local(p.grad) for name, p in self._kept.items() if p.grad is not None}

    def zero_grad(self) -> None:
        for parameter in self._kept.values():
            parameter.grad = None

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self._group.gather(number))

    @contextmanager
    def holding(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the parts hold these numbers, of any type."""
        for name, part in parts.items():
            if part.shape != self.part(name).shape:
                own = tuple(self.part(name).shape)
                raise ValueError(f"weights[{name!r}] has shape {tuple(part.shape)}, and this rank's part is {own}")
        before = {name: self.part(name).clone() for name in parts}
        try:
            self._hold(parts)
            yield
        finally:
            self._hold(before)

    @torch.no_grad()
    def _hold(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            self.part(name).copy_(part)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every layer is whole on every rank, for passes that each makes as many of as it likes: a
        token of each row at a time, say. Begun by all ranks; without gradients."""
        for layer in self._layers:
            layer.unshard()
        self._root.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self._root.set_reshard_after_forward(True)
            for layer in self._layers:
                layer.reshard()


def _local(kept: Tensor) -> Tensor:
    assert isinstance(kept, DTensor)
    part: Tensor = kept.to_local().detach()
    return part
