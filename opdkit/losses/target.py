"""A target out of views: one log-probability per entry from the weighted log-probabilities of several readers.

Letters: n tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from opdkit.losses import logprobs
from opdkit.losses.spec import LossSpec, Target
from opdkit.losses.support import TargetScores


def target_scores(
    target: Target, loss: LossSpec, views: Mapping[str, TargetScores], sampled_ids_n: Tensor
) -> TargetScores:
    """What the target says of n tokens, from what each of its views says, in nats; without gradient."""
    if target.only is not None:
        return views[target.only]
    asked = target.asks(loss)
    parts = [(views[view], weight) for view, weight in target.weights]
    combine = _mixed if target.kind == "mixture" else _summed
    if all(needs.teacher == "sampled" for needs in asked.values()):
        said = [(view.sampled(sampled_ids_n), weight) for view, weight in parts]
        return TargetScores(
            sampled_logprob_n=combine([(known_n, weight) for known_n, weight in said if known_n is not None])
        )
    logprob_nV = combine([(view.logprob_nV, weight) for view, weight in parts if view.logprob_nV is not None])
    if target.kind == "mixture":
        return TargetScores(logprob_nV, logprob_nV.exp())
    return TargetScores(*logprobs.distribution(logprob_nV))  # a weighted sum of log-probs is one of logits


def _summed(parts: list[tuple[Tensor, float]]) -> Tensor:
    (first, weight), *others = parts
    total = first * weight
    for logprob, weight in others:
        total.add_(logprob, alpha=weight)
    return total


def _mixed(parts: list[tuple[Tensor, float]]) -> Tensor:
    return reduce(torch.logaddexp, [logprob + math.log(weight) for logprob, weight in parts])
