"""From hidden states to losses. Only here and in `compare.py` do logits exist, [n, V] for a bounded number of tokens.

For a chunk of tokens the logits of the student and of each view are formed, every term is scored, and the gradient with
respect to the logits is turned at once into grad_hidden and grad_head: coefficients are known beforehand, so the whole
gradient is made in the forward pass and nothing of size [N, V] is ever kept. Gradients are closed-form
(`divergence.py`, `surrogate.py`); `gradient="autograd"` differentiates the same value code chunk by chunk and is the
reference.

Letters: N tokens, n tokens of a chunk or block, V vocabulary (`num_tokens`), H hidden width, K length of a top-k list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdkit.losses import logprobs
from opdkit.losses.heads import ABSENT_LOGIT, Head, Projector
from opdkit.losses.inputs import Batch, ViewTokens, check_ids
from opdkit.losses.kernels import kernel
from opdkit.losses.names import GradientPath
from opdkit.losses.spec import Target
from opdkit.losses.sums import Gradients, HeadOutput, Record, Scored, ScoredTerm
from opdkit.losses.support import TargetScores, select
from opdkit.losses.target import target_scores, view_scores
from opdkit.losses.terms import Term, token_loss

__all__ = ["Head", "HeadOutput", "HeadStats", "ViewTokens", "head_loss", "head_stats"]

# Bytes of one [n, V] array of logits: rows enough for an efficient matrix product that reads the head's weights seldom;
# beside wide weights, which take longer to read, a share of theirs.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
CHUNK_OF_WEIGHTS = 8
CHUNK_MULTIPLE = {"cpu": 1, "cuda": 128}  # tokens: a GPU's matrix products come in tiles
# The elementwise mathematics takes a chunk in blocks of this size, so that its few arrays stay in a CPU's cache.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


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
    views: ViewTokens | Mapping[str, ViewTokens] | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    gradient: GradientPath = "closed_form",
) -> HeadOutput:
    """sum over terms, sum over tokens: coef_N * token_loss_N, with gradients for hidden_NH and for the head.

    hidden_NH      the student's hidden states behind its final norm, one per token that is predicted
    sampled_ids_N  long, the token that was predicted there
    views          what each view said, by name; one alone is the view "teacher"
    temperature    divides all sides' logits before anything else; top-k and sampled log-probs arrive already at it
    chunk_size     tokens whose logits exist at one time; None: by `CHUNK_BYTES`; moves only the rounding

    A head's matrix product takes in the dtype of its hidden states (or autocast's); its sums, and all behind it, are in
    fp32 (fp64 for fp64). A head that does not require grad is spared its gradient. Raises ValueError naming what is
    missing or wrong.
    """
    named = {"teacher": views} if isinstance(views, ViewTokens) else views or {}
    with torch.no_grad():
        batch = Batch(hidden_NH, head, sampled_ids_N, terms, named, temperature)
        widest = max(head.num_tokens, *(p.head.num_tokens for p in batch.projectors.values()), 0)
        work = [
            (rows, counting)
            for counted_rows, counting in batch.parts()
            for rows in chunks(counted_rows, widest, hidden_NH.shape[-1], chunk_size)
        ]
    gradients, record = Gradients(hidden_NH, head, batch.student.dtype, len(work)), Record(batch)
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        for rows, counting in work:
            if gradient == "autograd":
                _autograd(batch, rows, counting, record, gradients)
            elif kernel.is_chosen(batch, counting):
                _through_kernels(batch, rows, counting, record, gradients)
            else:
                _closed_form(batch, rows, counting, record, gradients)
        loss = record.loss(batch.terms)
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

    sampled_ids_N: the log-probability of these ids; k: the k likeliest ids (at most V) in falling order, in the other
    tokenizer's numbers where the head is compared in them; entropy.
    """
    if sampled_ids_N is not None:
        check_ids("sampled_ids_N", sampled_ids_N, head.num_tokens)
    project, num_tokens = Projector(head, hidden_NH), head.num_tokens
    math = {"dtype": logprobs.math_dtype(project.dtype), "device": hidden_NH.device}
    shape_NK = (len(hidden_NH), 0 if k is None else min(k, head.num_compared))
    stats = HeadStats(
        sampled_logprob_N=None if sampled_ids_N is None else torch.empty(len(hidden_NH), **math),
        topk_ids_NK=None if k is None else torch.empty(shape_NK, dtype=torch.long, device=hidden_NH.device),
        topk_logprob_NK=None if k is None else torch.empty(shape_NK, **math),
        entropy_N=torch.empty(len(hidden_NH), **math) if entropy else None,
    )
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        all_rows = torch.arange(len(hidden_NH), device=hidden_NH.device)
        for chunk in chunks(all_rows, num_tokens, hidden_NH.shape[-1], chunk_size):
            output_nV = project(chunk)
            for block in blocks(output_nV):
                logprob_nV, prob_nV = project.distribution_(head.logits(output_nV[block], temperature))
                rows = chunk[block]
                if stats.sampled_logprob_N is not None and sampled_ids_N is not None:
                    stats.sampled_logprob_N[rows] = logprobs.gather(logprob_nV, sampled_ids_N[rows])
                if stats.topk_ids_NK is not None and stats.topk_logprob_NK is not None:
                    listed_nW = head.for_reader(logprob_nV, ABSENT_LOGIT)
                    values_nK, stats.topk_ids_NK[rows] = logprobs.topk(listed_nW, shape_NK[1])
                    stats.topk_logprob_NK[rows] = values_nK
                if stats.entropy_N is not None:
                    stats.entropy_N[rows] = logprobs.entropy(logprob_nV, prob_nV)
    return stats


class _WithGradients(torch.autograd.Function):
    """The loss, joined to gradients that are known already: backward only scales them, and hands them over.

    They are as large as the head's weights. So they are scaled in their own memory, and not at all by 1; a graph that
    is kept for another backward gets scaled copies.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *leaves_then_gradients: Tensor | None) -> Tensor:
        ctx.gradients = leaves_then_gradients[3:]  # nobody else's, so that backward may write into them
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through head_loss a second time: the first one needed retain_graph=True")
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if grad is None else grad * grad_loss for grad in gradients]
        else:
            ctx.gradients = None
            # Looking at the number would make a GPU's host wait for it.
            is_one = grad_loss.device.type == "cpu" and bool(grad_loss == 1)
            scaled = [grad if grad is None or is_one else grad.mul_(grad_loss) for grad in gradients]
        return (None, *scaled, None, None, None)


def _score(
    batch: Batch,
    rows: Tensor,
    terms: Sequence[Term],
    student_nV: Tensor,
    prob_nV: Tensor,
    outputs_nV: Mapping[str, Tensor],
) -> Scored:
    """All values of tokens that all these terms count, from the student's distribution to terms; shared by both
    gradient paths. `outputs_nV`: the plain output of the head of each view that is read from hidden states."""
    sampled_ids_n = batch.sampled_ids_N[rows]
    asked = {name for term in terms for name in term.asks}
    views = {name: _view_scores(batch, name, rows, outputs_nV.get(name), student_nV.dtype) for name in sorted(asked)}
    targets: dict[tuple[Target, bool], TargetScores] = {}
    scored = []
    for term in (whole.take(rows) for whole in terms):
        target = None
        if term.asks:
            form = (term.target, "distribution" in {asked.answer for asked in term.asks.values()})
            if form not in targets:
                targets[form] = target_scores(term.target, term.loss, views, sampled_ids_n)
            target = targets[form]
        entries = select(term.loss.support, student_nV, prob_nV, target, sampled_ids_n)
        scored.append(ScoredTerm(term, entries, *token_loss(term, entries)))
    said = {name: view.sampled(sampled_ids_n) for name, view in views.items()}
    known = {name: said_n for name, said_n in said.items() if said_n is not None}
    sampled_n, entropy_n = logprobs.gather(student_nV, sampled_ids_n), logprobs.entropy(student_nV, prob_nV)
    return Scored(scored, sampled_n, entropy_n, known)


def _view_scores(batch: Batch, name: str, rows: Tensor, output_nV: Tensor | None, dtype: torch.dtype) -> TargetScores:
    said, logprob_nV, prob_nV, silent_V = batch.views[name].take(rows), None, None, None
    if output_nV is not None:
        assert said.head is not None
        logits_nV = said.head.logits(output_nV, batch.temperature).to(dtype)
        logprob_nV, prob_nV = batch.projectors[name].distribution_(logits_nV)
        logprob_nV, prob_nV = said.head.for_reader(logprob_nV, ABSENT_LOGIT), said.head.for_reader(prob_nV, 0.0)
        silent_V = said.head.silent_W
    return view_scores(said, logprob_nV, prob_nV, dtype, silent_V)


def _view_outputs(batch: Batch, rows: Tensor, terms: Sequence[Term]) -> dict[str, Tensor]:
    """[n, V] the plain output of each view that these terms read from hidden states."""
    asked = {name for term in terms for name in term.asks}
    return {name: project(rows) for name, project in batch.projectors.items() if name in asked}


def _closed_form(batch: Batch, rows: Tensor, terms: Sequence[Term], record: Record, gradients: Gradients) -> None:
    """Score a chunk block by block; each block of the head's output is overwritten by its gradient."""
    output_nV, outputs_nV = batch.student(rows), _view_outputs(batch, rows, terms)
    for block in blocks(output_nV):
        logits_nV = batch.student.head.logits(output_nV[block], batch.temperature)
        slope_nV = batch.student.head.slope(logits_nV, batch.temperature) if gradients.any_wanted else None
        student_nV, prob_nV = batch.student.distribution_(logits_nV)
        seen = {name: view_nV[block] for name, view_nV in outputs_nV.items()}
        scored = _score(batch, rows[block], terms, student_nV, prob_nV, seen)
        record.add(rows[block], scored)
        if gradients.any_wanted:
            factor = batch.student.head.logit_scale / batch.temperature
            _write_gradient(scored, prob_nV, slope_nV, factor, output_nV[block])
    if gradients.any_wanted:
        gradients.add_from_output(rows, batch, output_nV)


def _through_kernels(batch: Batch, rows: Tensor, terms: Sequence[Term], record: Record, gradients: Gradients) -> None:
    """The same for a whole chunk at once, by the kernels of a GPU."""
    output_nV, outputs_nV = batch.student(rows), _view_outputs(batch, rows, terms)
    scored, write_gradient = kernel.score(batch, rows, terms, output_nV, outputs_nV)
    record.add(rows, scored)
    if gradients.any_wanted:
        write_gradient()
        gradients.add_from_output(rows, batch, output_nV)


def _write_gradient(scored: Scored, prob_nV: Tensor, slope_nV: Tensor | None, factor: float, out_nV: Tensor) -> None:
    """Write the gradient with respect to the head's plain output into `out_nV`. Consumes all else that is given.

    With g a term's coefficient times its gradient at the entries, scattered to the vocabulary: the sum over terms of
    (g - p * sum g) * factor, times the slope of the soft cap; factor: the head's scale / temperature.
    """
    total_n1, dense_nV, sparse = torch.zeros_like(prob_nV[:, :1]), None, []
    for part in scored.terms:
        coef_n1 = part.term.coef_N.to(prob_nV.dtype).unsqueeze(-1) * factor
        grad_nE = part.gradient_nE().mul_(coef_n1)
        total_n1 += grad_nE.sum(-1, keepdim=True)
        if part.entries.ids_nE is not None:
            sparse.append((part.entries.ids_nE, grad_nE))
        else:
            dense_nV = grad_nE if dense_nV is None else dense_nV.add_(grad_nE)
    if dense_nV is None:
        torch.mul(prob_nV, -total_n1, out=out_nV)
    else:
        torch.addcmul(dense_nV, prob_nV, total_n1, value=-1, out=out_nV)
    for ids_nE, grad_nE in sparse:
        out_nV.scatter_add_(-1, ids_nE, grad_nE)
    if slope_nV is not None:
        out_nV.mul_(slope_nV)


def _autograd(batch: Batch, rows: Tensor, terms: Sequence[Term], record: Record, gradients: Gradients) -> None:
    """The reference: the same values, differentiated by torch, one chunk at a time."""
    head = batch.student.head
    hidden_nH = batch.student.hidden(rows).detach().requires_grad_()
    dtype = logprobs.math_dtype(head.weight_VH.dtype)
    weight_VH = head.weight_VH.detach().to(dtype).requires_grad_()
    bias_V = None if head.bias_V is None else head.bias_V.detach().to(dtype).requires_grad_()
    leaves = [leaf for leaf in (hidden_nH, weight_VH, bias_V) if leaf is not None]
    outputs_nV = _view_outputs(batch, rows, terms)
    with torch.enable_grad():
        output_nV = replace(head, weight_VH=weight_VH, bias_V=bias_V).project(hidden_nH)
        student_nV = logprobs.log_softmax(head.logits(output_nV, batch.temperature))
        scored = _score(batch, rows, terms, student_nV, student_nV.exp(), outputs_nV)
        products = [(part.term.coef_N * part.value_n).sum() for part in scored.terms]
        found = torch.autograd.grad(torch.stack(products).sum(), leaves)
    record.add(rows, scored)
    gradients.add(rows, *found)


def chunks(rows: Tensor, num_tokens: int, width: int, chunk_size: int | None = None) -> Iterator[Tensor]:
    """`rows` in pieces of chunk_size, or of as many as fit `CHUNK_BYTES` for a head of these sizes."""
    if chunk_size is None:
        kind = rows.device.type
        fitting = CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]) // (4 * num_tokens)
        chunk_size = max(1, fitting, width // CHUNK_OF_WEIGHTS)
        chunk_size -= chunk_size % min(chunk_size, CHUNK_MULTIPLE.get(kind, 1))
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} must be at least 1")
    for start in range(0, len(rows), chunk_size):
        yield rows[start : start + chunk_size]


def blocks(output_nV: Tensor) -> Iterator[slice]:
    """Row ranges of a chunk of at most `BLOCK_BYTES` each, nearly equal: a last one of two rows would cost as many
    kernels as a whole one."""
    num_bytes = BLOCK_BYTES.get(output_nV.device.type, BLOCK_BYTES["cpu"])
    most = max(1, num_bytes // (4 * output_nV.shape[-1]))
    size = -(-len(output_nV) // max(1, -(-len(output_nV) // most)))
    for start in range(0, len(output_nV), max(1, size)):
        yield slice(start, start + size)
