"""The gradients of some answers, by the passes that learn, and what is kept of them to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.losses import Term
from opdkit.losses.spec import NegativeLogLikelihood
from opdkit.training.backward import backward
from opdkit.training.batch import Batch
from opdkit.training.models.lora import EXPERTS
from opdkit.training.models.optimizer import total_norm
from opdkit.training.state import State
from opdkit.types import Example

KEPT, MOST_KEPT = 8, 1 << 20  # parameters whose gradients are kept, and the most numbers of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Of the mean negative log-likelihood of some answers."""

    loss: float
    norm: float
    none: list[str]  # names of trainable parameters without a gradient
    zero: list[str]  # whose gradient is all zeros
    broken: list[str]  # whose gradient is not finite
    empty_experts: dict[str, int]  # fused experts: how many got nothing
    kept: dict[str, Tensor]


def gradients_of(state: State, rows: Sequence[Example]) -> Gradients:
    batch = Batch(rows, state.student.device)
    coef_N = torch.full((batch.num_tokens,), 1 / batch.num_tokens, device=batch.device)
    weights = state.optimizer.weights
    try:
        learned = backward(state, batch, [Term(name="nll", loss=NegativeLogLikelihood(), coef_N=coef_N)])
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        chosen = [*grads][:: max(1, len(grads) // KEPT)]
        return Gradients(
            loss=learned.loss,
            norm=float(total_norm([*grads.values()])) if grads else 0.0,
            none=[name for name in weights if name not in grads],
            zero=[name for name, grad in grads.items() if not grad.any()],
            broken=[name for name, grad in grads.items() if not grad.isfinite().all()],
            empty_experts={
                name: num
                for name, grad in grads.items()
                if is_expert(name) and grad.ndim == 3 and (num := int((~grad.flatten(1).any(1)).sum()))
            },
            kept={name: grads[name].flatten()[:MOST_KEPT].clone() for name in chosen},
        )
    finally:
        state.optimizer.zero_grad()


def is_expert(name: str) -> bool:
    return not set(EXPERTS).isdisjoint(name.split("."))
