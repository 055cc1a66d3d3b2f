"""What a model says of answers: passes over rows, and what is asked of the states behind their tokens.

Letters: N answer tokens of a pass, T answer positions of one row, K likeliest ids, H hidden width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import Progress
from opdkit.engines.forward.passes import Passes
from opdkit.engines.memory import enough_memory
from opdkit.engines.model import Ids, LanguageModel
from opdkit.losses import Head, head_stats
from opdkit.types import Asked, Signal

LESS_AT_ONCE = "lower train.max_tokens_per_scoring_pass (where nothing is trained: max_tokens_per_batch)"


def score(
    model: LanguageModel,
    contexts: Sequence[Ids],
    answers: Sequence[Ids],
    asked: Asked,
    passes: Passes,
    weights: Mapping[str, Tensor] | None,
    head: Head,
    *,
    temperature: float,
    progress: Progress | None,
    states_of: Collection[int],
) -> list[Signal]:
    """See `HFEngine.score`. Rows that share their beginning are read together, and the beginning once."""
    lengths = [len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True)]
    model.check_fits(lengths, what="context and answer")
    results: dict[int, Signal] = {}
    # Not inference mode: the hidden states go into a loss, and autograd refuses inference tensors.
    with torch.no_grad(), model.using(weights), enough_memory("scoring", LESS_AT_ONCE):
        for rows in model.in_step(model.planned(contexts, answers, passes)):
            said = [answers[row] for row in rows]
            hidden_NH = model.hidden([contexts[row] for row in rows], said, passes=passes)
            results.update(zip(rows, signals_of(hidden_NH, head, said, asked, temperature), strict=True))
            if wanted := states_of and asked.answer != "distribution" and {*states_of}.intersection(rows):
                parts = hidden_NH.split([len(answer) for answer in said])
                for row, hidden_TH in zip(rows, parts, strict=True):
                    if row in wanted:
                        results[row] = replace(results[row], hidden_TH=hidden_TH.cpu().clone(), head=head)
            if progress is not None:
                progress(len(results), len(lengths))
    return [results[row] for row in range(len(lengths))]


def signals_of(hidden_NH: Tensor, head: Head, answers: Sequence[Ids], asked: Asked, temperature: float) -> list[Signal]:
    """What hidden states say of the answer tokens they predict, rows one after another: what was asked. The states may
    lie in host memory; they are read where the head is."""
    ends = np.cumsum([len(answer) for answer in answers])[:-1]
    columns: dict[str, Sequence[Any]] = {}
    if asked.answer == "distribution":
        columns["hidden_TH"] = hidden_NH.cpu().tensor_split(ends.tolist())
        columns["head"] = [head] * len(answers)
    if asked.answer != "distribution" or asked.entropy:
        hidden_NH = hidden_NH.to(head.weight_VH.device)
        stats = head_stats(
            hidden_NH,
            head,
            sampled_ids_N=None if asked.answer == "distribution" else _flat(answers, hidden_NH.device),
            k=asked.k if asked.answer == "topk" else None,
            entropy=asked.entropy,
            temperature=temperature,
        )
        said = {
            "sampled_logprob_T": stats.sampled_logprob_N,
            "topk_ids_TK": stats.topk_ids_NK,
            "topk_logprob_TK": stats.topk_logprob_NK,
            "entropy_T": stats.entropy_N,
        }
        columns |= {name: np.split(array.cpu().numpy(), ends) for name, array in said.items() if array is not None}
    return [Signal(**{name: column[row] for name, column in columns.items()}) for row in range(len(answers))]


def _flat(answers: Sequence[Ids], device: torch.device) -> Tensor:
    return torch.tensor([token for answer in answers for token in answer], dtype=torch.long, device=device)
