"""Divergences between teacher and student: a value per token, and its exact gradient at the student's entries.

Each kind but `renyi` is a sum over entries of d, a function of a = log p (student) and b = log q (teacher) there. Its
function returns d and a closure for dd/da, both entrywise; nothing assumes that the entries sum to one, so the same
code serves the full vocabulary and every support and tail. The chain to the logits is finished in `head.py`:

    dL/dz_v = (g_v - p_v * sum of g) / T,   g = dd/da scattered to the vocabulary, zero off the support.

With the full vocabulary this gives the textbook forms: forward KL p - q, reverse KL p (log p - log q - KL),
JSD (1 - s) p (l - sum p l) with l = log p - log m.
Letters: n tokens, E entries, p student, q teacher, m mixture, s teacher_share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.losses.spec import Divergence
from opdkit.losses.support import Entries
from opdkit.losses.tail import apply_tail

Gradient = Callable[[], Tensor]

# log p of an entry that is not there. Equal on both sides and finite, so that every term and gradient is exactly 0.
ABSENT = -1e4
# Beyond exp(80) one side's probability is below 1e-34 and its terms vanish; fp32's exp overflows at 88.
MAX_LOG_RATIO = 80.0
# Of either side in a mixture: from here on a gap to the mixture is no small difference of large numbers.
MIN_PLAIN_SHARE = 0.25


def divergence(spec: Divergence, entries: Entries) -> tuple[Tensor, Gradient, Tensor | None]:
    """([n] value in nats, closure giving [n, E] its gradient with respect to `entries.student_nE`, [n] the value as it
    was before a clip, detached, or None without one).

    Tokens without a valid entry (an empty intersection or difference) have value 0 and gradient 0. The value is
    differentiable by autograd; the closure gives the same gradient in closed form, may reuse memory the value was
    computed in, and is called at most once, outside autograd.
    """
    assert entries.teacher_nE is not None
    student_nE, teacher_nE, valid_nE = entries.student_nE, entries.teacher_nE, entries.valid_nE
    prob_nE, teacher_prob_nE, floored_nE = entries.student_prob_nE, entries.teacher_prob_nE, None
    if spec.logprob_floor is not None:
        prob_nE, teacher_prob_nE, floored_nE = None, None, student_nE < spec.logprob_floor
        student_nE, teacher_nE = student_nE.clamp(min=spec.logprob_floor), teacher_nE.clamp(min=spec.logprob_floor)
    if valid_nE is not None:
        student_nE, teacher_nE = student_nE.masked_fill(~valid_nE, ABSENT), teacher_nE.masked_fill(~valid_nE, ABSENT)
    through_tail = None
    if entries.ids_nE is not None:
        student_nE, teacher_nE, through_tail = apply_tail(spec.tail, student_nE, teacher_nE)

    term_nE, gradient = _terms(spec, Sides(student_nE, teacher_nE, prob_nE, teacher_prob_nE))
    empty_n = None if valid_nE is None else ~valid_nE.any(-1)

    def total(term_nE: Tensor) -> Tensor:
        return term_nE.sum(-1) if empty_n is None else term_nE.sum(-1).masked_fill(empty_n, 0.0)

    clipped_nE, shrink_n, unclipped_n = None, None, None
    if spec.entry_clip is not None:
        unclipped_n, clipped_nE = total(term_nE).detach(), term_nE > spec.entry_clip
        term_nE = term_nE.clamp(max=spec.entry_clip)
    value_n = total(term_nE)
    if spec.token_clip is not None:
        unclipped_n = value_n.detach()
        shrink_n = torch.where(unclipped_n > spec.token_clip, spec.token_clip / unclipped_n, 1.0)
        value_n = value_n * shrink_n

    def gradient_nE() -> Tensor:
        grad_nE = gradient()
        if clipped_nE is not None:
            grad_nE = grad_nE.masked_fill(clipped_nE, 0.0)
        if through_tail is not None:
            grad_nE = through_tail(grad_nE)
        if floored_nE is not None:
            grad_nE = grad_nE.masked_fill(floored_nE, 0.0)
        if shrink_n is not None:
            grad_nE = grad_nE * shrink_n.unsqueeze(-1)
        return grad_nE if valid_nE is None else grad_nE.masked_fill(~valid_nE, 0.0)

    return value_n, gradient_nE, unclipped_n


class Sides:
    """log p, log q, and the probabilities p and q, taken once a formula asks for them."""

    def __init__(
        self, student_nE: Tensor, teacher_nE: Tensor, student_prob_nE: Tensor | None, teacher_prob_nE: Tensor | None
    ) -> None:
        self.student_nE, self.teacher_nE = student_nE, teacher_nE
        self._student_prob_nE, self._teacher_prob_nE = student_prob_nE, teacher_prob_nE
        self.probs_at_hand = student_prob_nE is not None and teacher_prob_nE is not None

    @property
    def student_prob_nE(self) -> Tensor:
        if self._student_prob_nE is None:
            self._student_prob_nE = self.student_nE.exp()
        return self._student_prob_nE

    @property
    def teacher_prob_nE(self) -> Tensor:
        if self._teacher_prob_nE is None:
            self._teacher_prob_nE = self.teacher_nE.exp()
        return self._teacher_prob_nE


def _terms(spec: Divergence, sides: Sides) -> tuple[Tensor, Gradient]:
    kind, share = spec.kind, spec.teacher_share
    if kind == "jsd" and spec.scale == "continuous" and share in (0, 1):
        kind = "forward_kl" if share == 0 else "reverse_kl"
    if kind == "forward_kl":
        return forward_kl(sides)
    if kind == "reverse_kl":
        return reverse_kl(sides)
    if kind == "mixed_kl":
        assert spec.reverse_share is not None
        return mixed_kl(sides, spec.reverse_share)
    if kind == "renyi":
        assert spec.order is not None
        return renyi(sides, spec.order)
    assert share is not None
    if kind == "jsd":
        return jsd(sides, share, 1 / (share * (1 - share)) if spec.scale == "continuous" else 1.0)
    if kind == "skewed_forward_kl":
        return skewed_forward_kl(sides, share)
    return skewed_reverse_kl(sides, share)


def forward_kl(sides: Sides) -> tuple[Tensor, Gradient]:
    """KL(teacher || student): d = q (log q - log p), dd/da = -q."""
    term_nE = (sides.teacher_nE - sides.student_nE).mul_(sides.teacher_prob_nE)
    return term_nE, lambda: torch.neg(sides.teacher_prob_nE, out=term_nE)


def reverse_kl(sides: Sides) -> tuple[Tensor, Gradient]:
    """KL(student || teacher): d = p (log p - log q), dd/da = d + p."""
    term_nE = (sides.student_nE - sides.teacher_nE).mul_(sides.student_prob_nE)
    return term_nE, lambda: term_nE.add_(sides.student_prob_nE)


def mixed_kl(sides: Sides, reverse_share: float) -> tuple[Tensor, Gradient]:
    """(1 - b) KL(teacher || student) + b KL(student || teacher): the sum of both terms and of both derivatives."""
    forward_nE, forward_gradient = forward_kl(sides)
    reverse_nE, reverse_gradient = reverse_kl(sides)
    value_nE = torch.lerp(forward_nE, reverse_nE, reverse_share)
    return value_nE, lambda: torch.lerp(forward_gradient(), reverse_gradient(), reverse_share)


def renyi(sides: Sides, order: float) -> tuple[Tensor, Gradient]:
    """1 / (r - 1) log sum q^r p^(1 - r), as one term [n, 1]; dd/da = -q^r p^(1 - r) / sum. arXiv:2608.09745."""
    log_weight_nE = order * sides.teacher_nE + (1 - order) * sides.student_nE
    log_sum_n1 = log_weight_nE.logsumexp(-1, keepdim=True)
    return log_sum_n1 / (order - 1), lambda: -(log_weight_nE - log_sum_n1).exp()


def jsd(sides: Sides, share: float, scale: float) -> tuple[Tensor, Gradient]:
    """scale * ((1 - s) KL(student || m) + s KL(teacher || m)): dd/da = scale (1 - s) p (log p - log m)."""
    student_gap_nE, teacher_gap_nE = mixture_gaps(sides, share)
    student_term_nE = student_gap_nE.mul_(sides.student_prob_nE).mul_(scale * (1 - share))
    term_nE = torch.addcmul(student_term_nE, sides.teacher_prob_nE, teacher_gap_nE, value=scale * share)
    return term_nE, lambda: student_term_nE


def skewed_forward_kl(sides: Sides, share: float) -> tuple[Tensor, Gradient]:
    """KL(teacher || m): d = q (log q - log m), dd/da = -(1 - s) q p / m."""
    student_gap_nE, teacher_gap_nE = mixture_gaps(sides, share)
    prob_nE = sides.teacher_prob_nE
    return prob_nE * teacher_gap_nE, lambda: student_gap_nE.exp() * prob_nE * (share - 1)


def skewed_reverse_kl(sides: Sides, share: float) -> tuple[Tensor, Gradient]:
    """KL(student || m): d = p (log p - log m), dd/da = d + s p q / m."""
    student_gap_nE, teacher_gap_nE = mixture_gaps(sides, share)
    prob_nE = sides.student_prob_nE
    term_nE = prob_nE * student_gap_nE
    return term_nE, lambda: term_nE + teacher_gap_nE.exp() * prob_nE * share


def mixture_gaps(sides: Sides, share: float) -> tuple[Tensor, Tensor]:
    """(log p - log m, log q - log m) for m = (1 - s) p + s q.

    log1p and expm1 keep the gap to the nearer side exact: where p and q are nearly 1, as a tail's can be, and where s
    approaches 0 or 1, so that p (log p - log m) / s is a ratio of two vanishing numbers. Of a whole vocabulary, away
    from these ends, log m from the probabilities is as exact as the logits are, in half the time.
    """
    student_nE, teacher_nE = sides.student_nE, sides.teacher_nE
    if sides.probs_at_hand and MIN_PLAIN_SHARE <= share <= 1 - MIN_PLAIN_SHARE:
        mixture_nE = torch.lerp(sides.student_prob_nE, sides.teacher_prob_nE, share)
        surprise_nE = mixture_nE.clamp_(min=torch.finfo(mixture_nE.dtype).tiny).log_().neg_()
        return student_nE + surprise_nE, surprise_nE.add_(teacher_nE)
    log_ratio_nE = (teacher_nE - student_nE).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if share <= 0.5:
        student_gap_nE = -torch.log1p(share * torch.expm1(log_ratio_nE))
        return student_gap_nE, student_gap_nE + log_ratio_nE
    teacher_gap_nE = -torch.log1p((1 - share) * torch.expm1(-log_ratio_nE))
    return teacher_gap_nE - log_ratio_nE, teacher_gap_nE
