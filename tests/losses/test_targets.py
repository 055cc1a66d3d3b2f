"""Targets of several views: closed form against dense autograd in float64, what views must say, rows that lack one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import dense_losses as dense
import pytest
import torch
from loss_world import NUM_IDS, NUM_TOKENS, World
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import (
    Divergence,
    Head,
    KLEstimate,
    NegativeLogLikelihood,
    Support,
    Target,
    TeacherAdvantage,
    Term,
    ViewTokens,
    head_loss,
)
from opdkit.losses.names import DivergenceKind
from opdkit.types import Asked

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OWN = {"forward_kl": {}, "reverse_kl": {}, "mixed_kl": {"reverse_share": 0.3}, "renyi": {"order": 0.8}}
TARGETS = [
    Target.of({"teacher": 1.25, "reference": -0.25}),
    Target.of({"teacher": 0.9, "reference": 0.1}),
    Target.of({"teacher": 0.5}),
    Target.of({"teacher": 1.0, "right": 0.5, "reference": -0.7}),
    Target.of({"teacher": 0.6, "reference": 0.4}, "mixture"),
    Target.of({"teacher": 0.5, "right": 0.2, "reference": 0.3}, "mixture"),
]


def views_of(world: World) -> dict[str, ViewTokens]:
    """Three readers of different width, one with a soft cap and one with a scale."""
    random = torch.Generator().manual_seed(7)

    def view(width: int, **head: float) -> ViewTokens:
        weight_VH = torch.randn(NUM_IDS + 1, width, generator=random, dtype=torch.float64)
        hidden_NH = torch.randn(NUM_TOKENS, width, generator=random, dtype=torch.float64)
        return ViewTokens(hidden_NH=hidden_NH, head=Head(weight_VH=weight_VH, num_tokens=NUM_IDS, **head))

    return {"teacher": world.teacher, "reference": view(3, logit_scale=0.5), "right": view(7, softcap=2.0)}


def dense_target(world: World, target: Target, views: dict[str, ViewTokens]) -> Tensor:
    """[N, V] log-probabilities, from the definition."""
    parts = []
    for name, weight in target.weights:
        view = views[name]
        assert view.hidden_NH is not None and view.head is not None
        parts.append((dense.logits(view.hidden_NH, view.head, world.temperature), weight))
    if target.kind == "mixture":
        return sum(weight * logits.softmax(-1) for logits, weight in parts).log()
    return sum(weight * logits for logits, weight in parts).log_softmax(-1)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.kind}-{'-'.join(t.views)}")
@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_every_divergence_of_several_views(kind: str, target: Target, world: World) -> None:
    """Value and gradient equal dense autograd, full vocabulary and top-k supports, chunk by chunk and all at once."""
    views = views_of(world)
    target_NV = dense_target(world, target, views)
    for support in (Support(), Support("student_topk", 3), Support("teacher_topk", 3), Support("union", 2)):
        loss = Divergence(kind, support, **OWN.get(kind, {"teacher_share": 0.3}))
        student_NV = dense.logits(world.hidden_NH, world.head, world.temperature)
        sides = zip(student_NV, target_NV, world.ids_N.tolist(), strict=True)
        value_N = torch.stack(
            [dense.divergence(loss, student, teacher, sampled) for student, teacher, sampled in sides]
        )
        wanted = torch.autograd.grad((world.coef_N * value_N).sum(), world.leaves)
        term = Term(name="loss", loss=loss, coef_N=world.coef_N, target=target)
        for options in ({}, {"chunk_size": 1}, {"gradient": "autograd", "chunk_size": 4}):
            out = world.run(term, views=views, **options)
            torch.testing.assert_close(out.loss.detach(), (world.coef_N * value_N).sum().detach(), **CLOSE)
            for got, expected in zip(torch.autograd.grad(out.loss, world.leaves), wanted, strict=True):
                torch.testing.assert_close(got, expected, **CLOSE)


def test_by_hand() -> None:
    """T = (.8, .2), R = (.5, .5), a = .5: T^a R^(1-a) = (.6325, .3162) -> (.6667, .3333), SR-OPSD's hand check; the
    mixture is (.65, .35). The student is that target itself, so the divergence is 0; of the other one it is not."""
    teacher, reference = (torch.tensor([p], dtype=torch.float64).log() for p in ((0.8, 0.2), (0.5, 0.5)))
    identity = Head(weight_VH=torch.eye(2, dtype=torch.float64), num_tokens=2)
    views = {
        "teacher": ViewTokens(hidden_NH=teacher, head=identity),
        "reference": ViewTokens(hidden_NH=reference, head=identity),
    }
    weights = {"teacher": 0.5, "reference": 0.5}
    students = {"logits": (2 / 3, 1 / 3), "mixture": (0.65, 0.35)}
    for kind, probabilities in students.items():
        student = torch.tensor([probabilities], dtype=torch.float64).log()
        for other in students:
            term = Term(
                name="loss",
                loss=Divergence("reverse_kl"),
                coef_N=torch.ones(1),
                target=Target.of(weights, other),  # type: ignore[arg-type]
            )
            loss = float(head_loss(student, identity, torch.zeros(1, dtype=torch.long), [term], views).loss)
            assert (abs(loss) < 1e-12) == (kind == other)


def test_sampled_form_sums_the_views(world: World) -> None:
    """G-OPD by hand: 1.25 log T - .25 log R - log S = 1.25 * -1 - .25 * -2 + 1.5 = .75; plain OPD .5. It takes each
    view's word on the sampled token, or reads the same from hidden states; a mixture takes the log of the mean."""
    said = {"teacher": -1.0, "reference": -2.0}
    views = {
        name: ViewTokens(sampled_logprob_N=torch.full((1,), value, dtype=torch.float64)) for name, value in said.items()
    }
    head = Head(weight_VH=torch.eye(2, dtype=torch.float64), num_tokens=2)
    hidden = torch.tensor([[math.exp(-1.5), 1 - math.exp(-1.5)]], dtype=torch.float64).log()

    def advantage(target: Target) -> float:
        term = Term(name="loss", loss=TeacherAdvantage("ratio"), coef_N=torch.ones(1), target=target)
        return -float(head_loss(hidden, head, torch.zeros(1, dtype=torch.long), [term], views).loss)

    assert advantage(Target.of({"teacher": 1.25, "reference": -0.25})) == pytest.approx(0.75)
    assert advantage(Target()) == pytest.approx(0.5)
    half = Target.of({"teacher": 0.5, "reference": 0.5}, "mixture")
    assert advantage(half) == pytest.approx(math.log((math.exp(-1) + math.exp(-2)) / 2) + 1.5)

    read = views_of(world)
    listed = {}
    for name, view in read.items():
        assert view.hidden_NH is not None and view.head is not None
        logprob_NV = dense.logits(view.hidden_NH, view.head, world.temperature).log_softmax(-1)
        listed[name] = ViewTokens(sampled_logprob_N=logprob_NV.gather(-1, world.ids_N[:, None])[:, 0])
    term = Term(name="loss", loss=TeacherAdvantage(), coef_N=world.coef_N, target=TARGETS[3])
    for got, wanted in zip(world.gradients(term, views=listed), world.gradients(term, views=read), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_what_views_must_say() -> None:
    """A whole target asks what its loss asks; a combination of logits has no list and no norm without distributions."""
    two = Target.of({"teacher": 2.0, "reference": -1.0})
    lists = Divergence("forward_kl", Support("teacher_topk", 4))
    assert Target().asks(lists) == {"teacher": Asked("topk", 4)}
    assert two.asks(lists) == dict.fromkeys(("reference", "teacher"), Asked("distribution"))
    assert two.asks(TeacherAdvantage()) == dict.fromkeys(("reference", "teacher"), Asked("sampled"))
    assert two.asks(KLEstimate()) == dict.fromkeys(("reference", "teacher"), Asked("distribution"))
    mixture = Target.of({"teacher": 0.5, "reference": 0.5}, "mixture")
    assert mixture.asks(KLEstimate()) == dict.fromkeys(("reference", "teacher"), Asked("sampled"))
    assert two.asks(NegativeLogLikelihood()) == {}


@pytest.mark.parametrize(
    ("weights", "kind"),
    [({}, "logits"), ({"a": math.nan}, "logits"), ({"a": 0.0}, "logits"), ({"a": 0.5, "b": 0.6}, "mixture"),
     ({"a": 1.5, "b": -0.5}, "mixture"), ({"a": 1.0}, "sum")],
)  # fmt: skip
def test_weights_that_name_no_distribution_are_refused(weights: dict[str, float], kind: str) -> None:
    with pytest.raises(UserError):
        Target.of(weights, kind)  # type: ignore[arg-type]


def test_rows_that_lack_a_view_leave_its_terms_only(world: World) -> None:
    """Tokens with coefficient 0 in the terms that ask a view may be NaN there, and the other terms still count them:
    the gradient is that of the sum of both terms, each over its own tokens."""
    views = views_of(world)
    lacking_N = torch.tensor([True, False, False, True, True, False])
    unknown_NH = views["reference"].hidden_NH
    assert unknown_NH is not None
    holed = {**views, "reference": replace(views["reference"], hidden_NH=unknown_NH.clone())}
    assert holed["reference"].hidden_NH is not None
    holed["reference"].hidden_NH[lacking_N] = torch.nan
    coef_N = torch.linspace(0.1, 0.6, NUM_TOKENS, dtype=torch.float64)
    both = Term(name="both", loss=Divergence("reverse_kl"), coef_N=coef_N.masked_fill(lacking_N, 0), target=TARGETS[0])
    alone = Term(name="alone", loss=Divergence("forward_kl"), coef_N=coef_N)
    out = world.run(both, alone, views=holed)
    assert out.view_sampled_logprob["reference"].isnan().equal(lacking_N)
    assert not out.view_sampled_logprob["teacher"].isnan().any()
    got = torch.autograd.grad(out.loss, world.leaves)
    parts = [world.gradients(term, views=views) for term in (both, alone)]
    for grad, first, second in zip(got, *parts, strict=True):
        torch.testing.assert_close(grad, first + second, **CLOSE)


def test_a_view_that_nobody_gave_is_named(world: World) -> None:
    term = Term(name="loss", loss=Divergence("reverse_kl"), coef_N=world.coef_N, target=TARGETS[0])
    with pytest.raises(ValueError, match="needs of view 'reference' hidden_NH and head"):
        world.run(term, views={"teacher": world.teacher})
