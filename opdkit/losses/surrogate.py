"""Losses of the sampled token's log-probability alone: a value per token and its exact derivative.

Letters: n tokens; a student's log p of the sampled token, b the teacher's, A advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.losses.names import SurrogateForm
from opdkit.losses.spec import PolicyGradient

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
