"""Muon, whose iteration a CPU does in float32.

torch's rule rounds to bfloat16 and multiplies so. A CPU without instructions for that takes ten times as long for a
product: 50 ms a step for the 14 matrices of a model of two layers, more than the rest of its update. Here every product
is one in float32, of numbers that are rounded where torch rounds them; so it is torch's rule, but for last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the scale of AdamW's updates, and nesterov."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """closure: as torch's optimizers have it; nobody here gives one."""
        if closure is not None or any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            loss: float | None = super().step(closure)
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return None

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum, lr = self.state[p], group["momentum"], float(group["lr"])
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = orthogonalised(grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Near the orthogonal matrix that is nearest: Newton-Schulz, rounded to bfloat16 after every product."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    begun = matrix.bfloat16()
    begun.div_(begun.norm().clamp(min=eps))
    found = (begun.T if is_tall else begun).float()
    for _ in range(steps):
        gram = _rounded(found @ found.T)
        polynomial = _rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        found = _rounded(torch.addmm(found, polynomial, found, beta=a))
    return found.T if is_tall else found


def _rounded(numbers: Tensor) -> Tensor:
    return numbers.bfloat16().float()
