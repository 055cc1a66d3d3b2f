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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opdkit.engines.model import LanguageModel
from opdkit.engines.prove import EXACT, LOW_OTHER_PASS, close, proof_hidden
from opdkit.errors import UserError
from opdkit.ranks.group import Group

M = TypeVar("M", bound=LanguageModel)


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
    ) -> None:
        """layers: by their names in the whole module; they go to the mesh's device one at a time. reads: what a layer
        is gathered as; None: as it is kept."""
        self._group, self._layers = group, list(layers.values())
        own = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        policy = MixedPrecisionPolicy(
            param_dtype=reads, reduce_dtype=None if reads is None else torch.float32, cast_forward_inputs=False
        )
        for layer in self._layers:
            unit: Any = fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            # Sums, not means; each of these is of one unit and not of what is below it.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            unit.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank went to
        outside = {parameter for parameter in body.parameters() if id(parameter) not in own}
        self._root: Any = fully_shard(body, mesh=mesh, mp_policy=policy, ignored_params=outside)
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


def load_in_parts(
    load: Callable[[], M], group: Group, *, device: torch.device, reads: Callable[[M], torch.dtype | None]
) -> M:
    """What `load` gives in host memory, with its layers in parts from now on, and all of it on the device; proved by a
    pass. The ranks of a machine load one after another: there is one whole model in its memory.

    reads: what layers are gathered as, where that is not what they are kept in. Raises UserError for a model whose
    layers cannot be told apart, or that is read otherwise in parts.
    """
    mesh = init_device_mesh(device.type, (group.size,))
    model: M | None = None
    for turn in range(group.local_size):
        if turn == group.local_rank:
            model = load()
            as_read, before_NH = reads(model), _sharded(model, group, mesh, device, reads(model))
        group.wait()
    assert model is not None
    outside = {n: p for n, p in model.module.named_parameters() if model.shards is not None and n not in model.shards}
    with torch.no_grad(), model.using({n: p if as_read is None else p.to(as_read) for n, p in outside.items()}):
        after_NH = proof_hidden(model).to(before_NH.device)
    model.positions.clear()
    is_exact = before_NH.dtype == after_NH.dtype and after_NH.dtype in (torch.float32, torch.float64)
    if not close(after_NH, before_NH, EXACT if is_exact else LOW_OTHER_PASS):
        raise UserError(
            f'{model.name} gives other states when its layers are kept in parts; use parallel.strategy = "gathered", '
            'and for a teacher placement = "resident"'
        )
    return model


@torch.no_grad()
def _sharded(
    model: LanguageModel, group: Group, mesh: DeviceMesh, device: torch.device, reads: torch.dtype | None
) -> Tensor:
    """Cut here, without any other rank; returns the states of the proof before, [N, H]."""
    if model.switch_length is not None:
        raise UserError(
            f"{model.name} has other position factors from {model.switch_length} tokens on, so a row may take two "
            'passes, and ranks that keep layers in parts make equally many; use parallel.strategy = "gathered", and '
            'for a teacher placement = "resident"'
        )
    model.prove_packed()
    layers, before_NH = _layers_of(model), proof_hidden(model)
    model.shards = Shards(model.body, layers, group, mesh=mesh, reads=reads)
    for name, parameter in model.module.named_parameters():
        if name not in model.shards:
            parameter.data = parameter.data.to(device)
    return before_NH


def _layers_of(model: LanguageModel) -> dict[str, nn.Module]:
    """The decoder layers by their names in the whole module."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inside = {id(module) for module in model.body.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.module.named_modules():
        is_below = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and id(module) in inside and not is_below:
            found[name] = module
    places: dict[int, str] = {}
    shared = not found
    for name, layer in found.items():
        for parameter in layer.parameters():
            shared = shared or places.setdefault(id(parameter), name) != name
    if shared:
        raise UserError(
            f"{model.name} has no decoder layers of their own that ranks could keep in parts; use parallel.strategy = "
            '"gathered", and for a teacher placement = "resident"'
        )
    return found


def _local(kept: Tensor) -> Tensor:
    assert isinstance(kept, DTensor)
    part: Tensor = kept.to_local().detach()
    return part
