"""From hidden states to losses. The only place where logits exist, [n, V] for a bounded number n of tokens at a time.

For a chunk of tokens the head's logits are formed for both sides, every term is scored, and the gradient with respect to
the logits is turned at once into grad_hidden and grad_head: coefficients are known beforehand, so the whole gradient is
made in the forward pass and nothing of size [N, V] is ever kept. Gradients are closed-form (`divergence.py`,
`surrogate.py`); `gradient="autograd"` differentiates the same value code chunk by chunk and is the reference.

Letters: N tokens, n tokens of a chunk or block, V vocabulary (`num_tokens`), H hidden width, K length of a top-k list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdkit.errors import UserError
from opdkit.losses import logprobs
from opdkit.losses.inputs import (
    Head,
    TeacherTokens,
    blank_uncounted,
    check_ids,
    check_inputs,
    needs_teacher_logits,
)
from opdkit.losses.names import GradientPath
from opdkit.losses.support import Entries, TeacherScores, select
from opdkit.losses.terms import Term, counted_tokens, token_loss

# Bytes of one [n, V] array of logits: rows enough for an efficient matrix product that reads the head's weights seldom.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# The elementwise mathematics takes a chunk in blocks of this size, so that its few arrays stay in a CPU's cache.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """The loss, and what was seen on the way. Everything but `loss` is detached; log-probs and entropy are in nats.

    token_loss         {term name: [N]}, before coefficients
    computed_N         bool, False for tokens that no term counts: no logits were formed for them
    num_empty_support  {term name: counted tokens whose intersection or difference was empty; they score 0}

    A per-token number that was not computed is NaN: a token's loss under a term that does not count it, everything of a
    token that was not computed. `teacher_sampled_logprob_N` is None if the teacher was not asked or did not say.
    """

    loss: Tensor
    token_loss: dict[str, Tensor]
    sampled_logprob_N: Tensor
    entropy_N: Tensor
    teacher_sampled_logprob_N: Tensor | None
    computed_N: Tensor
    num_empty_support: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """What a model says of N tokens, in nats; None where it was not asked."""

    sampled_logprob_N: Tensor | None
    topk_ids_NK: Tensor | None
    topk_logprob_NK: Tensor | None
    entropy_N: Tensor | None


def head_loss(
    hidden_NH: Tensor,
    head: Head,
    sampled_ids_N: Tensor,
    terms: Sequence[Term],
    teacher: TeacherTokens | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    gradient: GradientPath = "closed_form",
) -> HeadOutput:
    """sum over terms, sum over tokens: coef_N * token_loss_N, with gradients for hidden_NH and for the head.

    hidden_NH      the student's hidden states behind its final norm, one per token that is predicted
    sampled_ids_N  long, the token that was predicted there
    temperature    divides both sides' logits before anything else; top-k and sampled log-probs arrive already at it
    chunk_size     tokens whose logits exist at one time; None: as many as fit `CHUNK_BYTES`. Moves numbers by rounding only

    The head's matrix product runs in the dtype of hidden_NH (or autocast's), all behind it in fp32 (fp64 for fp64). A head
    that does not require grad is spared its gradient. Raises ValueError naming what is missing or does not fit.
    """
    check_inputs(hidden_NH, head, sampled_ids_N, terms, teacher)
    gradients = _Gradients(hidden_NH, head)
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        batch = _Batch(hidden_NH, head, sampled_ids_N, terms, teacher, temperature, gradients.dtype)
        record = _Record(batch)
        score = _closed_form if gradient == "closed_form" else _autograd
        for rows in _chunks(batch.counted_rows, head.num_tokens, chunk_size):
            score(batch, rows, record, gradients)
        loss = record.loss(batch)
    return record.output(_WithGradients.apply(loss, hidden_NH, head.weight_VH, head.bias_V, *gradients.finished()))


def head_stats(
    hidden_NH: Tensor,
    head: Head,
    *,
    sampled_ids_N: Tensor | None = None,
    k: int | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> HeadStats:
    """What is asked of each token's distribution at `temperature`, over the `num_tokens` ids, without gradient.

    sampled_ids_N: the log-probability of these ids; k: the k likeliest ids (at most V) in falling order; entropy.
    """
    dtype, num_tokens = _compute_dtype(hidden_NH), head.num_tokens
    if sampled_ids_N is not None:
        check_ids("sampled_ids_N", sampled_ids_N, num_tokens)

    def empty(*shape: int, of: torch.dtype = logprobs.math_dtype(dtype)) -> Tensor:
        return torch.empty(len(hidden_NH), *shape, dtype=of, device=hidden_NH.device)

    stats = HeadStats(
        sampled_logprob_N=None if sampled_ids_N is None else empty(),
        topk_ids_NK=None if k is None else empty(min(k, num_tokens), of=torch.long),
        topk_logprob_NK=None if k is None else empty(min(k, num_tokens)),
        entropy_N=empty() if entropy else None,
    )
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        trimmed = head.trimmed(dtype)
        for index in _chunks(torch.arange(len(hidden_NH), device=hidden_NH.device), num_tokens, chunk_size):
            logits_nV = trimmed.logits(hidden_NH[index].to(dtype), temperature)
            for block in _blocks(logits_nV):
                logprob_nV, rows = logprobs.log_softmax(logits_nV[block]), index[block]
                if stats.sampled_logprob_N is not None and sampled_ids_N is not None:
                    stats.sampled_logprob_N[rows] = logprobs.gather(logprob_nV, sampled_ids_N[rows])
                if stats.topk_ids_NK is not None and stats.topk_logprob_NK is not None:
                    values_nK, stats.topk_ids_NK[rows] = logprob_nV.topk(stats.topk_ids_NK.shape[-1], dim=-1)
                    stats.topk_logprob_NK[rows] = values_nK
                if stats.entropy_N is not None:
                    stats.entropy_N[rows] = logprobs.entropy(logprob_nV, logprob_nV.exp())
    return stats


class _WithGradients(torch.autograd.Function):
    """The loss, joined to gradients that are known already: backward only scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *leaves_then_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*leaves_then_gradients[3:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(None if grad is None else grad * grad_loss for grad in ctx.saved_tensors), None, None, None)


class _Batch:
    """What one call of `head_loss` reads, checked and ready: heads trimmed, unknowns that nothing counts blanked."""

    def __init__(
        self,
        hidden_NH: Tensor,
        head: Head,
        sampled_ids_N: Tensor,
        terms: Sequence[Term],
        teacher: TeacherTokens | None,
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        self.hidden_NH, self.sampled_ids_N, self.temperature, self.dtype = hidden_NH, sampled_ids_N, temperature, dtype
        self.head, self.teacher_head = head.trimmed(dtype), None
        if needs_teacher_logits(terms, teacher, head.num_tokens):
            assert teacher is not None and teacher.head is not None
            self.teacher_head = teacher.head.trimmed(dtype)
        self.terms, self.teacher = blank_uncounted(terms, teacher)
        self.counted_rows = counted_tokens(terms).nonzero().squeeze(-1)
        check_ids("sampled_ids_N", sampled_ids_N[self.counted_rows], head.num_tokens)
        if self.teacher is not None and self.teacher.topk_ids_NK is not None:
            check_ids("the teacher's topk_ids_NK", self.teacher.topk_ids_NK[self.counted_rows], head.num_tokens)

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Student's and, where it is needed, teacher's logits / temperature, [n, V] each."""
        student_nV = self.head.logits(self.hidden_NH[rows].to(self.dtype), self.temperature)
        if self.teacher_head is None:
            return student_nV, None
        assert self.teacher is not None and self.teacher.hidden_NH is not None
        return student_nV, self.teacher_head.logits(self.teacher.hidden_NH[rows].to(self.dtype), self.temperature)


@dataclass(frozen=True, slots=True)
class _Scored:
    """n tokens, scored: per term its entries, values and gradient closure; and the student's distribution."""

    terms: list[Term]
    entries: list[Entries]
    value_n: list[Tensor]
    gradient: list[Callable[[], Tensor]]
    student_nV: Tensor
    prob_nV: Tensor
    sampled_ids_n: Tensor
    teacher_sampled_n: Tensor | None


def _score(batch: _Batch, rows: Tensor, logits_nV: Tensor, teacher_logits_nV: Tensor | None) -> _Scored:
    """All values, from logits to terms; shared by both gradient paths."""
    student_nV = logprobs.log_softmax(logits_nV)
    prob_nV = student_nV.exp()
    sampled_ids_n = batch.sampled_ids_N[rows]
    scores, teacher_sampled_n = None, None
    if batch.teacher is not None:
        said = batch.teacher.take(rows)
        scores = TeacherScores(
            None if teacher_logits_nV is None else logprobs.log_softmax(teacher_logits_nV),
            said.topk_ids_NK,
            None if said.topk_logprob_NK is None else said.topk_logprob_NK.to(student_nV.dtype),
            None if said.sampled_logprob_N is None else said.sampled_logprob_N.to(student_nV.dtype),
        )
        teacher_sampled_n = scores.sampled(sampled_ids_n)
    terms = [term.take(rows) for term in batch.terms]
    entries, values, gradients = [], [], []
    for term in terms:
        asked = None if term.loss.needs.teacher == "none" else scores
        entries.append(select(term.loss.support, student_nV, prob_nV, asked, sampled_ids_n))
        value_n, gradient = token_loss(term, entries[-1])
        values.append(value_n)
        gradients.append(gradient)
    return _Scored(terms, entries, values, gradients, student_nV, prob_nV, sampled_ids_n, teacher_sampled_n)


def _closed_form(batch: _Batch, rows: Tensor, record: _Record, gradients: _Gradients) -> None:
    """Score a chunk block by block; each block of logits is overwritten by its gradient."""
    logits_nV, teacher_logits_nV = batch.logits(rows)
    for block in _blocks(logits_nV):
        teacher_block = None if teacher_logits_nV is None else teacher_logits_nV[block]
        scored = _score(batch, rows[block], logits_nV[block], teacher_block)
        record.add(rows[block], scored)
        if gradients.any_wanted:
            _logit_gradient_(logits_nV[block], scored, batch.head, batch.temperature)
    if gradients.any_wanted:
        gradients.add_from_logits(rows, batch, logits_nV)


def _logit_gradient_(logits_nV: Tensor, scored: _Scored, head: Head, temperature: float) -> None:
    """Overwrite logits / temperature by the gradient with respect to the head's plain output, hidden @ weight.T + bias.

    With g the gradient at the entries, sum over terms: (g scattered - p * sum g) * scale / temperature, and the slope
    1 - tanh^2 of the soft cap.
    """
    slope_nV = None if head.softcap is None else 1 - (logits_nV * (temperature / head.softcap)) ** 2
    total_n1, dense_nV, sparse = torch.zeros_like(logits_nV[:, :1]), None, []
    for term, entries, gradient in zip(scored.terms, scored.entries, scored.gradient, strict=True):
        grad_nE = gradient().mul_(term.coef_N.to(logits_nV.dtype).unsqueeze(-1) * (head.logit_scale / temperature))
        total_n1 += grad_nE.sum(-1, keepdim=True)
        if entries.ids_nE is not None:
            sparse.append((entries.ids_nE, grad_nE))
        else:
            dense_nV = grad_nE if dense_nV is None else dense_nV.add_(grad_nE)
    if dense_nV is None:
        torch.mul(scored.prob_nV, -total_n1, out=logits_nV)
    else:
        torch.addcmul(dense_nV, scored.prob_nV, total_n1, value=-1, out=logits_nV)
    for ids_nE, grad_nE in sparse:
        logits_nV.scatter_add_(-1, ids_nE, grad_nE)
    if slope_nV is not None:
        logits_nV.mul_(slope_nV)


def _autograd(batch: _Batch, rows: Tensor, record: _Record, gradients: _Gradients) -> None:
    """The reference: the same values, differentiated by torch, one chunk at a time."""
    hidden_nH = batch.hidden_NH[rows].to(batch.dtype).detach().requires_grad_()
    weight_VH = batch.head.weight_VH.detach().requires_grad_()
    bias_V = None if batch.head.bias_V is None else batch.head.bias_V.detach().requires_grad_()
    leaves = [leaf for leaf in (hidden_nH, weight_VH, bias_V) if leaf is not None]
    _, teacher_logits_nV = batch.logits(rows)
    with torch.enable_grad():
        logits_nV = replace(batch.head, weight_VH=weight_VH, bias_V=bias_V).logits(hidden_nH, batch.temperature)
        scored = _score(batch, rows, logits_nV, teacher_logits_nV)
        objective = sum(
            (term.coef_N.to(value_n.dtype) * value_n).sum()
            for term, value_n in zip(scored.terms, scored.value_n, strict=True)
        )
        found = torch.autograd.grad(objective, leaves)
    record.add(rows, scored)
    gradients.add(rows, *found)


class _Gradients:
    """grad_hidden and grad_head, summed over chunks; the head's in fp32 (fp64 for fp64)."""

    def __init__(self, hidden_NH: Tensor, head: Head) -> None:
        self.dtype = _compute_dtype(hidden_NH)
        self.leaves = (hidden_NH, head.weight_VH, head.bias_V)
        self.num_tokens = head.num_tokens
        wanted = [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in self.leaves]
        self.any_wanted = any(wanted)
        if self.dtype == torch.float16 and self.any_wanted:
            raise UserError("fp16 loses the gradient of unlikely tokens to underflow; train in bfloat16 or float32.")
        self.hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
        dtype = logprobs.math_dtype(self.dtype)
        self.weight_VH = torch.zeros_like(head.weight_VH, dtype=dtype) if wanted[1] else None
        self.bias_V = torch.zeros_like(head.bias_V, dtype=dtype) if wanted[2] and head.bias_V is not None else None

    def add_from_logits(self, rows: Tensor, batch: _Batch, grad_nV: Tensor) -> None:
        """Add a chunk, given the gradient with respect to the head's plain output."""
        if self.bias_V is not None:
            self.bias_V[: self.num_tokens] += grad_nV.sum(0)
        grad_nV = grad_nV.to(self.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = (grad_nV @ batch.head.weight_VH).to(self.hidden_NH.dtype)
        if self.weight_VH is not None:
            weight_VH, hidden_nH = self.weight_VH[: self.num_tokens], batch.hidden_NH[rows].to(self.dtype)
            if weight_VH.dtype == self.dtype:
                weight_VH.addmm_(grad_nV.T, hidden_nH)
            else:
                weight_VH += grad_nV.T @ hidden_nH

    def add(self, rows: Tensor, hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> None:
        """Add a chunk, given its gradients."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = hidden_nH.to(self.hidden_NH.dtype)
        if self.weight_VH is not None:
            self.weight_VH[: self.num_tokens] += weight_VH
        if self.bias_V is not None and bias_V is not None:
            self.bias_V[: self.num_tokens] += bias_V

    def finished(self) -> tuple[Tensor | None, ...]:
        """(grad_hidden, grad_weight, grad_bias) in their leaves' dtypes; None where none is wanted."""
        sums = (self.hidden_NH, self.weight_VH, self.bias_V)
        return tuple(
            None if total is None or leaf is None else total.to(leaf.dtype)
            for total, leaf in zip(sums, self.leaves, strict=True)
        )


class _Record:
    """Per-token numbers, filled in chunk by chunk; NaN where nothing is."""

    def __init__(self, batch: _Batch) -> None:
        dtype, device = logprobs.math_dtype(batch.dtype), batch.hidden_NH.device

        def unknown_N() -> Tensor:
            return torch.full((len(batch.hidden_NH),), torch.nan, dtype=dtype, device=device)

        self.token_loss = {term.name: unknown_N() for term in batch.terms}
        self.num_empty = {term.name: torch.zeros((), dtype=torch.long, device=device) for term in batch.terms}
        self.sampled_N, self.entropy_N = unknown_N(), unknown_N()
        said = batch.teacher_head is not None or (
            batch.teacher is not None and batch.teacher.sampled_logprob_N is not None
        )
        self.teacher_sampled_N = unknown_N() if said else None
        self.computed_N = torch.zeros(len(batch.hidden_NH), dtype=torch.bool, device=device)

    def add(self, rows: Tensor, scored: _Scored) -> None:
        self.computed_N[rows] = True
        self.sampled_N[rows] = logprobs.gather(scored.student_nV, scored.sampled_ids_n).detach()
        self.entropy_N[rows] = logprobs.entropy(scored.student_nV, scored.prob_nV).detach()
        if self.teacher_sampled_N is not None and scored.teacher_sampled_n is not None:
            self.teacher_sampled_N[rows] = scored.teacher_sampled_n
        for term, entries, value_n in zip(scored.terms, scored.entries, scored.value_n, strict=True):
            counted_n = term.coef_N != 0
            self.token_loss[term.name][rows] = torch.where(counted_n, value_n.detach(), torch.nan)
            if entries.valid_nE is not None:
                self.num_empty[term.name] += (counted_n & ~entries.valid_nE.any(-1)).sum()

    def loss(self, batch: _Batch) -> Tensor:
        """sum over terms, sum over tokens: coef_N * token_loss_N."""
        sums = [
            torch.where(term.coef_N != 0, term.coef_N * self.token_loss[term.name], 0.0).sum() for term in batch.terms
        ]
        return torch.stack(sums).sum()

    def output(self, loss: Tensor) -> HeadOutput:
        return HeadOutput(
            loss=loss,
            token_loss=self.token_loss,
            sampled_logprob_N=self.sampled_N,
            entropy_N=self.entropy_N,
            teacher_sampled_logprob_N=self.teacher_sampled_N,
            computed_N=self.computed_N,
            num_empty_support={name: int(count) for name, count in self.num_empty.items()},
        )


def _compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What the head's matrix product runs in: autocast's dtype where it applies (it leaves fp64 alone), else the input's."""
    device = hidden_NH.device.type
    if hidden_NH.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype


def _chunks(rows: Tensor, num_tokens: int, chunk_size: int | None) -> Iterator[Tensor]:
    """`rows` in pieces of chunk_size, or of as many as fit `CHUNK_BYTES`."""
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cpu"]) // (4 * num_tokens))
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} must be at least 1")
    for start in range(0, len(rows), chunk_size):
        yield rows[start : start + chunk_size]


def _blocks(logits_nV: Tensor) -> Iterator[slice]:
    """Row ranges of a chunk of about `BLOCK_BYTES` each."""
    num_bytes = BLOCK_BYTES.get(logits_nV.device.type, BLOCK_BYTES["cpu"])
    size = max(1, num_bytes // (logits_nV.element_size() * logits_nV.shape[-1]))
    for start in range(0, len(logits_nV), size):
        yield slice(start, start + size)
