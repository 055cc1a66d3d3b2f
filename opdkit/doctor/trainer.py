"""What the trainer says of any answers: the passes that learn, the head that the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from opdkit.doctor.patient import Patient
from opdkit.losses import head_stats

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSays:
    """Of the N tokens of some answers, one after another, in nats."""

    logprob_N: Floats  # of the token that stands there
    best_N: Floats  # of the likeliest one
    entropy_N: Floats


@torch.no_grad()
def trainer_says(
    patient: Patient, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, temperature: float
) -> TrainerSays:
    student, passes, weights = patient.state.student, patient.state.passes, patient.weights
    head = student.head(weights)
    parts: dict[int, tuple[Floats, Floats, Floats]] = {}
    for rows in student.planned(prompts, answers, passes):
        said = [answers[row] for row in rows]
        hidden_nH = student.hidden([prompts[row] for row in rows], said, weights=weights, passes=passes)
        ids_n = torch.tensor([token for answer in said for token in answer], device=hidden_nH.device)
        stats = head_stats(hidden_nH, head, sampled_ids_N=ids_n, k=1, entropy=True, temperature=temperature)
        assert stats.sampled_logprob_N is not None and stats.topk_logprob_NK is not None
        assert stats.entropy_N is not None
        ends = np.cumsum([len(answer) for answer in said])[:-1]
        columns = (stats.sampled_logprob_N, stats.topk_logprob_NK[:, 0], stats.entropy_N)
        split = [np.split(column.double().cpu().numpy(), ends) for column in columns]
        parts |= dict(zip(rows, zip(*split, strict=True), strict=True))
    logprob_N, best_N, entropy_N = (
        np.concatenate([np.zeros(0), *(parts[row][place] for row in range(len(answers)))]) for place in range(3)
    )
    return TrainerSays(logprob_N=logprob_N, best_N=best_N, entropy_N=entropy_N)
