"""Other tensors in the place of a module's parameters, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Slot = tuple[nn.Module, str, Tensor]  # the submodule that holds a parameter, the parameter's name there, its stand-in


def slots(module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Slot, ...]:
    """Where each stand-in goes. A tied parameter has several places under one name, and goes to all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    slots = []
    for name, tensor in weights.items():
        parameter = module.get_parameter(name)  # raises AttributeError for a name the module does not have
        if tensor.shape != parameter.shape:
            raise ValueError(f"weights[{name!r}] has shape {tuple(tensor.shape)}, the module {tuple(parameter.shape)}")
        for alias in names[id(parameter)]:
            owner, _, leaf = alias.rpartition(".")
            slots.append((module.get_submodule(owner), leaf, tensor))
    return tuple(slots)


@contextmanager
def swapped(slots: tuple[Slot, ...]) -> Iterator[None]:
    originals = [(owner, leaf, owner._parameters[leaf]) for owner, leaf, _ in slots]
    try:
        for owner, leaf, tensor in slots:
            owner._parameters[leaf] = tensor  # a stand-in need not be a leaf
        yield
    finally:
        for owner, leaf, parameter in originals:
            owner._parameters[leaf] = parameter
