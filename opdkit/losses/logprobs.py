"""Log-probabilities from logits: always in fp32, or in fp64 when given fp64.

bf16 log-probabilities are wrong by more than a typical per-token training signal (about 3e-3 nats). Letters: n tokens,
V vocabulary, K chosen entries, W members of each of G groups of columns, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOPK_GROUP = 4  # columns


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything behind the head's matrix product: fp64 for fp64, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a head's matrix product takes in, for hidden states of `dtype`; its output is always in `math_dtype`.

    An accelerator multiplies bf16 numbers and adds them up in fp32. A CPU has no such product; that of fp32 numbers is
    as exact, and where bf16 has no instructions of its own it is also the faster one.
    """
    return math_dtype(dtype) if device.type == "cpu" else dtype


def log_softmax(logits_nV: Tensor) -> Tensor:
    """[n, V] log-probabilities in nats, in `math_dtype`."""
    return torch.log_softmax(logits_nV, dim=-1, dtype=math_dtype(logits_nV.dtype))


def distribution_(logits_nV: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """([n, V] log-probabilities in nats, [n, V] probabilities) of logits in `math_dtype`, without gradient; the former
    are written over the logits and the latter into `out`: fresh memory is dear (`memory.py`).

    As exact as `log_softmax` and its exponential, in half the time on a CPU: softmax's is the only exponential taken,
    and the normaliser is read off the likeliest entry, log p = z - (max z - log max p).
    """
    prob_nV = torch.softmax(logits_nV, -1, out=out)
    log_norm_n1 = logits_nV.amax(-1, keepdim=True) - prob_nV.amax(-1, keepdim=True).log()
    return logits_nV.sub_(log_norm_n1), prob_nV


@dataclass(frozen=True, slots=True)
class Implicit:
    """[n, V] log-probabilities that are nowhere written: the plain output of a head, what makes logits of it (in rising
    order), and their normaliser. Stands in for the array where a support chooses and reads its entries."""

    output_nV: Tensor
    logits: Callable[[Tensor], Tensor]
    log_norm_n1: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.output_nV.shape

    def detach(self) -> Implicit:
        return self

    def gather(self, dim: int, ids_nE: Tensor) -> Tensor:
        return self.logits(self.output_nV.gather(dim, ids_nE)) - self.log_norm_n1


def gather(logprob_nV: Tensor | Implicit, ids: Tensor) -> Tensor:
    """Log-probabilities of ids [n] or [n, K]; the result has the shape of ids."""
    return logprob_nV.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if ids.dim() == 1 else logprob_nV.gather(-1, ids)


def topk(logprob_nV: Tensor | Implicit, k: int, *, sort: bool = True) -> tuple[Tensor, Tensor]:
    """(logprob_nK, ids_nK) of the k likeliest entries, in falling order if `sort`. Exact; equals come in any order.

    The k best entries lie in the k groups of columns whose best is highest, which are themselves a top-k of a row one
    `TOPK_GROUP`-th as long: several times faster than torch's search through the whole row.
    """
    if isinstance(logprob_nV, Implicit):
        ids_nK = topk(logprob_nV.output_nV, k, sort=sort)[1]
        return logprob_nV.gather(-1, ids_nK), ids_nK
    num_groups = logprob_nV.shape[-1] // TOPK_GROUP
    if k * 4 > num_groups:
        return tuple(logprob_nV.topk(k, dim=-1, sorted=sort))
    first_of_rest, num_tokens, device = num_groups * TOPK_GROUP, logprob_nV.shape[-1], logprob_nV.device
    best_nG = logprob_nV[:, :first_of_rest].unflatten(-1, (TOPK_GROUP, num_groups)).amax(1)
    group_nK = topk(best_nG, k, sort=False)[1]
    member_W1 = torch.arange(0, first_of_rest, num_groups, device=device).unsqueeze(-1)
    rest_C = torch.arange(first_of_rest, num_tokens, device=device)
    ids_nC = torch.cat([(group_nK.unsqueeze(1) + member_W1).flatten(1), rest_C.expand(len(group_nK), -1)], -1)
    logprob_nK, position_nK = logprob_nV.gather(-1, ids_nC).topk(k, dim=-1, sorted=sort)
    return logprob_nK, ids_nC.gather(-1, position_nK)


def entropy(logprob_nV: Tensor, prob_nV: Tensor) -> Tensor:
    """[n] entropy in nats, from log-probabilities and the same distribution's probabilities."""
    return -torch.linalg.vecdot(prob_nV, logprob_nV)
