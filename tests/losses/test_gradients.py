"""Closed-form gradients against dense autograd (`dense_losses.py`), float64 to 1e-10: hidden states, head and bias."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import dense_losses as dense
import pytest
import torch
from loss_world import NUM_IDS, World, make_world
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import Divergence, NegativeLogLikelihood, PolicyGradient, Support, TeacherAdvantage, Term, heads
from opdkit.losses.heads import ROW_MULTIPLE, Projector
from opdkit.losses.names import DivergenceKind, SupportKind, TailKind

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
PATHS = [("closed_form", 1), ("closed_form", 4), ("closed_form", 64), ("closed_form", None), ("autograd", 4)]


def support(kind: str) -> Support:
    return Support(kind) if kind in ("full", "sampled") else Support(kind, 3)


def spec(kind: str, kind_of_support: str, tail: str = "bucket", **options: float) -> Divergence:
    own = {"mixed_kl": {"reverse_share": 0.3}, "renyi": {"order": 0.8}, "forward_kl": {}, "reverse_kl": {}}
    return Divergence(kind, support(kind_of_support), tail, **own.get(kind, {"teacher_share": 0.3}), **options)


def dense_gradients(world: World, loss: Divergence) -> tuple[list[Tensor], Tensor]:
    """([grad per leaf], [N] values) of sum over tokens coef * divergence on full logits."""
    student_NV = dense.logits(world.hidden_NH, world.head, world.temperature)
    assert world.teacher.hidden_NH is not None and world.teacher.head is not None
    teacher_NV = dense.logits(world.teacher.hidden_NH, world.teacher.head, world.temperature)
    sides = zip(student_NV, teacher_NV, world.ids_N.tolist(), strict=True)
    value_N = torch.stack([dense.divergence(loss, student, teacher, sampled) for student, teacher, sampled in sides])
    return list(torch.autograd.grad((world.coef_N * value_N).sum(), world.leaves)), value_N.detach()


def assert_equal_dense(world: World, loss: Divergence) -> None:
    expected, value_N = dense_gradients(world, loss)
    for gradient, chunk_size in PATHS:
        out = world.run(world.term(loss), chunk_size=chunk_size, gradient=gradient)
        counted_N = world.coef_N != 0
        torch.testing.assert_close(out.token_loss["loss"][counted_N], value_N[counted_N], **CLOSE)
        torch.testing.assert_close(out.loss.detach(), (world.coef_N * value_N).sum(), **CLOSE)
        for got, wanted in zip(torch.autograd.grad(out.loss, world.leaves), expected, strict=True):
            assert torch.allclose(got, wanted, **CLOSE), (
                f"{gradient}, {chunk_size}, {loss}: {(got - wanted).abs().max()}"
            )


@pytest.mark.parametrize("kind_of_support", get_args(SupportKind))
@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_every_divergence_support_and_tail(kind: str, kind_of_support: str, world: World) -> None:
    """Values and gradients equal dense autograd for every tail, on chunks of 1, 4, 64 (> N) and the default, through a
    head with bias, scale, soft cap and padding, a wider student, and temperature 1.3; the autograd path as well."""
    for tail in get_args(TailKind):
        if tail == "renormalise" and support(kind_of_support).has_one_entry:
            continue  # refused: identically zero
        assert_equal_dense(world, spec(kind, kind_of_support, tail))


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_published_options(kind: str, world: World) -> None:
    """The same with the per-entry clip, the floor on log-probabilities, and both, where each is really active."""
    for kind_of_support, options in product(
        ["full", "union"], [{"entry_clip": 0.02}, {"logprob_floor": -2.0}, {"entry_clip": 0.02, "logprob_floor": -2.0}]
    ):
        if kind == "renyi" and "entry_clip" in options:
            continue  # refused: no sum over entries
        loss = spec(kind, kind_of_support, "drop", **options)
        assert_equal_dense(world, loss)
        plain = world.run(world.term(spec(kind, kind_of_support, "drop"))).loss
        assert abs(world.run(world.term(loss)).loss - plain) > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_V": None, "logit_scale": 1.0, "softcap": None},
        {"bias_V": None, "logit_scale": 1.0},
        {"logit_scale": 1.0, "softcap": None},
        {"bias_V": None, "softcap": None},
    ],
    ids=["plain", "softcap", "bias", "scale"],
)
def test_each_head_option_alone(changes: dict[str, float | None], world: World) -> None:
    """No option of the head leans on another one being on."""
    for loss in (spec("reverse_kl", "full"), spec("jsd", "union"), spec("forward_kl", "student_topk", "renormalise")):
        assert_equal_dense(world.with_head(**changes), loss)


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.9, 1 - 1e-9])
def test_mixtures_near_their_ends(share: float, world: World) -> None:
    """Mixed divergences equal dense autograd over the range of teacher_share. At 1e-9 from an end the dense form
    divides rounding by the share, so there the limit is compared instead: forward_kl at 0, reverse_kl at 1."""
    if 0.01 < share < 0.99:
        for kind in ("jsd", "skewed_forward_kl", "skewed_reverse_kl"):
            assert_equal_dense(world, Divergence(kind, Support("union", 3), teacher_share=share))
        return
    limit = spec("forward_kl" if share < 0.5 else "reverse_kl", "full")
    near = Divergence("jsd", teacher_share=share)
    exact = Divergence("jsd", teacher_share=float(round(share)))
    for got, end, wanted in zip(*(world.gradients(world.term(x)) for x in (near, exact, limit)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(end, wanted, rtol=0, atol=0)


def surrogate_terms(world: World) -> dict[str, tuple[Term, Tensor]]:
    """Name -> (term, dense [N] loss on a graph)."""
    student_NV = dense.logits(world.hidden_NH, world.head, world.temperature).log_softmax(-1)
    assert world.teacher.hidden_NH is not None and world.teacher.head is not None
    teacher_NV = dense.logits(world.teacher.hidden_NH, world.teacher.head, world.temperature).log_softmax(-1)
    student_N, teacher_N = (x.gather(-1, world.ids_N[:, None]).squeeze(-1) for x in (student_NV, teacher_NV))
    advantage_N = torch.tensor([1.0, -1.0, 2.0, 0.5, -0.5, -2.0], dtype=torch.float64)
    old_N = student_N.detach() + torch.tensor([0.5, -2.0, -0.5, 0.0, 0.05, 0.5], dtype=torch.float64)
    ratio_N = (student_N - old_N).exp()
    ppo_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(0.8, 1.28))
    dual_N = torch.where(advantage_N < 0, torch.minimum(ppo_N, -3 * advantage_N), ppo_N)
    clipped = PolicyGradient(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    return {
        "nll": (world.term(NegativeLogLikelihood()), -student_N),
        "policy gradient": (world.term(PolicyGradient(), advantage_N=advantage_N), -advantage_N * student_N),
        "ratio": (world.term(PolicyGradient(), advantage_N=advantage_N, old_logprob_N=old_N), -advantage_N * ratio_N),
        "ppo": (world.term(clipped, advantage_N=advantage_N, old_logprob_N=old_N), dual_N),
        "teacher": (world.term(TeacherAdvantage()), -(teacher_N - student_N).detach() * student_N),
    }


@pytest.mark.parametrize("name", ["nll", "policy gradient", "ratio", "ppo", "teacher"])
def test_surrogates(name: str, world: World) -> None:
    """Sampled-token losses equal dense autograd, both sides of every clip included."""
    term, value_N = surrogate_terms(world)[name]
    expected = torch.autograd.grad((world.coef_N * value_N).sum(), world.leaves)
    for gradient, chunk_size in PATHS:
        for got, wanted in zip(world.gradients(term, gradient=gradient, chunk_size=chunk_size), expected, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_terms_add_up(world: World) -> None:
    """Several terms at once, dense, sparse and sampled, give the sum of their gradients, each with its coefficients."""
    other_N = world.coef_N.flip(0)
    terms = [
        Term(name="a", loss=spec("reverse_kl", "full"), coef_N=world.coef_N),
        Term(name="b", loss=spec("forward_kl", "full"), coef_N=other_N),
        Term(name="c", loss=spec("jsd", "union"), coef_N=other_N),
        Term(name="d", loss=TeacherAdvantage(), coef_N=world.coef_N),
    ]
    together = world.gradients(*terms)
    alone = [world.gradients(term) for term in terms]
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, sum(parts[1:], parts[0]), **CLOSE)


def test_gradcheck() -> None:
    """Numerical differentiation agrees, through backward with a scale, for a loss without frozen parts."""
    world = make_world(seed=1)

    def loss(*leaves: Tensor) -> Tensor:
        hidden_NH, weight_VH, bias_V = leaves
        changed = World(hidden_NH, world.head, world.teacher, world.ids_N, world.coef_N, world.temperature)
        changed = changed.with_head(weight_VH=weight_VH, bias_V=bias_V)
        return 2.5 * changed.run(changed.term(spec("reverse_kl", "union")), chunk_size=4).loss

    assert torch.autograd.gradcheck(loss, world.leaves)


def test_equal_sides_have_no_gradient(world: World) -> None:
    """A teacher equal to the student gives loss and gradient 0 for every divergence on every support."""
    same = World(
        world.hidden_NH,
        world.head,
        type(world.teacher)(hidden_NH=world.hidden_NH.detach(), head=world.head),
        world.ids_N,
        world.coef_N,
    )
    for kind, kind_of_support in product(get_args(DivergenceKind), get_args(SupportKind)):
        tail = "bucket"
        out = same.run(same.term(spec(kind, kind_of_support, tail)))
        assert abs(out.loss.item()) < 1e-14
        for grad in torch.autograd.grad(out.loss, same.leaves):
            assert grad.abs().max() < 1e-14


def test_padding_rows_take_no_part(world: World) -> None:
    """Rows beyond the tokenizer's ids may hold anything (here NaN) on both sides, and receive no gradient."""
    weight_VH = world.head.weight_VH.detach().clone()
    weight_VH[NUM_IDS:] = torch.nan
    assert world.teacher.head is not None
    teacher_VH = world.teacher.head.weight_VH.clone()
    teacher_VH[NUM_IDS:] = torch.nan
    teacher = type(world.teacher)(
        hidden_NH=world.teacher.hidden_NH,
        head=type(world.head)(weight_VH=teacher_VH, num_tokens=NUM_IDS, softcap=world.teacher.head.softcap),
    )
    poisoned = world.with_head(weight_VH=weight_VH.requires_grad_())
    loss = spec("reverse_kl", "full")
    got = poisoned.gradients(poisoned.term(loss), views=teacher)
    for found, wanted in zip(got, world.gradients(world.term(loss)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert got[1][NUM_IDS:].abs().max() == 0


@pytest.mark.parametrize("path", ["closed_form", "autograd"])
@pytest.mark.parametrize("extra", [0, 2, 90])
def test_heads_filled_up_to_aligned_rows_change_nothing(
    path: str, extra: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU multiplies: 11 ids in rows of 64, whether the model has fewer rows than that or more (and NaN in all
    beyond its ids). Values and gradients are those of 11 rows, and every row of a product begins aligned."""
    filler = torch.full((extra, 5), torch.nan, dtype=torch.float64)
    weight_VH = torch.cat([world.head.weight_VH.detach()[:NUM_IDS], filler]).requires_grad_()
    bias_V = torch.cat([world.head.bias_V.detach()[:NUM_IDS], filler[:, 0]]).requires_grad_()  # type: ignore[index]
    odd = world.with_head(weight_VH=weight_VH, bias_V=bias_V)
    results = []
    for multiple in (1, 64):
        monkeypatch.setitem(ROW_MULTIPLE, "cpu", multiple)
        term = odd.term(spec("jsd", "full"))
        out = odd.run(term, gradient=path)
        results.append([out.token_loss["loss"], out.entropy_N, *torch.autograd.grad(out.loss, odd.leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, **CLOSE)
    project = Projector(odd.head, odd.hidden_NH.detach())
    output_nV = project(torch.arange(4))
    assert output_nV.shape == (4, NUM_IDS) and output_nV.stride() == (64, 1)


@pytest.mark.parametrize("chunk_size", [2, None])
def test_a_narrow_head_is_multiplied_in_slices(chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 heads are converted three rows at a time, with bias and padding, in one chunk or in several: gradients are
    those of the same numbers in fp32, rounded once."""
    half = make_world(dtype=torch.bfloat16)
    single = half.with_head(**{name: getattr(half.head, name).float() for name in ("weight_VH", "bias_V")})
    single = replace(single, hidden_NH=half.hidden_NH.float())
    monkeypatch.setattr(heads, "SLICE_BYTES", 3 * 4 * half.hidden_NH.shape[-1])
    assert len(list(Projector(half.head, half.hidden_NH).slices())) > 3
    term = spec("reverse_kl", "full")
    wanted = single.gradients(single.term(term), chunk_size=chunk_size)
    for found, expected in zip(half.gradients(half.term(term), chunk_size=chunk_size), wanted, strict=True):
        torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)


def test_refused_combination_is_the_zero_one() -> None:
    """The only combination left out above, renormalising a single entry, is refused with its reason."""
    with pytest.raises(UserError, match="identically zero"):
        Divergence("forward_kl", Support("teacher_topk", 1), "renormalise")
