"""A handful of tokens in float64, with a student and a teacher of different width and different padded vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.losses import Head, HeadOutput, Term, ViewTokens, head_loss
from opdkit.losses.spec import LossSpec

NUM_TOKENS, NUM_IDS = 6, 11  # N, V


@dataclass(frozen=True)
class World:
    """Inputs of `head_loss`; `hidden_NH`, `head.weight_VH` and `head.bias_V` take gradients."""

    hidden_NH: Tensor
    head: Head
    teacher: ViewTokens
    ids_N: Tensor
    coef_N: Tensor
    temperature: float = 1.0

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden_NH, self.head.weight_VH, self.head.bias_V) if leaf is not None]

    def term(self, loss: LossSpec, **arrays: Tensor) -> Term:
        return Term(name="loss", loss=loss, coef_N=self.coef_N, **arrays)

    def run(self, *terms: Term, **options: Any) -> HeadOutput:
        options = {"temperature": self.temperature, "views": self.teacher, **options}
        return head_loss(self.hidden_NH, self.head, self.ids_N, list(terms), **options)

    def gradients(self, *terms: Term, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self.run(*terms, **options).loss, self.leaves))

    def with_head(self, **changes: Any) -> World:
        return replace(self, head=replace(self.head, **changes))


def make_world(seed: int = 0, dtype: torch.dtype = torch.float64) -> World:
    """Everything a head can have: bias, scale, soft cap, padding rows; temperature 1.3; token 3 has coefficient 0."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    head = Head(
        weight_VH=normal(NUM_IDS + 2, 5).requires_grad_(),
        bias_V=normal(NUM_IDS + 2).requires_grad_(),
        num_tokens=NUM_IDS,
        logit_scale=0.7,
        softcap=3.0,
    )
    teacher_head = Head(weight_VH=normal(NUM_IDS + 5, 4), num_tokens=NUM_IDS, softcap=4.0)
    hidden_NH, teacher_NH = normal(NUM_TOKENS, 5).requires_grad_(), normal(NUM_TOKENS, 4)
    coef_N = torch.rand(NUM_TOKENS, generator=random, dtype=torch.float64)
    coef_N[3] = 0
    coef_N = coef_N.to(torch.float64 if dtype == torch.float64 else torch.float32)
    ids_N = torch.randint(NUM_IDS, (NUM_TOKENS,), generator=random)
    return World(hidden_NH, head, ViewTokens(hidden_NH=teacher_NH, head=teacher_head), ids_N, coef_N, 1.3)
