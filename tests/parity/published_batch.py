"""A published input set as the trainer would see it: whoever a method or a weight asks has been asked.

The teacher's word comes from `head_stats`, the student's from a `head_loss` before the update (`training/plan.py`).
Letters: B rows, T positions, V vocabulary, N valid tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from case_batch import CaseBatch, identity
from torch import Tensor

from opdkit.losses import HeadOutput, HeadStats, Term, ViewTokens, head_stats
from opdkit.losses.spec import NegativeLogLikelihood
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting import Weights


def method_of(name: str, **keys: Any) -> Method:
    """A method as a recipe would make it."""
    return METHODS[name].model_validate({"name": name, **keys})


class PublishedBatch(CaseBatch):
    """The valid tokens of an input set, row by row, in float64. `rows`: some of its rows, as if they were all."""

    def __init__(self, inputs: Mapping[str, Any], temperature: float = 1.0, rows: list[int] | None = None) -> None:
        self.temperature = temperature
        chosen = slice(None) if rows is None else rows
        self.student_BTV, self.teacher_BTV, ids_BT, lengths = (
            torch.tensor(inputs[name])[chosen] for name in ("student_logits", "teacher_logits", "tokens", "lengths")
        )
        super().__init__(torch.arange(ids_BT.shape[1]) < lengths.unsqueeze(-1), ids_BT.long())

    def asked(self, method: Method, weights: Weights | None = None, **known: Any) -> PlanInputs:
        """What the trainer would tell the method; `known` takes the place of what a case states itself."""
        said = None if self._asks_everything(method) else self._teacher_stats(method)
        scores = {"student": NegativeLogLikelihood(), **(weights.scores if weights else {})}
        ones_N = torch.ones(len(self.ids_N), dtype=torch.float64)
        terms = [Term(name=name, loss=loss, coef_N=ones_N) for name, loss in scores.items()]
        before, _ = self.learn(terms, self.student_BTV, self.teacher(self.teacher_BTV), temperature=self.temperature)
        found = {
            "sampled_logprob_N": before.sampled_logprob_N,
            "student_logprob_N": before.sampled_logprob_N,
            "student_entropy_N": before.entropy_N,
            "student_scores": before.token_loss,
            "view_logprob": {"teacher": said.sampled_logprob_N} if said else {},
            "view_entropy": {"teacher": said.entropy_N} if said and said.entropy_N is not None else {},
            "seed_R": range(len(self.mask_BT)),
            "num_ids": self.student_BTV.shape[-1],
        }
        plan = self.plan(**(found | known))
        return weights.apply(plan) if weights else plan

    def run(self, method: Method, plan: PlanInputs, gradient: str = "closed_form") -> tuple[HeadOutput, Tensor]:
        """(output, [B, T, V] gradient of the loss with respect to the student's logits)."""
        return self.learn(
            method.terms(plan),
            self.student_BTV,
            self.teacher_tokens(method),
            temperature=self.temperature,
            gradient=gradient,
        )

    def teacher_tokens(self, method: Method) -> ViewTokens:
        """What the method asks of the teacher, and nothing else."""
        if self._asks_everything(method):
            return self.teacher(self.teacher_BTV)
        said = self._teacher_stats(method)
        return ViewTokens(
            sampled_logprob_N=said.sampled_logprob_N,
            topk_ids_NK=said.topk_ids_NK,
            topk_logprob_NK=said.topk_logprob_NK,
        )

    def _asks_everything(self, method: Method) -> bool:
        return method.needs.teacher is not None and method.needs.teacher.answer == "distribution"

    def _teacher_stats(self, method: Method) -> HeadStats:
        asked = method.needs.teacher
        return head_stats(
            self.flat(self.teacher_BTV),
            identity(self.teacher_BTV.shape[-1]),
            sampled_ids_N=self.ids_N,
            k=asked.k if asked else None,
            entropy=asked is not None and asked.entropy,
            temperature=self.temperature,
        )
