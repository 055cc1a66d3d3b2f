"""How much a token counts: from what is known of a batch before its first backward to masks and weights.

A selection is a mask (the loss becomes the mean over kept tokens), everything else a weight (it leaves denominators
alone); `coefficients.py` makes coefficients of both.
Letters: N tokens of the batch, those of a row standing together and in order, R rows, A values of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from opdkit.losses.names import RatioLevel

MIN_SHARPNESS = 1e-6  # PW-OPSD's lower bound of s: below it the schedule is a step
MIN_PROPENSITY = 1e-8  # of a token to be drawn, in each factor (HJSang)
MIN_PREFIX_MASS = 1e-8  # IW-OPD: an answer without any disagreement keeps weight 1 + gamma throughout
MAX_LOG_RATIO = 20.0  # before exp, as in every published trainer


# Selections: [N] bool, at least one token of every row.


def keep_best(score_N: Tensor, row_N: Tensor, keep: float) -> Tensor:
    """The floor(keep * tokens) highest scores of every row, at least one; among equals the earlier token.

    TIP (arXiv:2604.14084) keeps a share of each rollout; minimum and tie rule are choices it leaves open.
    """
    by_score = score_N.argsort(descending=True, stable=True)
    order = by_score[row_N[by_score].argsort(stable=True)]  # row by row, best first
    place_N, length_N = _place_in_row(row_N[order])
    kept_N = torch.zeros_like(row_N, dtype=torch.bool)
    # The sum is exact but for the last bit of a product like 0.29 * 100, which must not cost a token.
    kept_N[order] = place_N < (length_N.double() * keep + 1e-9).floor().clamp(min=1)
    return kept_N


def draw(propensity_N: Tensor, row_N: Tensor, keep: float, seeds_R: Sequence[int]) -> Tensor:
    """As many of every row, drawn without replacement with probability proportional to `propensity_N` (above 0).

    The keys log w + Gumbel noise, highest first, are such a draw. seeds_R: one per row, from identity, so that a row's
    draw depends on nothing else in the batch.
    """
    lengths = torch.bincount(row_N, minlength=len(seeds_R)).tolist()
    noise = [
        torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, n in zip(seeds_R, lengths, strict=True)
    ]
    uniform_N = torch.cat(noise).to(row_N.device)
    return keep_best(propensity_N.double().log() - (-uniform_N.log()).log(), row_N, keep)


# Scores: [N], higher is kept first.


def soft_or(entropy_N: Tensor, divergence_N: Tensor, percentile: float) -> Tensor:
    """h + d - h d: tokens where the student is unsure, or disagrees with the teacher (TIP, Soft-OR).

    h: entropy, cut at its `percentile` over the batch and mapped to [0, 1]; d: KL(student || teacher) mapped to [0, 1].
    """
    unsure_N, apart_N = clipped_entropy(entropy_N, percentile), unit_interval(divergence_N)
    return unsure_N + apart_N - unsure_N * apart_N


def confident_and_wrong(entropy_N: Tensor, forward_kl_N: Tensor, percentile: float) -> Tensor:
    """KL(teacher || student) (1 - h): tokens of which the student is sure and the teacher is not (TIP, Q3)."""
    return forward_kl_N * (1 - clipped_entropy(entropy_N, percentile))


def propensity(entropy_N: Tensor, jsd_N: Tensor | None, num_ids: int, alpha: float, gamma: float) -> Tensor:
    """(H / ln V)^alpha (JSD / ln 2)^gamma, each factor at least 1e-8 (entropy_weighted_sample of HJSang's OPSD code).

    num_ids: V. jsd_N: the symmetric one between teacher and student, or None with gamma = 0.
    """
    value_N = (entropy_N / math.log(num_ids)).clamp(min=MIN_PROPENSITY) ** alpha
    return value_N if jsd_N is None else value_N * (jsd_N / math.log(2)).clamp(min=MIN_PROPENSITY) ** gamma


def clipped_entropy(entropy_N: Tensor, percentile: float) -> Tensor:
    """Entropy, at most its `percentile` over the batch, mapped to [0, 1]. Units cancel, so ln V is not divided by."""
    return unit_interval(entropy_N.clamp(max=quantile(entropy_N, percentile)))


def unit_interval(value_N: Tensor) -> Tensor:
    """(value - lowest) / (highest - lowest) over the batch; 0 where all are equal."""
    low, high = value_N.min(), value_N.max()
    return torch.where(high > low, (value_N - low) / (high - low), 0.0)


def unit_interval_of_row(value_N: Tensor, row_N: Tensor) -> Tensor:
    """The same within every row."""
    num_rows = int(row_N.max()) + 1 if row_N.numel() else 0
    low_N, high_N = (
        value_N.new_zeros(num_rows).scatter_reduce_(0, row_N, value_N, how, include_self=False)[row_N]
        for how in ("amin", "amax")
    )
    return torch.where(high_N > low_N, (value_N - low_N) / (high_N - low_N), 0.0)


def quantile(value_A: Tensor, share: float) -> Tensor:
    """The `share`-quantile, interpolated linearly between neighbours; NaN of nothing. (torch.quantile refuses more than
    16M values.)"""
    if not len(value_A):
        return value_A.new_tensor(torch.nan)
    ordered_A = value_A.sort().values
    place = share * (len(ordered_A) - 1)
    below = math.floor(place)
    low, high = ordered_A[below], ordered_A[min(below + 1, len(ordered_A) - 1)]
    return low + (high - low) * (place - below)


# Weights of tokens: [N].


def position(
    row_N: Tensor, w_min: float, tau: float, s: float, *, mean_one: bool, dtype: torch.dtype, reverse: bool = False
) -> Tensor:
    """w_min + (1 - w_min) sigmoid((u - tau) / s), u = (i - 1/2) / T for the i-th of T tokens (PW-OPSD, as its code
    has it).

    mean_one: divided by its mean in every row, so that late tokens gain what early ones lose. Without a floor
    (w_min = 0) every weight of a short row may be too small for a number, so they are compared as logarithms with the
    row's largest.
    reverse: u from the end, so that the first token has the last one's weight: a control.
    """
    place_N, length_N = _place_in_row(row_N)
    passed_N = (place_N.double() + 0.5) / length_N
    passed_N = 1 - passed_N if reverse else passed_N
    late_N = (passed_N - tau) / max(s, MIN_SHARPNESS)
    if not mean_one:
        return (w_min + (1 - w_min) * torch.sigmoid(late_N)).to(dtype)
    log_floor, log_rest = late_N.new_tensor([w_min, 1 - w_min]).log()
    log_weight_N = torch.logaddexp(log_floor, log_rest + logsigmoid(late_N))
    first_N = torch.arange(len(row_N), device=row_N.device) - place_N
    largest_N = first_N if reverse else first_N + length_N - 1
    weight_N = (log_weight_N - log_weight_N[largest_N]).exp()
    return (weight_N / _mean_of_row(weight_N, row_N)).to(dtype)


def importance(
    log_ratio_N: Tensor,
    row_N: Tensor,
    level: RatioLevel,
    cap: float,
    *,
    mean_one: bool,
) -> Tensor:
    """min(cap, p / p_sampled) of every token, or of its whole row: truncated importance weights, held constant.

    log_ratio_N: log p - log p_sampled, nats. mean_one: divided by its mean over the batch's tokens, or over the rows
    that have any.
    """
    of_token = level == "token"
    log_ratio = log_ratio_N if of_token else _sum_of_row(log_ratio_N, row_N)
    weight = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    if mean_one:
        averaged = weight if of_token else weight[row_N.unique()]
        weight = weight / (averaged.sum() / len(averaged))
    return weight if of_token else weight[row_N]


def certainty(entropy_N: Tensor, rate: float) -> Tensor:
    """e^(-rate H), divided by its mean over the tokens: those of which the teacher is sure count more (SRPO)."""
    weight_N = (-rate * entropy_N).exp()
    return weight_N * len(weight_N) / weight_N.sum()


def prefix(gap_N: Tensor, row_N: Tensor, gamma: float) -> Tensor:
    """1 + gamma (1 - share of the answer's disagreement that lies before the token): early tokens count more (IW-OPD).

    gap_N: log q - log p_sampled of the sampled token; the disagreement is its absolute value.
    """
    apart_N = gap_N.abs().double()
    before_N = apart_N.cumsum(0) - apart_N
    place_N, _ = _place_in_row(row_N)
    before_N = before_N - before_N[torch.arange(len(row_N), device=row_N.device) - place_N]  # at the row's first token
    whole_N = _sum_of_row(apart_N, row_N)[row_N].clamp(min=MIN_PREFIX_MASS)
    return (1 + gamma * (1 - before_N / whole_N)).to(gap_N.dtype)


# Weights of rows: [R].


def beta_kernel(pass_rate_R: Tensor, alpha: float, beta: float) -> Tensor:
    """p^alpha (1 - p)^beta: most for problems that are sometimes solved, peak at alpha / (alpha + beta) (PACED)."""
    return pass_rate_R**alpha * (1 - pass_rate_R) ** beta


def mean_one_per_problem(weight_R: Tensor, group_R: Tensor) -> Tensor:
    """Divided by its mean over the batch's problems (each counted once, however many rows it has). A problem's rows
    carry one weight. All zeros stay zeros."""
    rows_of_R = torch.bincount(group_R)[group_R]
    mean = (weight_R / rows_of_R).sum() / (1 / rows_of_R.double()).sum()
    return weight_R / torch.where(mean > 0, mean, 1.0)


def reward_softmax(reward_R: Tensor, group_R: Tensor | None, temperature: float) -> Tensor:
    """n softmax(reward / temperature) over the n rows of each group: rewarded answers count more, the mean is 1.

    group_R None: over all rows of the batch, as HJSang's reward_beta publishes it; that mixes easy and hard problems.
    """
    scaled_R = reward_R / temperature
    if group_R is None:
        return len(scaled_R) * (scaled_R - scaled_R.logsumexp(0)).exp()
    size_G = torch.bincount(group_R)
    highest_G = scaled_R.new_full((len(size_G),), -torch.inf).scatter_reduce_(0, group_R, scaled_R, "amax")
    exp_R = (scaled_R - highest_G[group_R]).exp()
    return size_G[group_R] * exp_R / _sum_of_row(exp_R, group_R)[group_R]


def _place_in_row(row_N: Tensor) -> tuple[Tensor, Tensor]:
    """([N] place in its row, from 0; [N] tokens of the row), rows standing together."""
    length_R = torch.bincount(row_N)
    start_R = length_R.cumsum(0) - length_R
    # A row's start counts the tokens of all rows of lower number, so rows must come in order of their number.
    return torch.arange(len(row_N), device=row_N.device) - start_R[row_N], length_R[row_N]


def _sum_of_row(value_N: Tensor, row_N: Tensor) -> Tensor:
    num_rows = int(row_N.max()) + 1 if row_N.numel() else 0
    return value_N.new_zeros(num_rows).index_add_(0, row_N, value_N)


def _mean_of_row(value_N: Tensor, row_N: Tensor) -> Tensor:
    return (_sum_of_row(value_N, row_N) / torch.bincount(row_N).clamp(min=1))[row_N]
