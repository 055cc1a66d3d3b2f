"""95 % intervals over problems: how far a mean would move with other problems of the same kind.

A problem's samples are summed up in its own mean, so however much they resemble each other, what is counted is
problems. With few problems, or a mean near an end of its scale, what was seen says too little of what is rare: 30
problems of which none is solved do not show that none can be. So problems are added before mean and spread are taken,
z^2 = 3.84 of them, half at either end:

    mean         the ends of the scale (0 and 1 of a share). With one sample a problem this is the interval of Agresti
                 and Coull (1998, The American Statistician 52:119), which is Wilson's centre and never narrower; 30
                 of 30 right says [0.86, 1]
    difference   -reach and +reach; reach is the size of a problem's change, each weighed by its size, the added ones
                 being as large as can be: (sum d^2 + z^2 w^2) / (sum |d| + z^2 w), w the width of the scale. 30
                 problems that stay as they are say [-0.12, 0.12]; 7 of 30 must gain a whole point, and none lose,
                 before 0 is left out; the sign test asks for 6

and the interval is mean +- t sd / sqrt(N) of all N = P + z^2, t Student's with P - 1 degrees of freedom, cut to the
scale. `benchmarks/interval_coverage.py` measures how often such intervals hold the truth. The percentile bootstrap of
published analyses is in `bootstrap.py`.

Letters: P problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from opdkit.errors import UserError

CONFIDENCE = 0.95
FEW = 10  # problems; of fewer nothing is called better, worse or proven
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
ADDED = Z**2  # problems
SHARE = (0.0, 1.0)  # the scale of shares and of most rewards

Scale = tuple[float, float] | None  # the smallest and the largest that a value can be; None: it has no bound
Floats = npt.NDArray[np.float64]
Values = Floats | Sequence[float | None]  # NaN, None: no value


class Estimate(TypedDict):
    """A mean over problems. None: unknown (no problem has a value; for low and high also: only one has, or those of a
    quantity without a scale are all equal)."""

    value: float | None
    low: float | None
    high: float | None
    problems: int  # how many problems have a value


class Difference(Estimate):
    """Mean of (after - before) over the same problems."""

    before: float | None
    after: float | None


def estimate_mean(values_P: Values, scale: Scale = SHARE, *, rests_on: int | None = None) -> Estimate:
    """The mean over the problems that have a value (not NaN or None). Values beyond the scale widen it.

    rests_on: how many of the problems the mean hangs on, where that is not all; more are then added, in proportion.
    """
    known_P = _known(values_P)
    scale = _widened(scale, known_P)
    added = ADDED if rests_on is None else ADDED * len(known_P) / rests_on
    return _estimate(known_P, ends=scale, cut=scale, added=added)


def estimate_difference(before_P: Values, after_P: Values, scale: Scale = SHARE) -> Difference:
    """after - before, and both means, over the problems that have both values. scale: of either side's values."""
    before_P, after_P = (np.asarray(side, dtype=np.float64) for side in (before_P, after_P))
    both = np.isfinite(before_P) & np.isfinite(after_P)
    before_P, after_P = before_P[both], after_P[both]
    change_P, widened = after_P - before_P, _widened(scale, np.concatenate([before_P, after_P]))
    ends = cut = None
    if widened is not None:
        width = widened[1] - widened[0]
        reach = float(((change_P**2).sum() + ADDED * width**2) / (np.abs(change_P).sum() + ADDED * width))
        ends, cut = (-reach, reach), (-width, width)
    means = [float(side.mean()) if len(side) else None for side in (before_P, after_P)]
    return Difference(**_estimate(change_P, ends=ends, cut=cut), before=means[0], after=means[1])


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> Difference:
    """How much better `after` is than `before`, problem by problem: problem id -> score, the same problems in both.

    Pairing takes the difficulty of the problems out of the interval, so it is narrower than what two separate intervals
    suggest. Raises UserError when the problems differ: a difference over other problems is not a difference.
    """
    if before.keys() != after.keys():
        only = sorted(before.keys() ^ after.keys())
        raise UserError(
            f"the two runs answered different problems: {len(before.keys() - after.keys())} only in the first and "
            f"{len(after.keys() - before.keys())} only in the second, e.g. {only[0]!r}; compare runs over one dataset"
        )
    if not before:
        raise UserError("there is no problem to compare: both runs are empty")
    ids = sorted(before)
    return estimate_difference([before[name] for name in ids], [after[name] for name in ids])


def mean_over_sets(sets: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of several data sets' means or differences; the sets are independent.

    The distances from value to low add up as their squares do, and so do those to high (Zou and Donner 2008, Statistics
    in Medicine 27:1693). A set without a value, or (for low and high) without an interval, makes the mean unknown: it
    would be another mean.
    """
    problems = sum(one["problems"] for one in sets)
    values = [one["value"] for one in sets if one["value"] is not None]
    if not sets or len(values) < len(sets):
        return Estimate(value=None, low=None, high=None, problems=problems)
    value = math.fsum(values) / len(sets)
    down, up = (_distance(sets, end) for end in ("low", "high"))
    if down is None or up is None:
        return Estimate(value=value, low=None, high=None, problems=problems)
    return Estimate(value=value, low=value - down, high=value + up, problems=problems)


Side = Literal["above", "below", "unsettled", "too_few"]


def side_of(estimate: Estimate, at: float = 0.0) -> Side:
    """On which side of `at` the interval lies. too_few: below `FEW` problems. unsettled: also without an interval."""
    low, high = estimate["low"], estimate["high"]
    if estimate["problems"] < FEW:
        return "too_few"
    if low is None or high is None:
        return "unsettled"
    return "above" if low > at else "below" if high < at else "unsettled"


def _known(values_P: Values) -> Floats:
    values_P = np.asarray(values_P, dtype=np.float64)
    return values_P[np.isfinite(values_P)]


def _widened(scale: Scale, known_P: Floats) -> Scale:
    if scale is None or not len(known_P):
        return scale
    return min(scale[0], float(known_P.min())), max(scale[1], float(known_P.max()))


def _estimate(known_P: Floats, ends: Scale, cut: Scale, added: float = ADDED) -> Estimate:
    """ends: where problems are added; cut: what the interval cannot leave; added: how many problems."""
    num = len(known_P)
    value = float(known_P.mean()) if num else None
    if num < 2 or (ends is None and np.ptp(known_P) == 0):
        return Estimate(value=value, low=None, high=None, problems=num)
    if ends is None or cut is None:
        half = _student_t(num - 1) * float(known_P.std(ddof=1)) / math.sqrt(num)
        return Estimate(value=value, low=float(known_P.mean()) - half, high=float(known_P.mean()) + half, problems=num)
    total = num + added
    centre = (float(known_P.sum()) + added * sum(ends) / 2) / total
    squares = float(((known_P - centre) ** 2).sum()) + added * sum((end - centre) ** 2 for end in ends) / 2
    half = _student_t(num - 1) * math.sqrt(squares) / total
    return Estimate(value=value, low=max(cut[0], centre - half), high=min(cut[1], centre + half), problems=num)


def _distance(sets: Sequence[Estimate], end: Literal["low", "high"]) -> float | None:
    """Of the mean of the sets' values to its own end."""
    distances = [one[end] - one["value"] for one in sets if one[end] is not None and one["value"] is not None]  # type: ignore[operator]
    return math.hypot(*distances) / len(sets) if len(distances) == len(sets) else None


def _student_t(degrees: int) -> float:
    """Student's quantile, by the expansion of Abramowitz and Stegun, 26.7.5: 0.5 % too small for 4 degrees of freedom,
    24 % for 1."""
    z, d = Z, degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )
