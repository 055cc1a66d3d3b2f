"""A chunk of `head_loss` through Triton kernels: the same numbers as the eager path, in fewer readings of memory.

The matrix products stay torch's. Behind them the eager path reads and writes a chunk of logits some twenty times; here
it is read once for all statistics (twice by losses of a mixture) and once for the gradient, which is written over it.
A support of few entries is scored by the eager code at those entries alone.

The kernels apply to a vocabulary in full (forward, reverse and mixed KL, JSD and skewed KL with a teacher_share from
0.05 to 0.95, with or without a token clip) and to every loss on a top-k list or on the sampled token. They do not, and
the eager path runs, for: targets that combine views, two losses over the full vocabulary at once, `renyi`, `entry_clip`
and `logprob_floor` over the full vocabulary, and heads with `absent_ids`.
They are used on a CUDA device once `kernel_proof.prove` has found them equal to the eager path there.
Letters: n tokens of a chunk, V vocabulary, E entries of a support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opdkit.losses import logprobs
from opdkit.losses.heads import Head
from opdkit.losses.inputs import Batch
from opdkit.losses.logprobs import Implicit
from opdkit.losses.spec import Divergence
from opdkit.losses.sums import Scored, ScoredTerm
from opdkit.losses.support import Entries, select
from opdkit.losses.target import view_scores
from opdkit.losses.terms import Term, token_loss

proven: set[torch.device] = set()  # where the kernels were found equal to the eager path; `kernel_proof` writes it
SHARES = (0.05, 0.95)  # nearer to an end, a mixture needs log1p and expm1, which Triton lacks
BLOCK = 2048  # ids that a program holds at one time


def is_chosen(batch: Batch, terms: Sequence[Term]) -> bool:
    """Whether these terms go through the kernels."""
    return batch.student.hidden_NH.device in proven and covers(batch, terms)


def covers(batch: Batch, terms: Sequence[Term]) -> bool:
    """Whether the kernels know these terms and heads."""
    asked = {name for term in terms for name in term.asks}
    heads = [batch.student.head, *(p.head for name, p in batch.projectors.items() if name in asked)]
    if any(head.absent_ids is not None or head.logit_scale <= 0 for head in heads):
        return False
    if any(head.reader_ids_W is not None for head in heads):  # a teacher with another tokenizer
        return False
    if any(term.asks and term.target.only is None for term in terms):
        return False
    full = [term.loss for term in terms if term.loss.support.kind == "full"]
    return len(full) <= 1 and all(_knows(loss) for loss in full)


def _knows(loss: object) -> bool:
    if not isinstance(loss, Divergence) or loss.entry_clip is not None or loss.logprob_floor is not None:
        return False
    if loss.kind == "renyi":
        return False
    form = _form(loss)
    return form.kind == _KL or SHARES[0] <= form.share <= SHARES[1]


class Form(NamedTuple):
    """A divergence as the kernels take it in."""

    kind: int  # as numbered in triton_kernels.py
    share: float  # of the reverse KL in a KL; of the teacher in a mixture
    scale: float


_NOTHING, _KL = 0, 1
_MIXTURES = {"jsd": 2, "skewed_forward_kl": 3, "skewed_reverse_kl": 4}


def _form(loss: Divergence) -> Form:
    share = loss.teacher_share
    if loss.kind in ("forward_kl", "reverse_kl"):
        return Form(_KL, float(loss.kind == "reverse_kl"), 1.0)
    if loss.kind == "mixed_kl":
        assert loss.reverse_share is not None
        return Form(_KL, loss.reverse_share, 1.0)
    assert share is not None
    if loss.kind == "jsd" and loss.scale == "continuous" and share in (0, 1):
        return Form(_KL, float(share), 1.0)
    scale = 1 / (share * (1 - share)) if loss.kind == "jsd" and loss.scale == "continuous" else 1.0
    return Form(_MIXTURES[loss.kind], share, scale)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Both sides' plain output, the teacher's if it is known in full, and what the kernels are told of their heads."""

    output_nV: Tensor
    teacher_nV: Tensor | None
    constants: dict[str, Any]

    def launch(self, name: str, grid: tuple[int, ...], *arrays: Tensor, **constants: Any) -> None:
        from opdkit.losses.kernels import triton_kernels

        teacher_nV = self.output_nV if self.teacher_nV is None else self.teacher_nV
        strides = self.output_nV.stride(0), teacher_nV.stride(0)
        kernel = getattr(triton_kernels, name)
        kernel[grid](
            self.output_nV, teacher_nV, *arrays, self.output_nV.shape[1], *strides,
            block=BLOCK, **self.constants, **constants,
        )  # fmt: skip

    def statistics(self) -> Tensor:
        """[n, 5]: see `triton_kernels.statistics`; of the student alone, the first two."""
        found_n5 = self.output_nV.new_zeros(len(self.output_nV), 5)
        self.launch("statistics", (len(found_n5),), found_n5, with_teacher=self.teacher_nV is not None)
        return found_n5


def score(
    batch: Batch, rows: Tensor, terms: Sequence[Term], output_nV: Tensor, outputs_nV: Mapping[str, Tensor]
) -> tuple[Scored, Callable[[], None]]:
    """All values of tokens that all these terms count, and a closure that writes the gradient over `output_nV`."""
    student, chunks, found = batch.student.head, {}, {}
    for name in outputs_nV or {"": None}:
        head = batch.projectors[name].head if name else student
        chunks[name] = Chunk(output_nV, outputs_nV.get(name), _constants(student, head, batch.temperature))
        found[name] = chunks[name].statistics()
    found_n5 = next(iter(found.values()))
    student_nV = _implicit(output_nV, student, batch.temperature, found_n5[:, 0])
    sampled_ids_n = batch.sampled_ids_N[rows]
    views = {}
    for name in sorted({name for term in terms for name in term.asks}):
        said, logprob_nV = batch.views[name].take(rows), None
        if name in outputs_nV:
            head = batch.projectors[name].head
            logprob_nV = _implicit(outputs_nV[name], head, batch.temperature, found[name][:, 2])
        views[name] = view_scores(said, logprob_nV, None, output_nV.dtype)
    scored, dense = [], None
    for term in (whole.take(rows) for whole in terms):
        target = views[term.target.views[0]] if term.asks else None
        if term.loss.support.kind == "full":
            name = term.target.views[0]
            assert isinstance(term.loss, Divergence) and target is not None
            dense = _Dense(chunks[name], found[name], term, term.loss)
            scored.append(dense.scored(Entries(None, student_nV, target.logprob_nV)))
            continue
        entries = select(term.loss.support, student_nV, None, target, sampled_ids_n)
        scored.append(ScoredTerm(term, entries, *token_loss(term, entries)))
    said_n = {name: view.sampled(sampled_ids_n) for name, view in views.items()}
    known_n = {name: known for name, known in said_n.items() if known is not None}
    result = Scored(scored, logprobs.gather(student_nV, sampled_ids_n), found_n5[:, 1], known_n)
    write = partial(_write_gradient, batch, next(iter(chunks.values())), found_n5, result, dense)
    return result, write


class _Dense:
    """A divergence over the full vocabulary."""

    def __init__(self, chunk: Chunk, found_n5: Tensor, term: Term, loss: Divergence) -> None:
        self.chunk, self.found_n5, self.term, self.form = chunk, found_n5, term, _form(loss)
        self.clip, self.shrink_n = loss.token_clip, None

    def scored(self, entries: Entries) -> ScoredTerm:
        value_n, self.slope_n = self._sums()
        unclipped_n = None
        if self.clip is not None:
            unclipped_n = value_n
            self.shrink_n = torch.where(value_n > self.clip, self.clip / value_n, 1.0)
            value_n = value_n * self.shrink_n
        return ScoredTerm(self.term, entries, value_n, lambda: None, unclipped_n)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """([n] value, [n] sum over entries of dd/da), before a clip."""
        student_norm_n, _, teacher_norm_n, forward_n, reverse_n = self.found_n5.unbind(-1)
        if self.form.kind == _KL:
            apart_n, share = student_norm_n - teacher_norm_n, self.form.share
            forward_n, reverse_n = forward_n + apart_n, reverse_n - apart_n
            return torch.lerp(forward_n, reverse_n, share), (reverse_n + 1) * share - (1 - share)
        sums_n2 = self.found_n5.new_empty(len(self.found_n5), 2)
        self.chunk.launch("mixed_sums", (len(sums_n2),), self.found_n5, sums_n2, **self.form._asdict())
        value_n, slope_n = sums_n2.unbind(-1)
        return value_n, slope_n

    def coef_n(self, factor: float, dtype: torch.dtype) -> Tensor:
        coef_n = self.term.coef_N.to(dtype) * factor
        return coef_n if self.shrink_n is None else coef_n * self.shrink_n


def _write_gradient(batch: Batch, chunk: Chunk, found_n5: Tensor, scored: Scored, dense: _Dense | None) -> None:
    """(sum over terms of coef * dd/da, scattered, - p * sum of it) * scale / temperature * slope of the soft cap."""
    head, output_nV = batch.student.head, chunk.output_nV
    factor, dtype = head.logit_scale / batch.temperature, output_nV.dtype
    coef_n2, sparse = found_n5.new_zeros(len(found_n5), 2), []
    for part in scored.terms:
        if part.entries.ids_nE is None:
            continue
        grad_nE = part.gradient_nE() * (part.term.coef_N.to(dtype).unsqueeze(-1) * factor)
        coef_n2[:, 1] += grad_nE.sum(-1)
        if head.softcap is not None:
            logits_nE = head.logits(output_nV.gather(-1, part.entries.ids_nE), batch.temperature)
            grad_nE = grad_nE * (1 - (logits_nE * (batch.temperature / head.softcap)) ** 2)
        sparse.append((part.entries.ids_nE, grad_nE))
    form = Form(_NOTHING, 0.0, 1.0)
    if dense is not None:
        chunk, found_n5, form = dense.chunk, dense.found_n5, dense.form
        coef_n2[:, 0] = dense.coef_n(factor, dtype)
        coef_n2[:, 1] += coef_n2[:, 0] * dense.slope_n
    grid = len(output_nV), -(-output_nV.shape[1] // BLOCK)
    chunk.launch("gradients", grid, found_n5, coef_n2, **form._asdict())
    for ids_nE, grad_nE in sparse:
        output_nV.scatter_add_(-1, ids_nE, grad_nE)


def _implicit(output_nV: Tensor, head: Head, temperature: float, log_norm_n: Tensor) -> Implicit:
    return Implicit(output_nV, partial(head.logits, temperature=temperature), log_norm_n.unsqueeze(-1))


def _constants(student: Head, teacher: Head, temperature: float) -> dict[str, float]:
    heads = {"s": student, "t": teacher}
    told = {f"{side}_factor": float(head.logit_scale) for side, head in heads.items()}
    return told | {f"{side}_cap": float(head.softcap or 0.0) for side, head in heads.items()} | {"warmth": temperature}
