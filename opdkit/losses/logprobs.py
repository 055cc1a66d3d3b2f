"""Log-probabilities from logits: always in fp32, or in fp64 when given fp64.

bf16 log-probabilities are wrong by more than a typical per-token training signal (about 3e-3 nats). Letters: n tokens,
V vocabulary, K chosen entries, G groups of W neighbouring columns, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOPK_GROUP = 32  # columns


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything behind the head's matrix product: fp64 for fp64, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_softmax(logits_nV: Tensor) -> Tensor:
    """[n, V] log-probabilities in nats, in `math_dtype`."""
    return torch.log_softmax(logits_nV, dim=-1, dtype=math_dtype(logits_nV.dtype))


def gather(logprob_nV: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of ids [n] or [n, K]; the result has the shape of ids."""
    return logprob_nV.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if ids.dim() == 1 else logprob_nV.gather(-1, ids)


def topk(logprob_nV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(logprob_nK, ids_nK) of the k likeliest entries, in falling order. Exact; order among equals is torch's.

    The k best entries lie in the k groups of columns whose best is highest, so only those groups are sorted: several
    times faster than sorting through the whole row.
    """
    num_groups = logprob_nV.shape[-1] // TOPK_GROUP
    if k * 4 > num_groups:
        return tuple(logprob_nV.topk(k, dim=-1))
    grouped_nGW = logprob_nV[:, : num_groups * TOPK_GROUP].unflatten(-1, (num_groups, TOPK_GROUP))
    group_nK = grouped_nGW.amax(-1).topk(k, dim=-1, sorted=False).indices
    ids_nC = (group_nK.unsqueeze(-1) * TOPK_GROUP + torch.arange(TOPK_GROUP, device=group_nK.device)).flatten(1)
    rest_C = torch.arange(num_groups * TOPK_GROUP, logprob_nV.shape[-1], device=group_nK.device)
    ids_nC = torch.cat([ids_nC, rest_C.expand(len(ids_nC), -1)], -1)
    logprob_nK, position_nK = logprob_nV.gather(-1, ids_nC).topk(k, dim=-1)
    return logprob_nK, ids_nC.gather(-1, position_nK)


def entropy(logprob_nV: Tensor, prob_nV: Tensor) -> Tensor:
    """[n] entropy in nats, from log-probabilities and the same distribution's probabilities."""
    return -torch.linalg.vecdot(prob_nV, logprob_nV)
