"""How far the sampler's log-probs are from the trainer's, on tokens where both mean one distribution.

Both are of the student before the step's first update, over the whole vocabulary at one temperature: what is left is
rounding (another batch, a cache, another engine), or a fault. The trainer's come from the passes that are made anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit import losses
from opdkit.metrics import Metric
from opdkit.training.batch import Batch
from opdkit.training.state import State


def sampler_gap(state: State, batch: Batch, logprob_N: Tensor | None, *, first: bool) -> list[Metric]:
    """Sampler minus trainer. logprob_N: the trainer's, NaN where not computed; first: no update of this step came yet.

    Tokens that were not compared are counted: of later updates, of others than the student, at another temperature than
    the loss (greedy is one), or whose log-prob no pass computed.
    """
    gap_N = torch.zeros(0, dtype=torch.float64, device=batch.device)
    is_student = state.method.answer_source == "student" and not state.replays
    one_distribution = is_student and state.temperature == state.method.loss_temperature
    sampled_N = batch.uncut_logprob_N if first and one_distribution else None
    if sampled_N is not None and logprob_N is not None:
        gap_N = (sampled_N.double() - logprob_N.double())[~logprob_N.isnan()]
    numbers: dict[str, float | None] = dict.fromkeys(("bias", "mean", "p999"))
    if len(gap_N):
        p999 = losses.weights.quantile(gap_N.abs(), 0.999)
        numbers = {"bias": float(gap_N.mean()), "mean": float(gap_N.abs().mean()), "p999": float(p999)}
    return [
        *(Metric(f"rollout/sampler_gap_{name}", number) for name, number in numbers.items()),
        Metric("rollout/num_tokens_not_compared", float(batch.num_tokens - len(gap_N)), "sum"),
    ]
