"""What becomes of the probability mass outside a support.

    bucket               one more entry on both sides, log(1 - mass inside): the result is a true divergence between the
                         coarsened distributions, a lower bound of the full one, and 0 only if the coarse views agree
    renormalise          both sides divided by their mass inside; the student's mass outside is not constrained
    renormalise_teacher  only the teacher is divided; the student keeps its full-vocabulary probabilities (EOPD)
    drop                 nothing: the sum runs over the entries alone, and may be negative

Letters: n tokens, E entries of the support, F entries after the tail (E + 1 for the bucket, else E).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.losses.names import TailKind

# The published clamp (SDPO, TRL): the mass inside is at most exp(-1e-7), so that the bucket's logarithm stays finite.
MAX_LOG_MASS = -1e-7

Pullback = Callable[[Tensor], Tensor]


def apply_tail(tail: TailKind, student_nE: Tensor, teacher_nE: Tensor) -> tuple[Tensor, Tensor, Pullback]:
    """(student_nF, teacher_nF, pullback): both sides with the tail applied, in nats.

    `pullback` turns a gradient [n, F] with respect to student_nF into one [n, E] with respect to student_nE.
    """
    if tail == "drop":
        return student_nE, teacher_nE, lambda grad_nE: grad_nE
    if tail == "renormalise_teacher":
        return student_nE, _renormalise(teacher_nE), lambda grad_nE: grad_nE
    if tail == "renormalise":
        student_nF = _renormalise(student_nE)

        def through_renormalise(grad_nF: Tensor) -> Tensor:
            return grad_nF - student_nF.exp() * grad_nF.sum(-1, keepdim=True)

        return student_nF, _renormalise(teacher_nE), through_renormalise

    log_mass_n1, student_tail_n1 = _tail(student_nE)
    _, teacher_tail_n1 = _tail(teacher_nE)

    def through_bucket(grad_nF: Tensor) -> Tensor:
        # d log(1 - mass) / d log p_v = -p_v / (1 - mass); the clamp is flat beyond its bound.
        slope_n1 = torch.where(log_mass_n1 <= MAX_LOG_MASS, grad_nF[:, -1:], 0.0)
        return grad_nF[:, :-1] - slope_n1 * (student_nE - student_tail_n1).exp()

    return torch.cat([student_nE, student_tail_n1], -1), torch.cat([teacher_nE, teacher_tail_n1], -1), through_bucket


def _renormalise(logprob_nE: Tensor) -> Tensor:
    return logprob_nE - logprob_nE.logsumexp(-1, keepdim=True)


def _tail(logprob_nE: Tensor) -> tuple[Tensor, Tensor]:
    """(log of the mass inside, log of the mass outside), each [n, 1]. expm1 keeps small tails exact."""
    log_mass_n1 = logprob_nE.logsumexp(-1, keepdim=True)
    return log_mass_n1, torch.log(-torch.expm1(log_mass_n1.clamp(max=MAX_LOG_MASS)))
