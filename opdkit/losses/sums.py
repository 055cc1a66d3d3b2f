"""What the chunks of one `head_loss` call add up to: gradients, and numbers per token.

Letters: N tokens, n tokens of a chunk or block, V vocabulary, H hidden width, E entries of a support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.errors import UserError
from opdkit.losses import logprobs, memory
from opdkit.losses.heads import Head
from opdkit.losses.inputs import Batch
from opdkit.losses.support import Entries
from opdkit.losses.terms import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """The loss, and what was seen on the way. Everything but `loss` is detached; log-probs and entropy are in nats.

    token_loss         {term name: [N]}, before coefficients
    computed_N         bool, False for tokens that no term counts: no logits were formed for them
    num_empty_support  {term name: counted tokens whose intersection or difference was empty; they score 0}
    unclipped_loss     {term name: [N]}, the token loss before its clip, for terms that clip

    view_sampled_logprob  {view: [N]}, each view's own log-prob of the sampled token; of views that were asked and said

    A per-token number that was not computed is NaN: a token's loss under a term that does not count it, everything of a
    token that was not computed, a view's word on a token that no term asking it counts.
    """

    loss: Tensor
    token_loss: dict[str, Tensor]
    sampled_logprob_N: Tensor
    entropy_N: Tensor
    view_sampled_logprob: dict[str, Tensor]
    computed_N: Tensor
    num_empty_support: dict[str, int]
    unclipped_loss: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ScoredTerm:
    """One term over n tokens: its entries, its value, the closure giving the gradient at the entries, and the value
    before a clip."""

    term: Term
    entries: Entries
    value_n: Tensor
    gradient_nE: Callable[[], Tensor]
    unclipped_n: Tensor | None


@dataclass(frozen=True, slots=True)
class Scored:
    """n tokens, scored by every term that counts them; and what the student says."""

    terms: list[ScoredTerm]
    sampled_n: Tensor  # its log-probability of the sampled token
    entropy_n: Tensor
    view_sampled: dict[str, Tensor]


class Gradients:
    """grad_hidden, and grad_head summed over chunks in fp32 (fp64 for fp64), but where one chunk is all in the dtype
    that is asked for. Only what requires grad is formed."""

    def __init__(self, hidden_NH: Tensor, head: Head, dtype: torch.dtype, num_chunks: int) -> None:
        self.leaves = (hidden_NH, head.weight_VH, head.bias_V)
        wanted = [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in self.leaves]
        self.any_wanted = any(wanted)
        if self.any_wanted and torch.float16 in (hidden_NH.dtype, head.weight_VH.dtype):
            raise UserError("fp16 loses the gradient of unlikely tokens to underflow; train in bfloat16 or float32.")
        dtype = logprobs.math_dtype(dtype)
        self.hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
        self.weight_VH = None
        if wanted[1]:
            self.weight_VH = memory.empty(
                head.weight_VH.shape, head.weight_VH.dtype if num_chunks == 1 else dtype, head.weight_VH.device
            )
        self._weight_is_empty = True  # the first chunk writes, later ones add: no pass over it to fill it with zeros
        self.bias_V = torch.zeros_like(head.bias_V, dtype=dtype) if wanted[2] and head.bias_V is not None else None

    def add_from_output(self, rows: Tensor, batch: Batch, grad_nV: Tensor) -> None:
        """Add a chunk, given the gradient with respect to the head's plain output, in `math_dtype`."""
        num_tokens, student = grad_nV.shape[-1], batch.student
        if self.bias_V is not None:
            self.bias_V[:num_tokens] += grad_nV.sum(0, dtype=self.bias_V.dtype)
        grad_nV = grad_nV.to(student.dtype)
        if student.head.num_rows > num_tokens:
            grad_nV = F.pad(grad_nV, (0, student.head.num_rows - num_tokens))
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = student.grad_hidden(grad_nV).to(self.hidden_NH.dtype)
        if self.weight_VH is None:
            return
        weight_VH, hidden_nH = self.weight_VH[:num_tokens], student.hidden(rows)
        is_only = weight_VH.dtype.itemsize < grad_nV.dtype.itemsize
        if not is_only and (weight_VH.dtype != grad_nV.dtype or student.head.num_rows > num_tokens):
            self._fill_with_zeros()
            wider = {} if weight_VH.dtype == grad_nV.dtype else {"out_dtype": weight_VH.dtype}
            weight_VH += torch.mm(grad_nV.T, hidden_nH, **wider)[:num_tokens]
            return
        if is_only:  # rounded a slice at a time
            for part in student.slices():
                weight_VH[part] = torch.mm(grad_nV[:, part].T, hidden_nH)
        else:
            weight_VH.addmm_(grad_nV.T, hidden_nH, beta=0 if self._weight_is_empty else 1)
        if self._weight_is_empty:
            self.weight_VH[num_tokens:].zero_()
        self._weight_is_empty = False

    def _fill_with_zeros(self) -> None:
        if self.weight_VH is not None and self._weight_is_empty:
            self.weight_VH.zero_()
        self._weight_is_empty = False

    def add(self, rows: Tensor, hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> None:
        """Add a chunk, given its gradients."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = hidden_nH.to(self.hidden_NH.dtype)
        self._fill_with_zeros()
        for total, found in ((self.weight_VH, weight_VH), (self.bias_V, bias_V)):
            if total is not None and found is not None:
                both = min(len(total), len(found))  # rows beyond the vocabulary, on either side, have no gradient
                total[:both] += found[:both]

    def finished(self) -> list[Tensor | None]:
        """[grad_hidden, grad_weight, grad_bias] in their leaves' dtypes; None where none is wanted."""
        self._fill_with_zeros()
        sums = (self.hidden_NH, self.weight_VH, self.bias_V)
        return [
            None if total is None or leaf is None else memory.cast(total, leaf.dtype)
            for total, leaf in zip(sums, self.leaves, strict=True)
        ]


class Record:
    """Numbers per token, filled in block by block; NaN where nothing was computed."""

    def __init__(self, batch: Batch) -> None:
        num_tokens, device = len(batch.sampled_ids_N), batch.sampled_ids_N.device
        dtype = logprobs.math_dtype(batch.student.dtype)

        def unknown_N() -> Tensor:
            return torch.full((num_tokens,), torch.nan, dtype=dtype, device=device)

        self.token_loss = {term.name: unknown_N() for term in batch.terms}
        self.unclipped_loss: dict[str, Tensor] = {}
        self._unknown_N = unknown_N
        self.num_empty = {term.name: torch.zeros((), dtype=torch.long, device=device) for term in batch.terms}
        self.sampled_N, self.entropy_N = unknown_N(), unknown_N()
        self.view_sampled: dict[str, Tensor] = {}
        self.computed_N = torch.zeros(num_tokens, dtype=torch.bool, device=device)

    def add(self, rows: Tensor, scored: Scored) -> None:
        self.computed_N[rows] = True
        self.sampled_N[rows] = scored.sampled_n.detach()
        self.entropy_N[rows] = scored.entropy_n.detach()
        for view, sampled_n in scored.view_sampled.items():
            self.view_sampled.setdefault(view, self._unknown_N())[rows] = sampled_n
        for part in scored.terms:
            name, valid_nE = part.term.name, part.entries.valid_nE
            self.token_loss[name][rows] = part.value_n.detach()
            if part.unclipped_n is not None:
                self.unclipped_loss.setdefault(name, self._unknown_N())[rows] = part.unclipped_n
            if valid_nE is not None:
                self.num_empty[name] += (~valid_nE.any(-1)).sum()

    def loss(self, terms: list[Term]) -> Tensor:
        """sum over terms, sum over tokens: coef_N * token_loss_N."""
        products = [
            torch.where(term.coef_N != 0, term.coef_N * self.token_loss[term.name], 0.0).sum() for term in terms
        ]
        return torch.stack(products).sum()

    def output(self, loss: Tensor) -> HeadOutput:
        return HeadOutput(
            loss=loss,
            token_loss=self.token_loss,
            sampled_logprob_N=self.sampled_N,
            entropy_N=self.entropy_N,
            view_sampled_logprob=self.view_sampled,
            computed_N=self.computed_N,
            num_empty_support={name: int(count) for name, count in self.num_empty.items()},
            unclipped_loss=self.unclipped_loss,
        )
