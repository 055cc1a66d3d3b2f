"""Do the scores of a problem's answers rank them as their rewards do? Rank metrics of one problem.

The answers have scores q, rewards r and success labels z:

    spearman                 Pearson correlation of the average ranks of q and r
    kendall_tau              (C - D) / (C + D) over the pairs tied in neither q nor r
    pairwise_accuracy        share of the pairs with other rewards that q orders as r does; a tie of q is wrong
    success_auc              chance that a success scores above a failure; a tie counts half (Mann-Whitney)
    success_point_biserial   Pearson correlation of q and z
    success_brier_sigmoid    mean of (sigmoid(q) - z)^2; lower is better
    success_brier_minmax     the same of q scaled to [0, 1] within the problem
    top1_hit_rate            whether the answer with the highest q (the first of them, by sample id) is a success or has
                             the highest reward

These are the definitions of MOPD's analysis (arXiv:2605.12652, compute_teacher_signal_metrics.py), but for what is not
defined: a problem whose answers have one reward, one score or one label has no rank correlation there. It leaves the
mean of that metric and is counted; `definitions = "published"` puts 0 in its place (and calls a constant score 1/2
after scaling), as that code does. An AUC of 0 for "all answers were right" says that the teacher is wrong about all.

Letters: P problems, N answers of a problem (the largest number), M metrics.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Definitions = Literal["careful", "published"]
METRICS = (
    "spearman",
    "kendall_tau",
    "pairwise_accuracy",
    "success_auc",
    "success_point_biserial",
    "success_brier_sigmoid",
    "success_brier_minmax",
    "top1_hit_rate",
)

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def problem_metrics(
    scores_PN: npt.ArrayLike,
    rewards_PN: npt.ArrayLike,
    success_PN: npt.ArrayLike,
    known_PN: npt.ArrayLike | None = None,
    *,
    definitions: Definitions = "careful",
) -> Floats:
    """[P, M]: every metric of every problem, in the order of `METRICS`. NaN: not defined (careful: also not measured).

    known_PN: which places hold an answer; others are padding. A problem with fewer than two answers has no metric under
    either definition.
    """
    known = np.ones(np.shape(scores_PN), dtype=bool) if known_PN is None else np.asarray(known_PN, dtype=bool)
    q = np.where(known, np.asarray(scores_PN, dtype=np.float64), 0.0)
    r = np.where(known, np.asarray(rewards_PN, dtype=np.float64), 0.0)
    z = np.where(known, np.asarray(success_PN, dtype=np.float64), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NaN here: not defined
        values = np.stack(
            [
                _pearson(_ranks(q, known), _ranks(r, known), known),
                *_pair_metrics(q, r, z, known),
                _pearson(q, z, known),
                _mean((_sigmoid(q) - z) ** 2, known),
                _mean((_minmax(q, known, definitions) - z) ** 2, known),
                _top1(q, r, z, known),
            ],
            axis=-1,
        )
    if definitions == "published":
        values[np.isnan(values)] = 0.0
    values[known.sum(-1) < 2] = np.nan
    return values


def _pair_metrics(q: Floats, r: Floats, z: Floats, known: Flags) -> tuple[Floats, Floats, Floats]:
    """Kendall's tau, pairwise accuracy and AUC: what counts pairs. Each pair is seen from both sides."""
    both = known[:, :, None] & known[:, None, :]
    order_q, order_r, order_z = (np.where(both, np.sign(x[:, :, None] - x[:, None, :]), 0.0) for x in (q, r, z))
    agreement = order_q * order_r
    concordant, discordant = (agreement > 0).sum((1, 2)), (agreement < 0).sum((1, 2))
    rewarded = (order_r != 0).sum((1, 2))
    labelled = order_z > 0  # [success, failure]
    wins = (labelled & (order_q > 0)).sum((1, 2)) + 0.5 * (labelled & (order_q == 0)).sum((1, 2))
    return (
        (concordant - discordant) / (concordant + discordant),
        concordant / rewarded,
        wins / labelled.sum((1, 2)),
    )


def _ranks(x: Floats, known: Flags) -> Floats:
    """Average ranks from 1, ties sharing theirs."""
    both = known[:, :, None] & known[:, None, :]
    below = (both & (x[:, None, :] < x[:, :, None])).sum(-1)
    equal = (both & (x[:, None, :] == x[:, :, None])).sum(-1)
    return np.asarray(below + (equal + 1) / 2)


def _pearson(x: Floats, y: Floats, known: Flags) -> Floats:
    """NaN where either is constant, which is asked of the values and not of a rounded variance."""
    dx, dy = (np.where(known, v - _mean(v, known)[:, None], 0.0) for v in (x, y))
    value = (dx * dy).sum(-1) / np.sqrt((dx**2).sum(-1) * (dy**2).sum(-1))
    return np.where(_constant(x, known) | _constant(y, known), np.nan, value)


def _constant(x: Floats, known: Flags) -> Flags:
    return np.where(known, x, np.inf).min(-1) >= np.where(known, x, -np.inf).max(-1)


def _mean(x: Floats, known: Flags) -> Floats:
    return np.asarray(np.where(known, x, 0.0).sum(-1) / known.sum(-1))


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _minmax(q: Floats, known: Flags, definitions: Definitions) -> Floats:
    low = np.where(known, q, np.inf).min(-1, keepdims=True)
    high = np.where(known, q, -np.inf).max(-1, keepdims=True)
    constant = 0.5 if definitions == "published" else np.nan
    return np.where(high > low, (q - low) / (high - low), constant)


def _top1(q: Floats, r: Floats, z: Floats, known: Flags) -> Floats:
    first = np.where(known, q, -np.inf).argmax(-1)[:, None]
    best = np.where(known, r, -np.inf).max(-1)
    return ((np.take_along_axis(r, first, 1)[:, 0] >= best) | (np.take_along_axis(z, first, 1)[:, 0] > 0)).astype(float)
