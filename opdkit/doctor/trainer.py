"""What the trainer says of any answers: the passes that learn, the head that the loss reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opdkit.losses import Head, head_stats
from opdkit.training.state import State
from opdkit.types import Example

Floats = npt.NDArray[np.float64]
Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSays:
    """Of the N tokens of some answers, one after another, in nats."""

    logprob_N: Floats  # of the token that stands there
    best_N: Floats  # of the likeliest one
    entropy_N: Floats


@torch.no_grad()
def states_of(
    state: State, weights: Mapping[str, Tensor] | None, prompts: Sequence[Ids], answers: Sequence[Ids]
) -> list[Tensor]:
    """[T, H] in host memory behind each answer, as a micro-batch of the recipe makes them."""
    student, passes, found = state.student, state.passes, dict[int, Tensor]()
    for rows in student.planned(prompts, answers, passes):
        said = [answers[row] for row in rows]
        hidden_nH = student.hidden([prompts[row] for row in rows], said, weights=weights, passes=passes)
        found |= dict(zip(rows, hidden_nH.cpu().split([len(answer) for answer in said]), strict=True))
    return [found[row] for row in range(len(answers))]


def says(states: Sequence[Tensor], head: Head, answers: Sequence[Ids], *, temperature: float) -> TrainerSays:
    hidden_NH = torch.cat([*states]).to(head.weight_VH.device)
    ids_N = torch.tensor([token for answer in answers for token in answer], device=hidden_NH.device)
    stats = head_stats(hidden_NH, head, sampled_ids_N=ids_N, k=1, entropy=True, temperature=temperature)
    assert stats.sampled_logprob_N is not None and stats.topk_logprob_NK is not None and stats.entropy_N is not None
    columns = (stats.sampled_logprob_N, stats.topk_logprob_NK[:, 0], stats.entropy_N)
    logprob_N, best_N, entropy_N = (column.double().cpu().numpy() for column in columns)
    return TrainerSays(logprob_N=logprob_N, best_N=best_N, entropy_N=entropy_N)


def shortened(row: Example, num_tokens: int) -> Example:
    """The row with the beginning of its answer alone, which no view has read."""
    whole = row.rollout
    if len(whole.answer_ids) <= num_tokens:
        return replace(row, views={}, signals={})
    arrays: dict[str, Any] = {
        name: None if (array := getattr(whole, name)) is None else array[:num_tokens]
        for name in ("answer_logprobs", "uncut_logprobs", "answer_mask", "turn", "author")
    }
    rollout = replace(whole, answer_ids=whole.answer_ids[:num_tokens], finish="length", **arrays)
    return replace(row, rollout=rollout, views={}, signals={})
