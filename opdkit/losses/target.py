"""A target out of views: one log-probability per entry from the weighted log-probabilities of several readers.

Letters: n tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from opdkit.losses import logprobs
from opdkit.losses.inputs import ViewTokens
from opdkit.losses.logprobs import Implicit
from opdkit.losses.names import TargetKind
from opdkit.losses.spec import LossSpec, Target
from opdkit.losses.support import TargetScores


def view_scores(
    said: ViewTokens,
    logprob_nV: Tensor | Implicit | None,
    prob_nV: Tensor | None,
    dtype: torch.dtype,
    silent_V: Tensor | None = None,
) -> TargetScores:
    """What a view says of n tokens: its whole distribution, if that is known, and what it listed. silent_V: see
    `TargetScores`."""
    return TargetScores(
        logprob_nV,
        prob_nV,
        said.topk_ids_NK,
        None if said.topk_logprob_NK is None else said.topk_logprob_NK.to(dtype),
        None if said.sampled_logprob_N is None else said.sampled_logprob_N.to(dtype),
        silent_V,
    )


def target_scores(
    target: Target, loss: LossSpec, views: Mapping[str, TargetScores], sampled_ids_n: Tensor
) -> TargetScores:
    """What the target says of n tokens, from what each of its views says, in nats; without gradient."""
    if target.only is not None:
        return views[target.only]
    asked = target.asks(loss)
    parts = [(views[view], weight) for view, weight in target.weights]
    if all(needs.answer == "sampled" for needs in asked.values()):
        said = [(view.sampled(sampled_ids_n), weight) for view, weight in parts]
        known = [(sampled_n, weight) for sampled_n, weight in said if sampled_n is not None]
        return TargetScores(sampled_logprob_n=combined(known, target.kind))
    if any(view.silent_V is not None for view, _ in parts):
        raise ValueError(f"{target}: a view with another tokenizer says nothing of some ids, so it cannot be combined")
    full = [(view.logprob_nV, weight) for view, weight in parts if view.logprob_nV is not None]
    logprob_nV = combined(full, target.kind)
    if target.kind == "mixture":
        return TargetScores(logprob_nV, logprob_nV.exp())
    return TargetScores(*logprobs.distribution_(logprob_nV))  # a weighted sum of log-probs is one of logits


def combined(parts: Sequence[tuple[Tensor, float]], kind: TargetKind = "logits") -> Tensor:
    """From (log-probs, weight) of views, of one shape: log sum w q of a mixture, else sum w log q, not normalised."""
    if kind == "mixture":
        return reduce(torch.logaddexp, [logprob + math.log(weight) for logprob, weight in parts])
    (first, weight), *others = parts
    total = first * weight
    for logprob, weight in others:
        total.add_(logprob, alpha=weight)
    return total
