"""Which vocabulary entries a loss compares, and what each side says of them.

The student is always known in full. The teacher is known in full (from hidden states), by its top-k list, or by the
sampled token's log-probability alone; `TargetScores` answers what it can and says what is missing otherwise.
Letters: n tokens, V vocabulary, K length of a top-k list, E entries of a support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.losses import logprobs
from opdkit.losses.logprobs import Implicit
from opdkit.losses.spec import Support


@dataclass(frozen=True, slots=True)
class Entries:
    """Both sides' log-probabilities (nats, over the full vocabulary) at the entries of a support.

    ids_nE            None: every token of the vocabulary, in order
    teacher_nE        None: the loss asks no teacher
    valid_nE          bool; None: all entries are valid. Where False, the other arrays hold values of no meaning
    student_prob_nE   exp(student_nE), and
    teacher_prob_nE   exp(teacher_nE), if they are at hand already; shared by all terms, so not to be written to
    """

    ids_nE: Tensor | None
    student_nE: Tensor
    teacher_nE: Tensor | None
    valid_nE: Tensor | None = None
    student_prob_nE: Tensor | None = None
    teacher_prob_nE: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TargetScores:
    """What the teacher said of n tokens, at the loss temperature, in nats over the full vocabulary. silent_V: the ids
    that a teacher with another tokenizer has no word for (bool); they are in no list."""

    logprob_nV: Tensor | Implicit | None = None
    prob_nV: Tensor | None = None
    topk_ids_nK: Tensor | None = None
    topk_logprob_nK: Tensor | None = None
    sampled_logprob_n: Tensor | None = None
    silent_V: Tensor | None = None

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """(ids_nK, logprob_nK) of the teacher's k likeliest entries."""
        if self.logprob_nV is not None:
            logprob_nK, ids_nK = logprobs.topk(self.logprob_nV, min(k, self.logprob_nV.shape[-1]))
            return ids_nK, logprob_nK
        assert self.topk_ids_nK is not None and self.topk_logprob_nK is not None  # head.py has checked
        if self.topk_ids_nK.shape[-1] <= k:
            return self.topk_ids_nK, self.topk_logprob_nK
        logprob_nK, position_nK = self.topk_logprob_nK.topk(k, dim=-1)
        return self.topk_ids_nK.gather(-1, position_nK), logprob_nK

    def sampled(self, sampled_ids_n: Tensor) -> Tensor | None:
        """[n] log-probability of the sampled token; None if the teacher did not say."""
        if self.sampled_logprob_n is not None:
            return self.sampled_logprob_n
        return None if self.logprob_nV is None else logprobs.gather(self.logprob_nV, sampled_ids_n)


def select(
    support: Support,
    student_nV: Tensor,
    student_prob_nV: Tensor | None,
    teacher: TargetScores | None,
    sampled_ids_n: Tensor,
) -> Entries:
    """The entries of `support` for n tokens. The choice of entries carries no gradient; the log-probabilities do.

    teacher None: a loss that asks no teacher (its support is the sampled token).
    """
    if support.kind == "full":
        assert teacher is not None
        if teacher.silent_V is not None:
            raise ValueError("a teacher with another tokenizer has no word for some ids: no loss compares them all")
        return Entries(None, student_nV, teacher.logprob_nV, None, student_prob_nV, teacher.prob_nV)
    if support.kind == "sampled":
        ids_nE = sampled_ids_n.unsqueeze(-1)
        teacher_n = None if teacher is None else teacher.sampled(sampled_ids_n)
        return Entries(
            ids_nE, logprobs.gather(student_nV, ids_nE), None if teacher_n is None else teacher_n.unsqueeze(-1)
        )
    assert teacher is not None and support.k is not None
    if support.kind == "student_topk":
        ids_nE, valid_nE = _student_topk(student_nV, support.k, teacher.silent_V), None
    else:
        teacher_ids_nK, teacher_nK = teacher.topk(support.k)
        if support.kind == "teacher_topk":
            return Entries(teacher_ids_nK, logprobs.gather(student_nV, teacher_ids_nK), teacher_nK)
        student_ids_nK = _student_topk(student_nV, support.k, teacher.silent_V)
        if support.kind == "intersection":  # at the teacher's ids: their log-probabilities are known from its list
            valid_nE = _is_in(teacher_ids_nK, student_ids_nK)
            return Entries(teacher_ids_nK, logprobs.gather(student_nV, teacher_ids_nK), teacher_nK, valid_nE)
        ids_nE, valid_nE = _both_lists(support, student_ids_nK, teacher_ids_nK)
    assert teacher.logprob_nV is not None  # head.py has checked
    return Entries(ids_nE, logprobs.gather(student_nV, ids_nE), logprobs.gather(teacher.logprob_nV, ids_nE), valid_nE)


def _student_topk(student_nV: Tensor, k: int, silent_V: Tensor | None) -> Tensor:
    student_nV = student_nV.detach()
    if silent_V is not None:
        student_nV = student_nV.masked_fill(silent_V, -torch.inf)
    return logprobs.topk(student_nV, min(k, student_nV.shape[-1]))[1]


def _both_lists(support: Support, student_ids_nK: Tensor, teacher_ids_nK: Tensor) -> tuple[Tensor, Tensor]:
    """The student's list followed by the teacher's, with the validity that makes them a union or a difference."""
    teacher_only_nK = ~_is_in(teacher_ids_nK, student_ids_nK)
    if support.kind == "union":
        student_valid_nK = torch.ones_like(teacher_only_nK)
    else:
        student_valid_nK = ~_is_in(student_ids_nK, teacher_ids_nK)
    return torch.cat([student_ids_nK, teacher_ids_nK], -1), torch.cat([student_valid_nK, teacher_only_nK], -1)


def _is_in(ids_nK: Tensor, other_ids_nK: Tensor) -> Tensor:
    return (ids_nK.unsqueeze(-1) == other_ids_nK.unsqueeze(-2)).any(-1)
