"""How far the sampler's log-probs are from the trainer's, on tokens where both mean one distribution; and, where an
older student sampled, how much its answers are worth to this one.

Both log-probs of the gap are of the student before the step's first update, over the whole vocabulary at one
temperature: what is left is rounding (another batch, a cache, another engine), or a fault. The trainer's come from the
passes that are made anyway.
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

    Tokens that were not compared are counted: of later updates, of others than the student or an older one, at another
    temperature than the loss (greedy is one), whose log-prob no pass computed, or of which the sampler does not say
    what it was before a cut.
    """
    gap_N = torch.zeros(0, dtype=torch.float64, device=batch.device)
    is_student = state.method.answer_source == "student" and not state.replays
    one_distribution = is_student and state.temperature == state.method.loss_temperature
    sampled_N = batch.uncut_logprob_N if first and one_distribution else None
    if sampled_N is not None and logprob_N is not None:
        gap_N = (sampled_N.double() - logprob_N.double())[lag_N(state, batch) == 0]
        gap_N = gap_N[~gap_N.isnan()]
    numbers: dict[str, float | None] = dict.fromkeys(("bias", "mean", "p999"))
    if len(gap_N):
        p999 = losses.weights.quantile(gap_N.abs(), 0.999)
        numbers = {"bias": float(gap_N.mean()), "mean": float(gap_N.abs().mean()), "p999": float(p999)}
    played = any(row.rollout.turns for row in batch.examples)
    largest = float(gap_N.abs().max()) if len(gap_N) else None
    return [
        *([Metric("rollout/max_logprob_gap", largest, "max")] if played else []),
        *(Metric(f"rollout/sampler_gap_{name}", number) for name, number in numbers.items()),
        Metric("rollout/num_tokens_not_compared", float(batch.num_tokens - len(gap_N)), "sum"),
    ]


def lag_metrics(state: State, batch: Batch, logprob_N: Tensor | None) -> list[Metric]:
    """How many steps the student has taken since it sampled, and the effective share of the sample: (sum w)^2 / (N sum
    w^2) of the ratios w = p / p_sampled of the tokens (Kish 1965). 1: as good as answers of its own; None: unknown."""
    ess: float | None = None
    same = state.method.answer_source == "student" and state.temperature == state.method.loss_temperature
    if same and (sampled_N := batch.sampled_logprob_N) is not None and logprob_N is not None:
        log_ratio_N = logprob_N.double() - sampled_N.double()
        log_ratio_N = log_ratio_N[~log_ratio_N.isnan()]
        if len(log_ratio_N):
            ratio_N = (log_ratio_N - log_ratio_N.max()).exp()
            ess = float(ratio_N.sum().square() / (len(ratio_N) * ratio_N.square().sum()))
    lags = [state.step - row.rollout.policy_version for row in batch.examples]
    return [Metric("rollout/lag", sum(lags) / len(lags) if lags else None), Metric("rollout/ess", ess)]


def lag_N(state: State, batch: Batch) -> Tensor:
    """[N] steps since the weights that sampled each token."""
    lags = [state.step - row.rollout.policy_version for row in batch.examples]
    return torch.tensor(lags, dtype=torch.long, device=batch.device)[batch.row_N]
