"""Every published divergence, from logits to gradient, through `head_loss`.

The hidden states are the published logits and the head is the identity, so grad_hidden is the published gradient with
respect to logits. Shows that values and gradients equal what the published code computes, for both gradient paths. Does
not show that the published conventions are good ones (`entry_clip` is not), nor anything about real heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vectors import Case, load

from opdkit.losses import (
    Divergence,
    Head,
    Support,
    TeacherAdvantage,
    Term,
    ViewTokens,
    head_loss,
    token_coefficients,
)
from opdkit.losses.divergence import Sides, jsd
from opdkit.losses.spec import LossSpec

CASES = {case.id: case for case in load("divergences")}
TAILS = {
    "tail": "bucket",
    "renormalise": "renormalise",
    "renormalise teacher only": "renormalise_teacher",
    "drop": "drop",
}
SUPPORTS = {"union_topk": "union", "teacher_argmax+student_argmax": "union"}
# This code has no special case at the end of the range, so it trains nothing there; as a `Divergence` it is refused.
ZERO = "pub.div.chunked.jsd.w0.0"


def spec_of(config: dict[str, Any]) -> LossSpec:
    """The published configuration in our words."""
    if config["support"] == "sampled":
        return TeacherAdvantage()
    kind = SUPPORTS.get(config["support"], config["support"])
    k = None if kind == "full" else config.get("k") or 1
    return Divergence(
        config["divergence"],
        Support(kind, k),
        TAILS.get(config.get("rest") or "", "bucket"),
        teacher_share=config["teacher_weight"] if config["divergence"] == "jsd" else None,
        scale="published" if config["divergence"] == "jsd" else "continuous",
        entry_clip=config.get("clip_per_entry"),
        logprob_floor=config.get("log_prob_min_clamp"),
    )


def score(case: Case, spec: LossSpec, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, token_loss_BT, gradient_BTV) at the case's temperatures, mean over valid tokens."""
    student_BTV, teacher_BTV = (torch.tensor(case.inputs[f"{side}_logits"]) for side in ("student", "teacher"))
    mask_N = torch.tensor(case.inputs["mask"]).flatten().bool()
    num_tokens, size = mask_N.numel(), student_BTV.shape[-1]
    student_NV = student_BTV.flatten(0, 1).requires_grad_()
    # One temperature serves both sides here; where the published ones differ, the teacher's logits make up for it.
    temperature = case.config["student_temperature"]
    teacher_NV = teacher_BTV.flatten(0, 1) * (temperature / case.config["teacher_temperature"])
    identity = Head(weight_VH=torch.eye(size, dtype=torch.float64), num_tokens=size)
    coef_N = token_coefficients(
        mask_N,
        torch.ones(num_tokens, dtype=torch.float64),
        torch.arange(num_tokens) // student_BTV.shape[1],
        per="token",
    )
    out = head_loss(
        student_NV,
        identity,
        torch.tensor(case.inputs["tokens"]).flatten().long(),
        [Term(name="loss", loss=spec, coef_N=coef_N)],
        ViewTokens(hidden_NH=teacher_NV, head=identity),
        temperature=temperature,
        chunk_size=case.config.get("chunk_size"),
        gradient=gradient,
    )
    (grad_NV,) = torch.autograd.grad(out.loss, student_NV)
    shape = student_BTV.shape[:2]
    return out.loss, out.token_loss["loss"].unflatten(0, shape), grad_NV.unflatten(0, shape)


@pytest.mark.parametrize("gradient", ["closed_form", "autograd"])
@pytest.mark.parametrize("name", [name for name in CASES if name != ZERO])
def test_published_divergence(name: str, gradient: str) -> None:
    """Loss, loss per token, and gradient equal the published ones at the stated tolerance."""
    case = CASES[name]
    loss, token_loss_BT, grad_BTV = score(case, spec_of(dict(case.config)), gradient)
    case.check("loss", loss.item())
    if "per_token" in case.outputs:
        case.check("per_token", token_loss_BT, where=case.inputs["mask"])
    case.check_gradient("grad", grad_BTV)


def test_published_jsd_at_its_end_is_zero() -> None:
    """The published JSD with teacher weight 0 and no special case has value and gradient 0; so has ours, unguarded."""
    case = CASES[ZERO]
    logprob = torch.log_softmax(torch.tensor(case.inputs["student_logits"]), -1)
    teacher = torch.log_softmax(torch.tensor(case.inputs["teacher_logits"]), -1)
    term, gradient = jsd(Sides(logprob, teacher, None, None), 0.0, 1.0)
    case.check("loss", term.sum().item())
    assert gradient().abs().max() == 0.0
    case.check_gradient("grad", gradient())


def test_all_cases_are_read() -> None:
    """The file is whole: 32 cases, each with inputs from its set. Its README states the count."""
    assert len(CASES) == 32
    assert all(case.inputs["student_logits"].shape == (2, 4, 13) for case in CASES.values())
