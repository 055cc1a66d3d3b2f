"""Log-probabilities from logits: always in fp32, or in fp64 when given fp64.

bf16 log-probabilities are wrong by more than a typical per-token training signal (about 3e-3 nats). Letters: n tokens,
V vocabulary, K chosen entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything behind the head's matrix product: fp64 for fp64, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_softmax(logits_nV: Tensor) -> Tensor:
    """[n, V] log-probabilities in nats, in `math_dtype`."""
    return torch.log_softmax(logits_nV, dim=-1, dtype=math_dtype(logits_nV.dtype))


def gather(logprob_nV: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of ids [n] or [n, K]; the result has the shape of ids."""
    return logprob_nV.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if ids.dim() == 1 else logprob_nV.gather(-1, ids)


def entropy(logprob_nV: Tensor, prob_nV: Tensor) -> Tensor:
    """[n] entropy in nats, from log-probabilities and the same distribution's probabilities."""
    return -torch.linalg.vecdot(prob_nV, logprob_nV)
