"""What two models say of the same tokens: each one's likeliest ids, both sides' log-probs of them, exact divergences.

For diagnostics, without gradient. Logits of both sides exist for a chunk of tokens at a time, as in `head.py`; what is
kept of a token is 2 K ids, 4 K log-probs and six numbers.

Letters: N tokens, n tokens of a chunk or block, V vocabulary (`num_tokens`), H hidden width, K length of a top-k list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.losses import logprobs
from opdkit.losses.head import blocks, chunks
from opdkit.losses.heads import ABSENT_LOGIT, Head, Projector
from opdkit.losses.inputs import check_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of N tokens, in nats, over the full vocabulary; with a teacher of another tokenizer over the ids that it has a
    word for, both sides renormalised. S = the student's K likeliest ids, T = the teacher's."""

    student_ids_NK: Tensor  # S, in falling order of the student's log-prob
    student_logprob_NK: Tensor  # the student's, of S
    teacher_at_student_NK: Tensor  # the teacher's, of S
    teacher_ids_NK: Tensor  # T, in falling order of the teacher's log-prob
    teacher_logprob_NK: Tensor  # the teacher's, of T
    student_at_teacher_NK: Tensor  # the student's, of T
    student_sampled_N: Tensor  # of the token that stands there
    teacher_sampled_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    forward_kl_N: Tensor  # KL(teacher || student)
    reverse_kl_N: Tensor  # KL(student || teacher)


@torch.no_grad()
def compare_heads(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    sampled_ids_N: Tensor,
    *,
    k: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Comparison:
    """Both distributions of every token at `temperature`, k ids a list (at most V). The sides may differ in width H.

    Raises ValueError for sides of different vocabularies or numbers of tokens, and for ids outside the vocabulary.
    """
    num_tokens = student_head.num_tokens
    if teacher_head.num_compared != num_tokens:
        raise ValueError(f"the student knows {num_tokens} tokens and the teacher {teacher_head.num_compared}")
    if not len(student_hidden_NH) == len(teacher_hidden_NH) == len(sampled_ids_N):
        raise ValueError(
            f"{len(student_hidden_NH)} tokens of the student, {len(teacher_hidden_NH)} of the teacher, "
            f"{len(sampled_ids_N)} ids: they must be the same tokens"
        )
    check_ids("sampled_ids_N", sampled_ids_N, num_tokens)
    device, dtype = student_hidden_NH.device, logprobs.math_dtype(student_hidden_NH.dtype)
    widths = {name: (min(k, num_tokens),) if name.endswith("NK") else () for name in Comparison.__slots__}
    out = {
        name: torch.empty(
            len(sampled_ids_N), *width, device=device, dtype=torch.long if name.endswith("ids_NK") else dtype
        )
        for name, width in widths.items()
    }
    sides = Projector(student_head, student_hidden_NH), Projector(teacher_head, teacher_hidden_NH)
    with torch.autocast(device.type, enabled=False):
        widest = max(num_tokens, teacher_head.num_tokens)
        rows_N, width = torch.arange(len(sampled_ids_N), device=device), student_hidden_NH.shape[-1]
        for rows in chunks(rows_N, widest, width, chunk_size):
            student_nV, teacher_nV = (side(rows) for side in sides)
            for block in blocks(student_nV):
                logits_nV, teacher_logits_nV = (
                    side.head.logits(output_nV[block], temperature)
                    for side, output_nV in zip(sides, (student_nV, teacher_nV), strict=True)
                )
                if teacher_head.silent_W is not None:
                    logits_nV = logits_nV.masked_fill(teacher_head.silent_W, ABSENT_LOGIT)
                teacher_logits_nV = teacher_head.for_reader(teacher_logits_nV, ABSENT_LOGIT)
                student_logprob_nV = logprobs.log_softmax(logits_nV).to(dtype)
                teacher_logprob_nV = logprobs.log_softmax(teacher_logits_nV).to(dtype)
                said = _block(student_logprob_nV, teacher_logprob_nV, sampled_ids_N[rows[block]], min(k, num_tokens))
                for name, value in said.items():
                    out[name][rows[block]] = value
    return Comparison(**out)


def _block(student_nV: Tensor, teacher_nV: Tensor, sampled_ids_n: Tensor, k: int) -> dict[str, Tensor]:
    """The fields of a Comparison from both sides' log-probs."""
    student_prob_nV, teacher_prob_nV = student_nV.exp(), teacher_nV.exp()
    student_nK, student_ids_nK = logprobs.topk(student_nV, k)
    teacher_nK, teacher_ids_nK = logprobs.topk(teacher_nV, k)
    difference_nV = student_nV - teacher_nV
    return {
        "student_ids_NK": student_ids_nK,
        "student_logprob_NK": student_nK,
        "teacher_at_student_NK": logprobs.gather(teacher_nV, student_ids_nK),
        "teacher_ids_NK": teacher_ids_nK,
        "teacher_logprob_NK": teacher_nK,
        "student_at_teacher_NK": logprobs.gather(student_nV, teacher_ids_nK),
        "student_sampled_N": logprobs.gather(student_nV, sampled_ids_n),
        "teacher_sampled_N": logprobs.gather(teacher_nV, sampled_ids_n),
        "student_entropy_N": logprobs.entropy(student_nV, student_prob_nV),
        "teacher_entropy_N": logprobs.entropy(teacher_nV, teacher_prob_nV),
        "forward_kl_N": -torch.linalg.vecdot(teacher_prob_nV, difference_nV),
        "reverse_kl_N": torch.linalg.vecdot(student_prob_nV, difference_nV),
    }
