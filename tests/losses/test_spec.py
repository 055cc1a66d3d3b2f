"""Specs refuse what is meaningless, in a sentence and without torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from opdkit import losses
from opdkit.errors import UserError
from opdkit.losses import Divergence, NegativeLogLikelihood, PolicyGradient, Support, TeacherAdvantage, Term
from opdkit.types import Asked


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Support("topk", 3), "support = 'topk' is not one of full, sampled"),
        (lambda: Support("full", 3), "has no k, but k = 3"),
        (lambda: Support("union"), "needs k >= 1"),
        (lambda: Support("union", 0), "needs k >= 1"),
        (lambda: Divergence("kl"), "divergence = 'kl' is not one of forward_kl"),
        (lambda: Divergence("jsd"), "needs teacher_share between 0 and 1; it is None"),
        (lambda: Divergence("jsd", teacher_share=1.5), "it is 1.5"),
        (lambda: Divergence("forward_kl", teacher_share=0.5), "teacher_share = 0.5 has no meaning"),
        (lambda: Divergence("jsd", teacher_share=0.0, scale="published"), "identically zero"),
        (lambda: Divergence("skewed_forward_kl", teacher_share=1.0), "identically zero"),
        (lambda: Divergence("skewed_reverse_kl", teacher_share=0.0), "identically zero"),
        (lambda: Divergence("forward_kl", scale="published"), "concerns jsd only"),
        (lambda: Divergence("forward_kl", Support("sampled"), "renormalise"), "probability 1"),
        (lambda: Divergence("forward_kl", Support("student_topk", 1), "renormalise"), "probability 1"),
        (lambda: Divergence("forward_kl", tail="cut"), "tail = 'cut' is not one of bucket"),
        (lambda: Divergence("forward_kl", entry_clip=0.0), "entry_clip = 0.0 must be above 0"),
        (lambda: Divergence("forward_kl", logprob_floor=1.0), "logprob_floor = 1.0 must be below 0"),
        (lambda: PolicyGradient(clip_low=1.2), "clip_low = 1.2"),
        (lambda: PolicyGradient(clip_high=-0.1), "clip_high = -0.1"),
        (lambda: PolicyGradient(dual_clip=1.0), "dual_clip = 1.0"),
    ],
)
def test_refusals(build: object, sentence: str) -> None:
    """Wrong names, missing or useless options, and losses that are identically zero."""
    with pytest.raises(UserError, match=sentence):
        build()


def test_needs() -> None:
    """A spec says what the teacher must answer: entries the student chooses need the whole distribution, entries the
    teacher listed itself only its list."""
    assert Divergence("reverse_kl").asks == Asked("distribution")
    assert Divergence("reverse_kl", Support("student_topk", 8)).asks == Asked("distribution")
    assert Divergence("reverse_kl", Support("union", 8)).asks == Asked("distribution")
    assert Divergence("reverse_kl", Support("teacher_topk", 8)).asks == Asked("topk", 8)
    assert Divergence("reverse_kl", Support("intersection", 8)).asks == Asked("topk", 8)
    assert TeacherAdvantage().asks == Divergence("jsd", Support("sampled"), teacher_share=0.5).asks == Asked("sampled")
    assert NegativeLogLikelihood().asks is PolicyGradient().asks is None


def test_terms_check_their_arrays() -> None:
    """A term refuses a missing array, a useless one and one of another length; `take` cuts all of them."""
    one, two = torch.ones(1), torch.ones(2)
    for loss, arrays, sentence in (
        (PolicyGradient(), {}, "PolicyGradient needs advantage_N"),
        (TeacherAdvantage(), {"advantage_N": two}, "TeacherAdvantage has no use for advantage_N"),
        (NegativeLogLikelihood(), {"old_logprob_N": two}, "has no use for old_logprob_N"),
        (PolicyGradient(clip_low=0.2), {"advantage_N": two}, "a clipped ratio needs old_logprob_N"),
        (PolicyGradient(), {"advantage_N": one}, r"advantage_N is \(1,\), coef_N \(2,\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Term(name="x", loss=loss, coef_N=two, **arrays)
    term = Term(
        name="x",
        loss=PolicyGradient(),
        coef_N=torch.arange(3.0),
        advantage_N=torch.arange(3.0),
        old_logprob_N=-torch.arange(3.0),
    )
    for index in (torch.tensor([2, 0]), slice(0, 2), torch.tensor([True, False, True])):
        part = term.take(index)
        assert part.coef_N.equal(term.coef_N[index]) and part.advantage_N.equal(part.coef_N)
        assert part.old_logprob_N.equal(-part.coef_N)


def test_recipes_are_checked_without_torch() -> None:
    """Importing the losses, their names and their specs, and building one, loads no torch."""
    code = (
        "import sys; from opdkit import losses; import opdkit.losses.names; "
        "losses.Divergence('reverse_kl', losses.Support('union', 4)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_loads() -> None:
    """The lazy table of names and the modules agree."""
    assert set(losses.__all__) == {*losses._HOME, "weights"}
    assert losses.weights is importlib.import_module("opdkit.losses.weights")
    for name in losses._HOME:
        assert getattr(losses, name) is getattr(importlib.import_module(f"opdkit.losses.{losses._HOME[name]}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        losses.nonsense  # noqa: B018
