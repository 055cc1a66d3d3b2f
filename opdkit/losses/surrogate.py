"""Policy gradients, of the sampled token or of the entries of a support: a value per token and its exact derivative.

Letters: n tokens, E entries; a student's log p (of the sampled token), b the teacher's, A advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.losses.names import SurrogateForm
from opdkit.losses.spec import EntryAdvantage, PolicyGradient
from opdkit.losses.support import Entries

Gradient = Callable[[], Tensor]

# Log-ratios are cut here before exp, as in every published trainer: e^20 is far beyond any clip bound.
MAX_LOG_RATIO = 20.0


def negative_log_likelihood(student_n: Tensor) -> tuple[Tensor, Gradient]:
    """-a."""
    return -student_n, lambda: torch.full_like(student_n, -1.0)


def teacher_advantage(
    student_n: Tensor, teacher_n: Tensor, form: SurrogateForm = "log_prob"
) -> tuple[Tensor, Gradient]:
    """-A a, or -A r with r = exp(a - a held constant) = 1; A = b - a held constant (on-policy distillation on the
    sampled token). One gradient, -A, and two values."""
    advantage_n = (teacher_n - student_n).detach()
    factor_n = student_n if form == "log_prob" else (student_n - student_n.detach()).exp()
    return -advantage_n * factor_n, lambda: -advantage_n


def policy_gradient(
    spec: PolicyGradient, student_n: Tensor, advantage_n: Tensor, old_logprob_n: Tensor | None
) -> tuple[Tensor, Gradient]:
    """-A a; or, given log p before the update, the clipped ratio of PPO (see `PolicyGradient`).

    The derivative of the ratio form is -A r where the unclipped branch is the active one, else 0.
    """
    if old_logprob_n is None:
        return -advantage_n * student_n, lambda: -advantage_n
    log_ratio_n = student_n - old_logprob_n
    ratio_n = log_ratio_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low = None if spec.clip_low is None else 1 - spec.clip_low
    high = None if spec.clip_high is None else 1 + spec.clip_high
    plain_n = -advantage_n * ratio_n
    value_n = plain_n
    if low is not None or high is not None:
        value_n = torch.maximum(plain_n, -advantage_n * ratio_n.clamp(low, high))
    if spec.dual_clip is not None:
        bound_n = torch.where(advantage_n < 0, -advantage_n * spec.dual_clip, torch.inf)
        value_n = torch.minimum(value_n, bound_n)

    def gradient() -> Tensor:
        active_n = (value_n == plain_n) & (log_ratio_n.abs() <= MAX_LOG_RATIO)
        return torch.where(active_n, plain_n, 0.0)

    return value_n, gradient


def entry_advantage(spec: EntryAdvantage, entries: Entries) -> tuple[Tensor, Gradient]:
    """([n] -sum over entries A r, closure giving [n, E] its gradient at the student's entries, -A); r is 1."""
    advantage_nE = entry_advantages(spec, entries)
    ratio_nE = (entries.student_nE - entries.student_nE.detach()).exp()
    return -(advantage_nE * ratio_nE).sum(-1), lambda: -advantage_nE


def entry_advantages(spec: EntryAdvantage, entries: Entries) -> Tensor:
    """[n, E] A = -w (a - b), constant; 0 where an entry is not valid, so that an empty support scores 0."""
    assert entries.teacher_nE is not None
    student_nE, teacher_nE = entries.student_nE.detach(), entries.teacher_nE
    log_weight = {"student_p": student_nE, "teacher_p": teacher_nE, "none": torch.zeros_like(student_nE)}[spec.weight]
    if entries.valid_nE is not None:
        log_weight = log_weight.masked_fill(~entries.valid_nE, -torch.inf)
    weight_nE = log_weight.softmax(-1) if spec.weights_sum_to_one else log_weight.exp()
    advantage_nE = -weight_nE * (student_nE - teacher_nE)
    return advantage_nE if entries.valid_nE is None else advantage_nE.masked_fill(~entries.valid_nE, 0.0)


def kl_estimate(student_n: Tensor, teacher_n: Tensor) -> tuple[Tensor, Gradient]:
    """e^d - d - 1 with d = b - a, cut at its bounds; its derivative 1 - e^d between them."""
    log_ratio_n = teacher_n - student_n
    bounded_n = log_ratio_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def gradient() -> Tensor:
        return torch.where(log_ratio_n.abs() <= MAX_LOG_RATIO, 1 - bounded_n.exp(), 0.0)

    return bounded_n.exp() - bounded_n - 1, gradient
