"""Pairs of answers to one problem, the better against the worse: a value, and how it moves with each answer's score.

A pair's loss belongs to two whole answers, not to a token. With one update per batch that is no obstacle: at the
current policy its gradient is a number per answer (`slope_R`) times the gradient of that answer's score h, and h is a
weighted sum of log-probabilities. So the slope becomes the coefficients of -log p of the answer's tokens, and pairs
need not lie in one micro-batch. Letters: N counted tokens, R rows (answers), P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    """Over the pairs of a batch. What is a mean over pairs is None where there are none."""

    loss: float  # mean over pairs; 0.0 without pairs: nothing is lost on nothing
    slope_R: Tensor  # [R] d loss / d score_R
    num_pairs: int
    accuracy: float | None  # share of pairs whose logit is above 0: the better answer is ahead, by the margin
    score_gap: float | None  # mean of h_better - h_worse
    logit: float | None  # mean of beta (h_better - h_worse) - margin


def pair_loss(
    score_R: Tensor,
    better_RR: Tensor,
    *,
    weight_R: Tensor | None = None,
    beta: float,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """mean over pairs of w (-(1 - e) log sigmoid(x) - e log sigmoid(-x)), x = beta (h_better - h_worse) - margin.

    score_R      h of every answer; better_RR: bool, True where row i beats row j (see `better_in_group`)
    weight_R     how much an answer counts; w is the mean of the pair's two, and no part of the divisor. None: 1
    margin       SimPO's gamma, as its authors and MOPD's code write it: not divided by beta

    DPO arXiv:2305.18290 eq. 7, SimPO arXiv:2405.14734 eq. 6, label smoothing as in cDPO.
    """
    winner_P, loser_P = better_RR.nonzero(as_tuple=True)
    num_pairs = len(winner_P)
    num_all = max(1, num_pairs)
    gap_P = score_R[winner_P] - score_R[loser_P]
    logit_P = beta * gap_P - margin
    loss_P = -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)
    slope_P = beta * (label_smoothing - torch.sigmoid(-logit_P)) / num_all
    if weight_R is not None:
        weight_P = (weight_R[winner_P] + weight_R[loser_P]).to(loss_P.dtype) / 2
        loss_P, slope_P = weight_P * loss_P, weight_P * slope_P
    slope_R = torch.zeros_like(score_R).index_add_(0, winner_P, slope_P).index_add_(0, loser_P, -slope_P)
    return PairLoss(
        loss=float(loss_P.sum() / num_all),
        slope_R=slope_R,
        num_pairs=num_pairs,
        accuracy=float((logit_P > 0).double().mean()) if num_pairs else None,
        score_gap=float(gap_P.mean()) if num_pairs else None,
        logit=float(logit_P.mean()) if num_pairs else None,
    )


def better_in_group(reward_R: Tensor, group_R: Tensor, comparable_R: Tensor) -> Tensor:
    """[R, R] bool: row i has a higher reward than row j of the same group, and both are comparable (graded)."""
    both_RR = comparable_R.unsqueeze(1) & comparable_R.unsqueeze(0) & (group_R.unsqueeze(1) == group_R.unsqueeze(0))
    return both_RR & (reward_R.unsqueeze(1) > reward_R.unsqueeze(0))


def token_shares(mask_N: Tensor, weight_N: Tensor, row_N: Tensor, num_rows: int, *, mean: bool) -> Tensor:
    """[N] float64: what each token adds of its log-probability to its answer's score, a sum or a mean over tokens."""
    share_N = torch.where(mask_N, weight_N.double(), 0.0)
    if not mean:
        return share_N
    tokens_R = torch.bincount(row_N[mask_N], minlength=num_rows)
    return share_N / tokens_R[row_N].clamp(min=1)


def answer_scores(logprob_N: Tensor, share_N: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
    """[R] float64 sum of share * log-probability over each row's counted tokens."""
    counted_N = torch.where(share_N != 0, share_N * logprob_N.double(), 0.0)
    return counted_N.new_zeros(num_rows).index_add_(0, row_N, counted_N)
