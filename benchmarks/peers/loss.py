"""The loss alone: hidden states and heads in, a loss and both gradients out. Equal tensors on all sides.

    opdkit          opdkit.losses.head_loss
    trl             what TRL's DistillationTrainer calls; on a CPU its Triton kernels fall back to eager torch
    liger           LigerFusedLinearJSDLoss, compiled=False; liger_compiled: compiled=True
    dense           full logits, fp32 log-softmax, autograd: what a careful person writes without a special kernel
    products        the four matrix products alone (two projections, grad_hidden, grad_head), with fp32 output, in
                    opdkit's chunks and into memory that is there: no loss over a whole vocabulary can take less

Errors are relative norms against autograd in fp64 on the same numbers, of both gradients as one vector.
Letters: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses import Divergence, Head, Term, ViewTokens, head_loss
from opdkit.losses.head import chunks

from .parts import parts
from .worker import Prepared

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as TRL and Liger name directions
NUM_CHECKED = 96  # tokens of the comparison with fp64


class Inputs(NamedTuple):
    student_NH: Tensor
    student_VH: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor
    ids_N: Tensor


def inputs(num_tokens: int, case: dict[str, Any]) -> Inputs:
    random = torch.Generator().manual_seed(num_tokens)
    dtype, vocabulary, width = getattr(torch, case["dtype"]), case["vocabulary"], case["width"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    scale = 3 / width**0.5  # logits of standard deviation 3
    return Inputs(
        normal(num_tokens, width).requires_grad_(),
        normal(vocabulary, width, scale=scale).requires_grad_(),
        normal(num_tokens, width),
        normal(vocabulary, width, scale=scale),
        torch.randint(vocabulary, (num_tokens,), generator=random),
    )


def opdkit(case: dict[str, Any]) -> Callable[[Inputs], Tensor]:
    kind = case["loss"]
    spec = Divergence("jsd", teacher_share=0.5, scale="published") if kind == "jsd" else Divergence(kind)

    def loss(given: Inputs) -> Tensor:
        num_tokens, vocabulary = len(given.student_NH), case["vocabulary"]
        coef_N = torch.full((num_tokens,), 1 / num_tokens, dtype=torch.float32)
        view = ViewTokens(hidden_NH=given.teacher_NH, head=Head(weight_VH=given.teacher_VH, num_tokens=vocabulary))
        head = Head(weight_VH=given.student_VH, num_tokens=vocabulary)
        return head_loss(given.student_NH, head, given.ids_N, [Term(name="d", loss=spec, coef_N=coef_N)], view).loss

    return loss


def trl(case: dict[str, Any]) -> Callable[[Inputs], Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(given: Inputs) -> Tensor:
        mask_1N = torch.ones(1, len(given.student_NH), dtype=torch.long)
        states = given.student_NH.unsqueeze(0), given.teacher_NH.unsqueeze(0)
        return _chunked_divergence_loss(*states, given.student_VH, given.teacher_VH, mask_1N, BETA[case["loss"]])[0]

    return loss


def liger(case: dict[str, Any]) -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    own = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[case["loss"]], compiled=case["side"] == "liger_compiled"
    )
    return lambda given: own(given.student_NH, given.student_VH, given.teacher_NH, given.teacher_VH, given.ids_N)


def dense(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> Callable[[Inputs], Tensor]:
    def loss(given: Inputs) -> Tensor:
        student_NV = torch.log_softmax((given.student_NH @ given.student_VH.T).to(dtype), -1)
        with torch.no_grad():
            teacher_NV = torch.log_softmax((given.teacher_NH @ given.teacher_VH.T).to(dtype), -1)
        if case["loss"] == "forward_kl":
            return F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True)
        if case["loss"] == "reverse_kl":
            return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1).mean()
        mixture_NV = torch.logaddexp(student_NV, teacher_NV) - torch.log(torch.tensor(2.0, dtype=dtype))
        sides = [
            F.kl_div(mixture_NV, side_NV, reduction="batchmean", log_target=True)
            for side_NV in (student_NV, teacher_NV)
        ]
        return (sides[0] + sides[1]) / 2

    return loss


def products(case: dict[str, Any]) -> Callable[[], None]:
    given = inputs(case["tokens"], case)
    student_NH, student_VH, teacher_NH, teacher_VH = (array.detach().float() for array in given[:4])
    size = max(len(rows) for rows in chunks(torch.arange(case["tokens"]), case["vocabulary"], case["width"]))
    own_nV, other_nV = torch.empty(size, case["vocabulary"]), torch.empty(size, case["vocabulary"])
    grad_NH, grad_VH = torch.zeros_like(student_NH), torch.zeros_like(student_VH)

    def run() -> None:
        for start in range(0, len(student_NH), size):
            part = slice(start, start + size)
            rows = len(student_NH[part])
            torch.mm(student_NH[part], student_VH.T, out=own_nV[:rows])
            torch.mm(teacher_NH[part], teacher_VH.T, out=other_nV[:rows])
            torch.mm(own_nV[:rows], student_VH, out=grad_NH[part])
            grad_VH.addmm_(own_nV[:rows].T, student_NH[part])

    return run


def gradients(loss: Callable[[Inputs], Tensor], given: Inputs) -> Tensor:
    return torch.cat([one.flatten().double() for one in torch.autograd.grad(loss(given), given[:2])])


def error(loss: Callable[[Inputs], Tensor], case: dict[str, Any]) -> float:
    """Of the gradients, on a few tokens, against the same numbers in fp64."""
    given = inputs(NUM_CHECKED, case)
    student_NH, student_VH, teacher_NH, teacher_VH = (array.detach().double() for array in given[:4])
    exact = Inputs(student_NH.requires_grad_(), student_VH.requires_grad_(), teacher_NH, teacher_VH, given.ids_N)
    wanted = gradients(dense(case, torch.float64), exact)
    return float((gradients(loss, given) - wanted).norm() / wanted.norm())


def prepare(case: dict[str, Any]) -> Prepared:
    side = case["side"]
    if side == "products":
        run = products(case)
        return (lambda: run()), {}
    make = {"opdkit": opdkit, "trl": trl, "liger": liger, "liger_compiled": liger, "dense": dense}[side]
    loss = make(case)
    # Compiled anew for other shapes; its arithmetic is that of `liger`.
    told: dict[str, Any] = {} if side == "liger_compiled" else {"error": error(loss, case)}
    given = inputs(case["tokens"], case)

    def step() -> None:
        given.student_NH.grad = given.student_VH.grad = None
        loss(given).backward()

    if side == "opdkit":
        told["parts"] = parts(step)
    return step, told
