"""Bootstrap intervals: coverage by simulation, exact special cases, pairing, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.measure import intervals
from opdkit.measure.intervals import bootstrap_means, paired_difference


def test_coverage() -> None:
    """About 95 of 100 intervals over 100 Bernoulli(0.3) problems hold the truth (300 data sets, one call: S = 300).

    The band is 4 standard errors wide. Proves nothing about small P, where the percentile bootstrap is too narrow.
    """
    data_PS = (np.random.default_rng(0).random((100, 300)) < 0.3).astype(float)
    estimates = bootstrap_means(data_PS, resamples=1000)
    held = np.mean([estimate["low"] <= 0.3 <= estimate["high"] for estimate in estimates])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)


def test_width_is_the_standard_error() -> None:
    """For many problems the interval is the mean plus and minus 1.96 standard errors."""
    values = np.random.default_rng(1).normal(size=400)
    estimate = bootstrap_means(values[:, None])[0]
    error = values.std() / math.sqrt(400)
    assert estimate["value"] == pytest.approx(values.mean())
    assert estimate["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many resamples are held in memory at once is not visible in the result."""
    values_PS = np.random.default_rng(2).random((50, 2))
    whole = bootstrap_means(values_PS, resamples=200)
    monkeypatch.setattr(intervals, "_MAX_CELLS", 50 * 7)
    assert bootstrap_means(values_PS, resamples=200) == whole


def test_seed() -> None:
    """The same seed gives the same bits, another seed moves low and high but not the value."""
    values_PS = np.random.default_rng(2).random((50, 1))
    first, again, other = (bootstrap_means(values_PS, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again and first["value"] == other["value"] and first["low"] != other["low"]


def test_missing_values_leave_the_mean() -> None:
    """NaN is no value: a column with two known problems has their mean; with one, no interval; with none, nothing."""
    values_PS = np.array([[1.0, 1.0, np.nan], [0.0, np.nan, np.nan], [np.nan, np.nan, np.nan]])
    two, one, none = bootstrap_means(values_PS)
    assert (two["value"], two["low"], two["high"], two["problems"]) == (0.5, 0.0, 1.0, 2)
    assert one == {"value": 1.0, "low": None, "high": None, "problems": 1}
    assert none == {"value": None, "low": None, "high": None, "problems": 0}


def test_constant_values_have_no_width() -> None:
    """30 of 30 right says [1, 1]; a documented limit, held here so that it is not forgotten."""
    assert bootstrap_means(np.ones((30, 1)))[0] == {"value": 1.0, "low": 1.0, "high": 1.0, "problems": 30}


def test_pairing_removes_the_spread_between_problems() -> None:
    """Every problem gains exactly 0.1: the paired interval has no width although scores span [0, 0.9]."""
    before = {f"p{index}": index / 100 for index in range(90)}
    after = {name: score + 0.1 for name, score in reversed(before.items())}  # order must not matter
    result = paired_difference(before, after)
    assert result["value"] == pytest.approx(0.1)
    assert result["low"] == pytest.approx(0.1) and result["high"] == pytest.approx(0.1)
    assert result["before"] == pytest.approx(0.445) and result["after"] == pytest.approx(0.545)
    assert result["problems"] == 90


def test_refusals() -> None:
    """Other problems, or none: a sentence, not a number."""
    with pytest.raises(UserError, match=r"1 only in the first and 2 only in the second, e\.g\. 'a'"):
        paired_difference({"a": 1.0, "x": 0.0}, {"b": 1.0, "c": 1.0, "x": 1.0})
    with pytest.raises(UserError, match="no problem to compare"):
        paired_difference({}, {})
