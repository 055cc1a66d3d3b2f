"""How a model comes to be in parts (`shards.py`): loaded, cut and proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opdkit.engines.model import LanguageModel
from opdkit.engines.prove import EXACT, LOW_OTHER_PASS, close, proof_hidden
from opdkit.engines.shards import Shards
from opdkit.errors import UserError
from opdkit.ranks.group import Group

M = TypeVar("M", bound=LanguageModel)


def load_in_parts(
    load: Callable[[], M],
    group: Group,
    *,
    device: torch.device,
    reads: Callable[[M], torch.dtype | None] = lambda model: None,
    num_parts: int | None = None,
    offload: bool = False,
) -> M:
    """What `load` gives in host memory, with its layers in parts from now on, and all of it on the device; proved by a
    pass. The ranks of a machine load one after another: there is one whole model in its memory.

    reads: what layers are gathered as, where that is not what they are kept in. num_parts: of a copy of the layers, of
    which there may be several; None: as many as ranks. offload: see `Shards`. Raises UserError for a model whose
    layers cannot be told apart, or that is read otherwise in parts.
    """
    num_copies = group.size // (num_parts or group.size)
    shape = (group.size,) if num_copies == 1 else (num_copies, group.size // num_copies)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    model: M | None = None
    for turn in range(max(group.gather(group.local_size))):
        if turn == group.local_rank:
            model = load()
            as_read, before_NH = reads(model), _sharded(model, group, mesh, device, reads(model), offload)
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
    model: LanguageModel,
    group: Group,
    mesh: DeviceMesh,
    device: torch.device,
    reads: torch.dtype | None,
    offload: bool,
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
    model.shards = Shards(model.body, layers, group, mesh=mesh, reads=reads, offload=offload)
    model.notes.append(
        f"{model.name}: {model.shards.num_parts} ranks keep a part of each of its {len(layers)} layers"
        + (", in host memory" if offload else "")
    )
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
