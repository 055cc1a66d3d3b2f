"""Masks and weights become coefficients. This is the only place that divides.

A MASK says whether a token is counted: it changes the denominator. A WEIGHT says how much a token counts: it does not.
A COEFFICIENT is both, divided by counts over the whole batch, all micro-batches and all ranks, so that the gradient
does not depend on how the batch was split. Letters: N tokens of the whole batch, R rows (rollouts) of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit.losses.names import Reduction


def token_coefficients(
    mask_N: Tensor,
    weight_N: Tensor | None,
    row_N: Tensor,
    *,
    per: Reduction,
    divide_by: float | None = None,
    domain_N: Tensor | None = None,
    num_domains: int = 1,
    turn_N: Tensor | None = None,
) -> Tensor:
    """[N] float32 (float64 if weight_N is): what each token's loss is multiplied by; 0 where the mask is False.

    mask_N    bool, is the token counted
    weight_N  float, how much; None: 1 for all
    row_N     long, which row (0, 1, ...) the token belongs to
    per       token     sum of weighted losses / number of counted tokens
              sequence  mean over a row's counted tokens, then mean over the rows that have any
              turn      mean over a turn's counted tokens, then over the turns of a row that have any, then over rows
              sequence_sum  sum over a row's counted tokens, then mean over the rows that have any
              sum       plain sum
              constant  sum / `divide_by`, a number fixed in advance (Dr. GRPO, arXiv:2503.20783)
    domain_N  long, which of `num_domains` the token is of: every domain has a mean of its own,
              and the whole is the mean of those of the domains that have a counted token. None: one domain
    turn_N    long, which turn of its row the token belongs to (per = "turn"); None: all rows have one turn

    All zeros if nothing is counted anywhere. Raises ValueError if `divide_by` is missing or given without use.
    """
    if (divide_by is not None) != (per == "constant"):
        raise ValueError(f"divide_by = {divide_by} with per = {per!r}: it belongs to per = 'constant', and only there")
    if domain_N is not None:
        if per in ("sum", "constant"):
            raise ValueError(f"per = {per!r} divides by no count, so no domain can have one of its own")
        own = [domain_N == domain for domain in range(num_domains)]
        num_counted = sum((mask_N & own_N).any().long() for own_N in own)
        means = [token_coefficients(mask_N & own_N, weight_N, row_N, per=per, turn_N=turn_N) for own_N in own]
        return torch.stack(means).sum(0) / torch.as_tensor(num_counted).clamp(min=1)
    weight_N = torch.ones_like(mask_N, dtype=torch.float32) if weight_N is None else weight_N
    if mask_N.dtype != torch.bool or not mask_N.shape == weight_N.shape == row_N.shape:
        raise ValueError(
            f"mask_N ({mask_N.dtype}, {tuple(mask_N.shape)}) must be bool and as long as weight_N "
            f"{tuple(weight_N.shape)} and row_N {tuple(row_N.shape)}"
        )
    counted_N = torch.where(mask_N, weight_N, 0.0)
    if per == "sum":
        return counted_N
    if per == "constant":
        assert divide_by is not None
        if not divide_by > 0:
            raise ValueError(f"divide_by = {divide_by} must be above 0")
        return counted_N / divide_by
    if per == "token":
        return counted_N / mask_N.sum().clamp(min=1)
    if per == "turn":
        unit_N = units(row_N, torch.zeros_like(row_N) if turn_N is None else turn_N)
        tokens_U = torch.bincount(unit_N[mask_N], minlength=int(unit_N.max()) + 1 if unit_N.numel() else 0)
        row_U = torch.zeros_like(tokens_U).index_copy_(0, unit_N, row_N)
        turns_R = torch.bincount(row_U[tokens_U > 0], minlength=int(row_N.max()) + 1 if row_N.numel() else 0)
        num_counted_rows = (turns_R > 0).sum().clamp(min=1)
        return counted_N / (tokens_U[unit_N].clamp(min=1) * turns_R[row_N].clamp(min=1) * num_counted_rows)
    if per in ("sequence", "sequence_sum"):
        num_rows = int(row_N.max()) + 1 if row_N.numel() else 0
        tokens_R = torch.bincount(row_N[mask_N], minlength=num_rows)
        num_counted_rows = (tokens_R > 0).sum().clamp(min=1)
        if per == "sequence_sum":
            return counted_N / num_counted_rows
        return counted_N / (tokens_R[row_N].clamp(min=1) * num_counted_rows)
    raise ValueError(f"per = {per!r} is not one of token, sequence, turn, sequence_sum, sum, constant")


def units(row_N: Tensor, turn_N: Tensor) -> Tensor:
    """[N] long: which of the batch's turns each token is of, 0, 1, ... in the order of rows and turns."""
    most = int(turn_N.max()) + 1 if turn_N.numel() else 1
    return torch.unique(row_N * most + turn_N, return_inverse=True)[1]
