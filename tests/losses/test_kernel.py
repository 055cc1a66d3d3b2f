"""The Triton kernels give what the eager path gives: its own tests once more, through them. Run by `make test-triton`.

Interpreted on a CPU (`TRITON_INTERPRET=1`), each program one after another. That proves the arithmetic and the
indexing, not what a compiler makes of them, nor that they are fast: `kernel_proof.prove` does the former on each device
before the kernels are used there, and `benchmarks/head_kernel.py` measures the latter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_gradients
import torch
from loss_world import World, make_world
from test_clip import *  # noqa: F403  these tests are the point
from test_gradients import *  # noqa: F403
from test_head_loss import *  # noqa: F403

from opdkit.losses import Divergence, Support, Target, TeacherAdvantage, Term
from opdkit.losses.kernels import kernel, kernel_proof

pytestmark = pytest.mark.triton
pytest.importorskip("triton", reason="Triton is not installed: `make test-triton` has it")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: `make test-triton` sets it", allow_module_level=True)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that the kernels cover goes through them, in programs of 8 ids, so that a row takes several."""
    monkeypatch.setattr(kernel, "proven", {torch.device("cpu")})
    monkeypatch.setattr(kernel, "BLOCK", 8)
    monkeypatch.setattr(test_gradients, "PATHS", [("closed_form", 4)])  # each program takes the interpreter a while
    names: list[str] = []
    launch = kernel.Chunk.launch

    def counted(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        names.append(name)
        launch(self, name, *args, **kwargs)

    monkeypatch.setattr(kernel.Chunk, "launch", counted)
    yield names


@pytest.mark.parametrize("loss", kernel_proof.LOSSES, ids=str)
def test_the_kernels_really_run(loss: Any, world: World, launched: list[str]) -> None:
    """What is claimed to be covered is not eager: statistics once a chunk, the gradient once."""
    world.gradients(world.term(loss), chunk_size=3)
    mixed = isinstance(loss, Divergence) and loss.support.kind == "full" and loss.teacher_share is not None
    assert sorted(set(launched)) == sorted({"statistics", "gradients", *(["mixed_sums"] if mixed else [])})
    assert len(launched) == (6 if mixed else 4)  # five counted tokens are two chunks of three


def test_what_is_not_covered_runs_eagerly(world: World, launched: list[str]) -> None:
    """The list of the module's docstring: no launch, and the same gradients as ever."""
    term = world.term(Divergence("forward_kl"))
    both = [term, replace(term, name="other", loss=Divergence("reverse_kl"))]
    target = Target.of({"teacher": 2.0})
    for terms in (
        [world.term(Divergence("renyi", order=0.5))],
        [world.term(Divergence("jsd", teacher_share=0.01))],
        [world.term(Divergence("reverse_kl", entry_clip=0.1))],
        [world.term(Divergence("reverse_kl", logprob_floor=-5.0))],
        [replace(term, target=target)],
        both,
    ):
        world.gradients(*terms)
    absent = world.with_head(absent_ids=torch.tensor([2]))
    absent.gradients(term)
    assert launched == []


def test_the_proof_refuses_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Equal: proven. A gradient that is off by a thousandth, a kernel that raises: not used, with a sentence saying
    why, and `head_loss` goes on eagerly."""
    monkeypatch.setattr(kernel_proof, "NUM_IDS", 21)
    kernel.proven.clear()
    device = torch.device("cpu")
    assert kernel_proof.prove(device) is None and kernel.proven == {device}

    write = kernel._write_gradient

    def wrong(batch: Any, chunk: Any, *args: Any) -> None:
        write(batch, chunk, *args)
        chunk.output_nV.mul_(1.01)

    monkeypatch.setattr(kernel, "_write_gradient", wrong)
    said = kernel_proof.prove(device)
    assert said is not None and "differ" in said and kernel.proven == set()

    def raising(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel.Chunk, "launch", raising)
    said = kernel_proof.prove(device)
    assert said is not None and "no compiler" in said and kernel.proven == set()
    world = make_world()
    assert world.gradients(world.term(Divergence("forward_kl")))[0].isfinite().all()


def test_terms_of_one_full_and_several_lists(world: World, launched: list[str]) -> None:
    """One loss over the vocabulary and others at its entries share one gradient pass."""
    terms = [
        Term(name="a", loss=Divergence("reverse_kl", token_clip=0.1), coef_N=world.coef_N),
        Term(name="b", loss=Divergence("jsd", Support("union", 3), teacher_share=0.4), coef_N=world.coef_N.flip(0)),
        Term(name="c", loss=TeacherAdvantage(), coef_N=world.coef_N),
    ]
    together = world.gradients(*terms)
    assert "gradients" in launched
    eager = world.gradients(*terms, gradient="autograd")
    for got, wanted in zip(together, eager, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
