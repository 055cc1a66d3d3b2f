"""Policy gradients over entries, and the k3 estimate: by hand, against dense autograd, and which of them descend."""

from __future__ import annotations

from typing import get_args

import dense_losses as dense
import pytest
import torch
from loss_world import World
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import EntryAdvantage, Head, KLEstimate, Support, Term, ViewTokens, head_loss
from opdkit.losses.names import EntryWeight, SupportKind

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
PATHS = [("closed_form", 1), ("closed_form", 4), ("closed_form", None), ("autograd", 4)]
SUPPORTS = [kind for kind in get_args(SupportKind) if kind != "sampled"]


def support(kind: str, k: int = 3) -> Support:
    return Support(kind) if kind == "full" else Support(kind, k)


def dense_value(spec: EntryAdvantage, student: Tensor, teacher: Tensor, sampled: int) -> Tensor:
    """-sum A exp(log p - constant), entry by entry from probabilities; shares no code with the library."""
    ids = dense.chosen(spec.support.kind, spec.support.k, student, teacher, sampled)
    if not ids:
        return (student * 0).sum()
    p, q = student.softmax(-1)[ids], teacher.softmax(-1)[ids]
    weight = {"student_p": p, "teacher_p": q, "none": torch.ones_like(p)}[spec.weight].detach()
    if spec.support.kind != "symmetric_difference":
        weight = weight / weight.sum()
    advantage = weight * (q / p).log().detach()
    return -(advantage * p / p.detach()).sum()


@pytest.mark.parametrize("weight", get_args(EntryWeight))
@pytest.mark.parametrize("kind", SUPPORTS)
def test_equals_dense_autograd(kind: str, weight: str, world: World) -> None:
    """Values and gradients to 1e-10 for hidden states, head and bias, any chunk size, both gradient paths."""
    loss = EntryAdvantage(support(kind), weight)
    student_NV = dense.logits(world.hidden_NH, world.head, world.temperature)
    assert world.teacher.hidden_NH is not None and world.teacher.head is not None
    teacher_NV = dense.logits(world.teacher.hidden_NH, world.teacher.head, world.temperature)
    sides = zip(student_NV, teacher_NV, world.ids_N.tolist(), strict=True)
    value_N = torch.stack([dense_value(loss, student, teacher, sampled) for student, teacher, sampled in sides])
    expected = torch.autograd.grad((world.coef_N * value_N).sum(), world.leaves)
    assert max(grad.abs().max() for grad in expected) > 1e-3
    for gradient, chunk_size in PATHS:
        out = world.run(world.term(loss), chunk_size=chunk_size, gradient=gradient)
        torch.testing.assert_close(out.loss.detach(), (world.coef_N * value_N).sum().detach(), **CLOSE)
        for got, wanted in zip(torch.autograd.grad(out.loss, world.leaves), expected, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_k3_equals_dense_autograd(world: World) -> None:
    """e^d - d - 1 of the sampled token, and its gradient."""
    student_NV = dense.logits(world.hidden_NH, world.head, world.temperature).log_softmax(-1)
    assert world.teacher.hidden_NH is not None and world.teacher.head is not None
    teacher_NV = dense.logits(world.teacher.hidden_NH, world.teacher.head, world.temperature).log_softmax(-1)
    d_N = (teacher_NV - student_NV).gather(-1, world.ids_N[:, None]).squeeze(-1)
    expected = torch.autograd.grad((world.coef_N * (d_N.exp() - d_N - 1)).sum(), world.leaves)
    for gradient, chunk_size in PATHS:
        got = world.gradients(world.term(KLEstimate()), gradient=gradient, chunk_size=chunk_size)
        for found, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)


def one_token(student: list[float], teacher: list[float], loss: object, sampled: int = 0) -> tuple[float, list[float]]:
    """(value, gradient with respect to the logits) for probabilities written out."""
    hidden = torch.tensor([student], dtype=torch.float64).log().requires_grad_()
    identity = Head(weight_VH=torch.eye(len(student), dtype=torch.float64), num_tokens=len(student))
    said = ViewTokens(hidden_NH=torch.tensor([teacher], dtype=torch.float64).log(), head=identity)
    term = Term(name="loss", loss=loss, coef_N=torch.ones(1, dtype=torch.float64))  # type: ignore[arg-type]
    out = head_loss(hidden, identity, torch.tensor([sampled]), [term], said)
    return out.loss.item(), torch.autograd.grad(out.loss, hidden)[0][0].tolist()


def test_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4). Over the student's top 1: w = 1, A = -log 2, gradient log 2 (1 - p).
    Over everything by p: the gradient of KL(p || q), whose value is log 2 / 4. k3 of token 0: 1/2 - 1 + log 2."""
    p, q, log2 = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], 0.6931471805599453
    value, gradient = one_token(p, q, EntryAdvantage(Support("student_topk", 1)))
    assert value == pytest.approx(log2)
    assert gradient == pytest.approx([log2 * 0.5, -log2 * 0.25, -log2 * 0.25])
    value, gradient = one_token(p, q, EntryAdvantage(Support("full")))
    assert value == pytest.approx(log2 / 4)
    assert gradient == pytest.approx([a * (b - log2 / 4) for a, b in zip(p, [log2, -log2, 0.0], strict=True)])
    value, gradient = one_token(p, q, KLEstimate())
    assert value == pytest.approx(0.5 - 1 + log2)
    assert gradient == pytest.approx([0.5 * 0.5, -0.5 * 0.25, -0.5 * 0.25])


def test_empty_supports_score_nothing() -> None:
    """Equal lists have an empty symmetric difference, disjoint ones an empty intersection: 0, gradient 0, not 0/0."""
    p, q = [0.7, 0.2, 0.1], [0.6, 0.3, 0.1]
    for kind, teacher in (("symmetric_difference", q), ("intersection", q[::-1])):
        value, gradient = one_token(p, teacher, EntryAdvantage(Support(kind, 1), "none"))
        assert (value, gradient) == (0.0, [0.0, 0.0, 0.0])


def test_k3_is_zero_where_the_reference_agrees_and_bounded_where_it_is_far() -> None:
    assert one_token([0.5, 0.5], [0.5, 0.5], KLEstimate()) == (0.0, [0.0, 0.0])
    value, gradient = one_token([1e-30, 1.0], [1.0, 1e-30], KLEstimate())
    assert value == pytest.approx(torch.tensor(20.0).double().exp().item() - 21) and gradient == [0.0, 0.0]


def test_refused() -> None:
    with pytest.raises(UserError, match="no entries to weigh"):
        EntryAdvantage(Support("sampled"))
    with pytest.raises(UserError, match="entry weight = 'p' is not one of"):
        EntryAdvantage(Support("full"), "p")
