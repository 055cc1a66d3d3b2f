"""The clip on a token's loss: it makes a loss smaller, and never turns its gradient. And what is said of both clips."""

from __future__ import annotations

from math import log
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import Divergence, Head, HeadOutput, Support, TeacherAdvantage, Term, ViewTokens, head_loss
from opdkit.losses.names import DivergenceKind, SupportKind
from opdkit.losses.spec import LossSpec

CLIP = 0.05


def run(student_NV: Tensor, teacher_NV: Tensor, loss: LossSpec, **options: Any) -> tuple[HeadOutput, Tensor]:
    """The loss of every token with coefficient 1, and its gradient with respect to the logits."""
    student_NV = student_NV.clone().requires_grad_()
    identity = Head(weight_VH=torch.eye(student_NV.shape[-1], dtype=student_NV.dtype), num_tokens=student_NV.shape[-1])
    ones_N = torch.ones(len(student_NV), dtype=student_NV.dtype)
    out = head_loss(
        student_NV,
        identity,
        torch.zeros(len(student_NV), dtype=torch.long),
        [Term(name="d", loss=loss, coef_N=ones_N)],
        ViewTokens(hidden_NH=teacher_NV, head=identity),
        **options,
    )
    return out, torch.autograd.grad(out.loss, student_NV)[0]


def logs(*probs: float) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def random_logits() -> Tensor:
    return 2 * torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_by_hand() -> None:
    """p = (.5, .3, .2), q = (.9, .06, .04): D = .9 ln 1.8 + .1 ln .2 = 0.368. Clipped at 0.05 the value is 0.05 and the
    gradient (p - q) 0.05 / D. The per-entry clip turns the same gradient round (`test_by_hand.py`)."""
    distance = 0.9 * log(1.8) + 0.1 * log(0.2)
    out, grad = run(logs(0.5, 0.3, 0.2), logs(0.9, 0.06, 0.04), Divergence("forward_kl", token_clip=CLIP))
    assert out.loss.item() == pytest.approx(CLIP)
    assert out.unclipped_loss["d"].item() == pytest.approx(distance)
    assert grad[0].tolist() == pytest.approx([x * CLIP / distance for x in (-0.4, 0.24, 0.16)])


def test_a_loss_below_the_clip_is_left_alone() -> None:
    """Value and gradient are bit for bit those without a clip."""
    student, teacher = logs(0.5, 0.3, 0.2), logs(0.48, 0.31, 0.21)
    plain, clipped = (run(student, teacher, Divergence("reverse_kl", token_clip=clip)) for clip in (None, CLIP))
    assert plain[0].loss < CLIP and torch.equal(plain[0].loss, clipped[0].loss) and torch.equal(plain[1], clipped[1])
    assert plain[0].unclipped_loss == {}


@pytest.mark.parametrize("gradient", ["closed_form", "autograd"])
@pytest.mark.parametrize("support", get_args(SupportKind))
@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_never_turns_the_gradient(kind: str, support: str, gradient: str) -> None:
    """On random distributions, for every divergence and support and both paths: the gradient with the clip is the one
    without it, times min(1, c / D) token by token; no component changes its sign."""
    student_NV, teacher_NV = random_logits()
    chosen = Support(support) if support in ("full", "sampled") else Support(support, 3)
    ends: dict[str, dict[str, float]] = {"forward_kl": {}, "reverse_kl": {}}
    own = {**ends, "mixed_kl": {"reverse_share": 0.4}, "renyi": {"order": 0.6}}.get(kind, {"teacher_share": 0.4})
    options = {"temperature": 1.3, "gradient": gradient, "chunk_size": 7}
    plain, expected_NV = run(student_NV, teacher_NV, Divergence(kind, chosen, **own), **options)
    spec = Divergence(kind, chosen, **own, token_clip=CLIP)
    clipped, grad_NV = run(student_NV, teacher_NV, spec, **options)
    value_N = plain.token_loss["d"]
    assert (value_N > CLIP).any()
    factor_N = torch.where(value_N > CLIP, CLIP / value_N, 1.0)
    torch.testing.assert_close(clipped.token_loss["d"], value_N.clamp(max=CLIP), rtol=1e-12, atol=0)
    torch.testing.assert_close(clipped.unclipped_loss["d"], value_N, rtol=0, atol=0)
    torch.testing.assert_close(grad_NV, expected_NV * factor_N.unsqueeze(-1), rtol=1e-10, atol=1e-12)
    assert (grad_NV * expected_NV >= 0).all()


def test_descent_arrives_at_the_teacher_which_the_entry_clip_does_not() -> None:
    """Gradient descent from p = (.5, .3, .2) towards q = (.9, .06, .04), both clips at 0.05: by token it ends at q, by
    entry it drives the teacher's favourite token below 0.01: the published fault."""
    teacher = logs(0.9, 0.06, 0.04)
    ends = {}
    for name in ("token_clip", "entry_clip"):
        student = logs(0.5, 0.3, 0.2)
        for _ in range(4000):
            student = student - run(student, teacher, Divergence("forward_kl", **{name: CLIP}))[1]
        ends[name] = student.softmax(-1)[0].tolist()
    assert ends["token_clip"] == pytest.approx([0.9, 0.06, 0.04], abs=1e-6)
    assert ends["entry_clip"][0] < 0.01


def test_what_was_clipped_is_said_for_both_clips() -> None:
    """`unclipped_loss` is the loss without the clip, for tokens that count; NaN, as all else, for those that do not."""
    student_NV, teacher_NV = random_logits()
    plain = run(student_NV, teacher_NV, Divergence("forward_kl"))[0].token_loss["d"]
    for clip in ({"token_clip": CLIP}, {"entry_clip": CLIP}):
        out = run(student_NV, teacher_NV, Divergence("forward_kl", **clip))[0]
        torch.testing.assert_close(out.unclipped_loss["d"], plain)
        assert (out.token_loss["d"] <= plain).all()


def test_two_clips_are_refused() -> None:
    with pytest.raises(UserError, match="two ways to clip one loss"):
        Divergence("forward_kl", token_clip=0.05, entry_clip=0.05)
    with pytest.raises(UserError, match="token_clip = 0 must be above 0"):
        Divergence("forward_kl", token_clip=0)


@pytest.mark.parametrize("gradient", ["closed_form", "autograd"])
def test_two_forms_of_the_sampled_surrogate(gradient: str) -> None:
    """-A log p and -A r have one gradient; the value of the second is -A = log p - log q, here ln .5/.8."""
    student, teacher = logs(0.5, 0.5), logs(0.8, 0.2)
    by_log, by_ratio = (
        run(student, teacher, TeacherAdvantage(form), gradient=gradient) for form in ("log_prob", "ratio")
    )
    assert by_ratio[0].loss.item() == pytest.approx(log(0.5 / 0.8))
    assert by_log[0].loss.item() == pytest.approx(-log(0.8 / 0.5) * log(0.5))
    torch.testing.assert_close(by_log[1], by_ratio[1])
