"""A published case as the flat batch a method sees: what the trainer would hand it, and what comes back from the head.

The hidden states are the published logits and the head is the identity, so grad_hidden is the published gradient with
respect to logits. Letters: B rows, T positions, V vocabulary, N counted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.losses import Head, HeadOutput, Term, ViewTokens, head_loss, head_stats
from opdkit.methods.plan_inputs import PlanInputs


@dataclass
class CaseBatch:
    """The tokens of a case where `mask_BT` is True. Rows without any keep their number: nothing is renumbered."""

    mask_BT: Tensor
    ids_BT: Tensor

    def flat(self, values_BT: Any) -> Tensor:
        """[N, ...] of an array [B, T, ...]."""
        return torch.as_tensor(np.asarray(values_BT))[self.mask_BT]  # by way of NumPy: lists of floats are float64

    def padded(self, values_N: Tensor) -> Tensor:
        """[B, T, ...], zero where nothing is counted."""
        out = values_N.new_zeros((*self.mask_BT.shape, *values_N.shape[1:]))
        out[self.mask_BT] = values_N.detach()
        return out

    @property
    def ids_N(self) -> Tensor:
        return self.flat(self.ids_BT)

    def plan(self, *, reward: Any = None, group: Any = None, **known: Any) -> PlanInputs:
        """Everything known about the batch, in float64; `known` are the fields that a case speaks of."""
        row_BT = torch.arange(len(self.mask_BT)).unsqueeze(-1).expand_as(self.mask_BT)
        index_BT = torch.arange(self.mask_BT.shape[1]).expand_as(self.mask_BT)
        num_rows, num_tokens = len(self.mask_BT), int(self.mask_BT.sum())
        fields: dict[str, Any] = {
            "row_N": self.flat(row_BT),
            "index_N": self.flat(index_BT),
            "group_R": torch.tensor([sorted(set(group)).index(g) for g in group] if group else [0] * num_rows),
            "reward_R": torch.as_tensor(reward if reward is not None else [0.0] * num_rows, dtype=torch.float64),
            "graded_R": torch.full((num_rows,), reward is not None),
            "mask_N": torch.ones(num_tokens, dtype=torch.bool),
            "weight_N": torch.ones(num_tokens, dtype=torch.float64),
            **dict.fromkeys(("sampled_logprob_N", "student_logprob_N", "student_entropy_N")),
            "step": 0,
            "progress": 0.0,
        }
        return PlanInputs(**(fields | known))

    def logprob(self, logits_BTV: Any, temperature: float = 1.0) -> Tensor:
        """[N] of the sampled tokens, as `head_stats` says it."""
        logits_NV = self.flat(logits_BTV)
        stats = head_stats(logits_NV, identity(logits_NV.shape[-1]), sampled_ids_N=self.ids_N, temperature=temperature)
        assert stats.sampled_logprob_N is not None
        return stats.sampled_logprob_N

    def learn(
        self,
        terms: list[Term],
        student_BTV: Any,
        teacher: ViewTokens | None = None,
        *,
        ids_N: Tensor | None = None,
        temperature: float = 1.0,
        gradient: str = "closed_form",
    ) -> tuple[HeadOutput, Tensor]:
        """(what the head says, [B, T, V] gradient with respect to the student's logits)."""
        student_NV = self.flat(student_BTV).clone().requires_grad_()
        head = identity(student_NV.shape[-1])
        ids_N = self.ids_N if ids_N is None else ids_N
        out = head_loss(student_NV, head, ids_N, terms, teacher, temperature=temperature, gradient=gradient)
        return out, self.padded(torch.autograd.grad(out.loss, student_NV)[0])

    def teacher(self, logits_BTV: Any) -> ViewTokens:
        logits_NV = self.flat(logits_BTV)
        return ViewTokens(hidden_NH=logits_NV, head=identity(logits_NV.shape[-1]))


def identity(size: int) -> Head:
    return Head(weight_VH=torch.eye(size, dtype=torch.float64), num_tokens=size)


def of_lengths(lengths: Any, width: int) -> Tensor:
    """[B, T] bool: the first tokens of each row."""
    return torch.arange(width) < torch.as_tensor(lengths).unsqueeze(-1)
