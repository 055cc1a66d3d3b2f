"""The losses once more, written token by token from their definitions on probabilities, and differentiated by autograd.

Shares no code with opdkit: a mistake in one is not repeated in the other. Slow; only for a handful of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses import Divergence, Head


def logits(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Logits / temperature over the real vocabulary."""
    bias = None if head.bias_V is None else head.bias_V[: head.num_tokens]
    z = F.linear(hidden, head.weight_VH[: head.num_tokens], bias) * head.logit_scale
    if head.softcap is not None:
        z = z / head.softcap
        z = torch.tanh(z)
        z = z * head.softcap
    return z / temperature


def chosen(kind: str, k: int | None, student: Tensor, teacher: Tensor, sampled: int) -> list[int]:
    """The ids of a support, as a set."""
    if kind == "full":
        return list(range(len(student)))
    if kind == "sampled":
        return [sampled]
    ours, theirs = (set(z.detach().sort(descending=True).indices[:k].tolist()) for z in (student, teacher))
    sets = {
        "student_topk": ours,
        "teacher_topk": theirs,
        "union": ours | theirs,
        "intersection": ours & theirs,
        "symmetric_difference": ours ^ theirs,
    }
    return sorted(sets[kind])


def divergence(spec: Divergence, student: Tensor, teacher: Tensor, sampled: int) -> Tensor:
    """The value for one token, from both sides' logits / temperature, [V] each."""
    ids = chosen(spec.support.kind, spec.support.k, student, teacher, sampled)
    if not ids:
        return (student * 0).sum()
    all_p, all_q = student.softmax(-1), teacher.softmax(-1)
    if spec.logprob_floor is not None:
        all_p, all_q = (x.log().clamp(min=spec.logprob_floor).exp() for x in (all_p, all_q))
    p, q = all_p[ids], all_q[ids]
    if spec.support.kind != "full":
        if spec.tail == "bucket":
            p, q = torch.cat([p, 1 - p.sum(-1, keepdim=True)]), torch.cat([q, 1 - q.sum(-1, keepdim=True)])
        if spec.tail == "renormalise":
            p = p / p.sum()
        if spec.tail in ("renormalise", "renormalise_teacher"):
            q = q / q.sum()
    terms = _terms(spec, p, q)
    if spec.entry_clip is not None:
        terms = torch.where(terms > spec.entry_clip, spec.entry_clip, terms)
    return terms.sum()


def _terms(spec: Divergence, p: Tensor, q: Tensor) -> Tensor:
    a = spec.teacher_share
    if spec.kind == "forward_kl":
        return q * (q / p).log()
    if spec.kind == "reverse_kl":
        return p * (p / q).log()
    if spec.kind == "mixed_kl":
        b = spec.reverse_share
        assert b is not None
        return (1 - b) * q * (q / p).log() + b * p * (p / q).log()
    if spec.kind == "renyi":
        r = spec.order
        assert r is not None
        return ((q**r) * (p ** (1 - r))).sum(-1, keepdim=True).log() / (r - 1)
    assert a is not None
    m = (1 - a) * p + a * q
    if spec.kind == "skewed_forward_kl":
        return q * (q / m).log()
    if spec.kind == "skewed_reverse_kl":
        return p * (p / m).log()
    value = (1 - a) * p * (p / m).log() + a * q * (q / m).log()
    return value / (a * (1 - a)) if spec.scale == "continuous" else value
