"""The percentile bootstrap over problems, by which published analyses give their intervals (MOPD, arXiv:2605.12652).

For their numbers only: it is too narrow for few problems and near an end of the scale, and has no width where every
problem scores the same (30 of 30 right says [1, 1]). Ours are in `intervals.py`; `benchmarks/interval_coverage.py`
compares the two.

Letters: P problems, S statistics (columns), R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from opdkit.measure.intervals import CONFIDENCE, Estimate, Floats
from opdkit.types import seed_from

_MAX_CELLS = 4_000_000  # resample weights held at once: 32 MB


def bootstrap_means(values_PS: npt.ArrayLike, *, seed: int, resamples: int) -> list[Estimate]:
    """The mean of each column over the problems that have a value (not NaN or None), with its percentile interval.

    values_PS: [P, S]. Problems without a value leave the mean and its denominator, in every resample too. All columns
    see the same resamples, which depend on the seed and P only. The problems' order matters to the third digit of low
    and high: sort them for a reproducible table.
    """
    values_PS = np.asarray(values_PS, dtype=np.float64)
    num_problems, num_columns = values_PS.shape
    known_PS = np.isfinite(values_PS)
    filled_PS = np.where(known_PS, values_PS, 0.0)
    means_RS = np.full((resamples, num_columns), np.nan)
    rng = np.random.Generator(np.random.PCG64(seed_from(seed, "bootstrap", num_problems)))
    for start, weights_RP in _resample_weights(rng, num_problems, resamples):
        counts_RS = weights_RP @ known_PS
        rows = slice(start, start + len(weights_RP))
        np.divide(weights_RP @ filled_PS, counts_RS, out=means_RS[rows], where=counts_RS > 0)
    return [_estimate(values_PS[known_PS[:, s], s], means_RS[:, s]) for s in range(num_columns)]


def _resample_weights(rng: np.random.Generator, num_problems: int, resamples: int) -> Iterator[tuple[int, Floats]]:
    """Yields (first resample, weights [r, P]): how often each problem was drawn in P draws with replacement."""
    chunk = max(1, _MAX_CELLS // max(1, num_problems))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, num_problems, (size, num_problems))
        drawn += np.arange(size)[:, None] * num_problems
        counts = np.bincount(drawn.ravel(), minlength=size * num_problems)
        yield start, counts.reshape(size, num_problems).astype(np.float64)


def _estimate(known_values: Floats, means_R: Floats) -> Estimate:
    num_known = len(known_values)
    value = float(known_values.mean()) if num_known else None
    if num_known < 2:
        return Estimate(value=value, low=None, high=None, problems=num_known)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means_R, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high), problems=num_known)
