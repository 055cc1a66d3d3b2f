"""Whether the Triton kernels give the eager path's numbers on a device: asked once, when a model is loaded there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from opdkit.losses.head import head_loss
from opdkit.losses.heads import Head
from opdkit.losses.inputs import ViewTokens
from opdkit.losses.kernels import kernel
from opdkit.losses.spec import Divergence, LossSpec, Support, TeacherAdvantage
from opdkit.losses.terms import Term

# One of each formula, of each way to choose entries, and of a clip.
LOSSES: tuple[LossSpec, ...] = (
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("mixed_kl", reverse_share=0.3),
    Divergence("jsd", teacher_share=0.5),
    Divergence("jsd", teacher_share=0.9, scale="published"),
    Divergence("skewed_forward_kl", teacher_share=0.1),
    Divergence("skewed_reverse_kl", teacher_share=0.9),
    Divergence("reverse_kl", token_clip=0.1),
    Divergence("reverse_kl", Support("student_topk", 5)),
    Divergence("forward_kl", Support("teacher_topk", 5)),
    Divergence("jsd", Support("union", 5), teacher_share=0.5),
    TeacherAdvantage(),
)
NUM_TOKENS, NUM_IDS, WIDTH = 9, 2 * kernel.BLOCK + 37, 32  # an odd vocabulary, over three tiles
# Of the norm of the eager path's numbers. Both add the same fp32 numbers in another order, on logits up to 10.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


def prove(device: torch.device) -> str | None:
    """Use the kernels on `device` from now on if they equal the eager path there; else a sentence saying why not."""
    device = torch.empty(0, device=device).device  # with its index, as tensors there have it
    kernel.proven.discard(device)
    if importlib.util.find_spec("triton") is None:
        return f"the loss runs without its Triton kernels on {device}: triton is not installed"
    try:
        for dtype, tolerance in TOLERANCE.items():
            for capped in (False, True):
                for loss in LOSSES:
                    apart = _apart(loss, dtype, capped, device)
                    if not apart <= tolerance:
                        return (
                            f"the loss runs without its Triton kernels on {device}: for {loss} in {dtype} they differ "
                            f"from the eager path by {apart:.1e} of its size, more than {tolerance:g}"
                        )
    except Exception as error:  # Triton raises its compiler's and driver's own
        lines = str(error).strip().splitlines() or ["no reason given"]
        return f"the loss runs without its Triton kernels on {device}: {type(error).__name__}: {lines[0]}"
    finally:
        kernel.proven.discard(device)
    kernel.proven.add(device)
    return None


def _apart(loss: LossSpec, dtype: torch.dtype, capped: bool, device: torch.device) -> float:
    kernel.proven.discard(device)
    eager = _numbers(loss, dtype, capped, device)
    kernel.proven.add(device)
    ours = _numbers(loss, dtype, capped, device)
    return max(
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(ours, eager, strict=True)
    )


def _numbers(loss: LossSpec, dtype: torch.dtype, capped: bool, device: torch.device) -> Sequence[Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    hidden_NH, weight_VH = normal(NUM_TOKENS, WIDTH).requires_grad_(), (normal(NUM_IDS, WIDTH) * 0.3).requires_grad_()
    options = {"logit_scale": 0.7, "softcap": 8.0} if capped else {}
    head = Head(weight_VH=weight_VH, num_tokens=NUM_IDS, **options)
    view = ViewTokens(
        hidden_NH=normal(NUM_TOKENS, WIDTH), head=Head(weight_VH=normal(NUM_IDS, WIDTH) * 0.3, num_tokens=NUM_IDS)
    )
    ids_N = torch.randint(NUM_IDS, (NUM_TOKENS,), generator=random).to(device)
    term = Term(name="loss", loss=loss, coef_N=torch.rand(NUM_TOKENS, generator=random).to(device))
    out = head_loss(hidden_NH, head, ids_N, [term], view, temperature=1.3 if capped else 1.0)
    found = torch.autograd.grad(out.loss, (hidden_NH, weight_VH))
    return [*found, out.token_loss["loss"], out.entropy_N, out.sampled_logprob_N]
