"""Intervals over problems: coverage by simulation, the numbers by hand, pairing, the published bootstrap, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.measure import bootstrap
from opdkit.measure.bootstrap import bootstrap_means
from opdkit.measure.intervals import (
    ADDED,
    Difference,
    Estimate,
    estimate_difference,
    estimate_mean,
    mean_over_sets,
    paired_difference,
    side_of,
)


@pytest.mark.parametrize(
    ("problems", "mean", "correlation", "samples"),
    [(30, 0.02, 0.5, 8), (30, 0.02, 0.0, 1), (10, 0.005, 0.9, 8), (100, 0.5, 0.0, 8), (500, 0.02, 0.0, 8)],
)
def test_coverage(problems: int, mean: float, correlation: float, samples: int) -> None:
    """At least 93 of 100 intervals hold the truth, less what 1000 draws leave open (3 standard errors); the bootstrap
    holds it in half of the cases of the first kind. The whole grid: benchmarks/interval_coverage.py."""
    rng = np.random.default_rng(0)
    spread = 1 / correlation - 1 if correlation else math.inf
    rate_RP = rng.beta(mean * spread, (1 - mean) * spread, (1000, problems)) if correlation else mean
    found = [estimate_mean(values) for values in rng.binomial(samples, rate_RP, (1000, problems)) / samples]
    held = np.mean([one["low"] <= mean <= one["high"] for one in found])  # type: ignore[operator]
    assert held > 0.93 - 3 * math.sqrt(0.93 * 0.07 / 1000)
    assert all(one["low"] < one["high"] for one in found), "an interval has width"  # type: ignore[operator]


def test_one_sample_a_problem_is_agresti_and_coull() -> None:
    """4 of 200: their interval with z for t, which differ by 0.6 % there."""
    found = estimate_mean(np.r_[np.ones(4), np.zeros(196)])
    centre = (4 + ADDED / 2) / (200 + ADDED)
    half = math.sqrt(ADDED * centre * (1 - centre) / (200 + ADDED))
    assert found["value"] == 0.02 and found["low"] == pytest.approx(max(0, centre - half), abs=2e-4)
    assert found["high"] == pytest.approx(centre + half, rel=0.004)


def test_many_problems_are_the_standard_error() -> None:
    """Far from the ends and with many problems: the mean and 1.96 standard errors."""
    values = np.random.default_rng(1).beta(4, 4, 4000)
    found = estimate_mean(values)
    error = values.std() / math.sqrt(4000)
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.03 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.03 * error)


@pytest.mark.parametrize(("values", "low", "high"), [(np.ones(30), 0.862, 1.0), (np.zeros(30), 0.0, 0.138)])
def test_all_alike_is_no_proof(values: np.ndarray, low: float, high: float) -> None:  # type: ignore[type-arg]
    found = estimate_mean(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize(("gained", "side"), [(0, "unsettled"), (6, "unsettled"), (7, "above"), (30, "above")])
def test_how_many_of_30_problems_must_gain(gained: int, side: str) -> None:
    """From never solved to solved; nothing lost. The sign test asks for 6."""
    found = estimate_difference(np.zeros(30), np.r_[np.ones(gained), np.zeros(30 - gained)])
    assert side_of(found) == side
    assert found["low"] < found["high"]  # type: ignore[operator]
    turned = estimate_difference(np.r_[np.ones(gained), np.zeros(30 - gained)], np.zeros(30))
    assert turned["low"] == pytest.approx(-found["high"]) and turned["high"] == pytest.approx(-found["low"])  # type: ignore[operator]


def test_no_change_at_all_has_width() -> None:
    """30 problems that stay as they are, at any score, do not show that nothing can change."""
    for score in (0.0, 0.5, 1.0):
        found = estimate_difference(np.full(30, score), np.full(30, score))
        assert (found["value"], found["low"], found["high"]) == pytest.approx((0.0, -0.118, 0.118), abs=1e-3)


def test_pairing_removes_the_spread_between_problems() -> None:
    """Every problem gains exactly 0.1: the interval is a fifth of what two scores in [0, 0.9] would have."""
    before = {f"p{index}": index / 100 for index in range(90)}
    after = {name: score + 0.1 for name, score in reversed(before.items())}  # order must not matter
    found = paired_difference(before, after)
    assert found["value"] == pytest.approx(0.1) and found["problems"] == 90
    assert 0.0 < found["low"] < 0.1 < found["high"] < 0.15  # type: ignore[operator]
    alone = estimate_mean(list(before.values()))
    assert found["high"] - found["low"] < (alone["high"] - alone["low"]) / 3  # type: ignore[operator]
    assert found["before"] == pytest.approx(0.445) and found["after"] == pytest.approx(0.545)


def test_missing_values_leave_the_mean() -> None:
    """No value is no zero: two known problems have their mean; with one, no interval; with none, nothing."""
    assert estimate_mean([1.0, 0.0, None])["value"] == 0.5
    assert estimate_mean([math.nan, 1.0]) == {"value": 1.0, "low": None, "high": None, "problems": 1}
    assert estimate_mean([None]) == {"value": None, "low": None, "high": None, "problems": 0}
    found = estimate_difference([0.0, None, 1.0], [1.0, 1.0, None])
    assert (found["value"], found["before"], found["after"], found["problems"]) == (1.0, 0.0, 1.0, 1)


def test_quantities_without_a_scale() -> None:
    """Tokens: Student's interval; where all are equal nothing is known of the spread, and nothing is said."""
    found = estimate_mean([10.0, 11.0, 12.0, 13.0, 14.0], scale=None)
    assert found["high"] == pytest.approx(12 + 2.776 * math.sqrt(2.5 / 5), abs=0.01)
    assert estimate_mean([10.0] * 30, scale=None) == {"value": 10.0, "low": None, "high": None, "problems": 30}
    assert estimate_difference([10.0] * 30, [12.0] * 30, scale=None)["low"] is None


def test_rewards_beyond_the_scale_widen_it() -> None:
    """A reward of -1: the problems are added at -1 and 1."""
    found = estimate_mean([-1.0] * 30)
    assert found["low"] == -1.0 and found["high"] == pytest.approx(-1 + 2 * 0.138, abs=2e-3)


@pytest.mark.parametrize(
    ("problems", "low", "high", "side"),
    [
        (9, 0.1, 0.2, "too_few"),
        (10, 0.1, 0.2, "above"),
        (10, -0.2, -0.1, "below"),
        (10, 0.0, 0.1, "unsettled"),
        (10, None, None, "unsettled"),
    ],
)
def test_side(problems: int, low: float | None, high: float | None, side: str) -> None:
    assert side_of(Estimate(value=0.1, low=low, high=high, problems=problems)) == side


def test_mean_over_sets() -> None:
    """Sets weigh the same whatever their size; the width is that of independent means."""
    rng = np.random.default_rng(1)
    sets = [estimate_difference(rng.beta(2, 2, n), rng.beta(3, 2, n)) for n in (50, 500)]
    found = mean_over_sets(sets)
    assert found["value"] == pytest.approx(sum(one["value"] for one in sets) / 2) and found["problems"] == 550  # type: ignore[misc]
    halves = [(one["high"] - one["low"]) / 2 for one in sets]  # type: ignore[operator]
    assert found["high"] - found["low"] == pytest.approx(math.hypot(*halves), rel=0.01)  # type: ignore[operator]
    unknown = Estimate(value=None, low=None, high=None, problems=0)
    assert mean_over_sets([*sets, unknown])["value"] is None, "one set is unknown, so is the mean"
    one = Difference(value=1.0, low=None, high=None, problems=1, before=0.0, after=1.0)
    assert mean_over_sets([*sets, one])["value"] is not None and mean_over_sets([*sets, one])["low"] is None


def test_the_published_bootstrap() -> None:
    """Its percentiles over all 3^3 resamples of three problems; no width where all are alike; the seed moves the ends
    and not the value; how many resamples are held at once is not visible."""
    values = np.array([[0.0], [0.3], [1.0]])
    means = sorted(float(np.mean(draw)) for draw in itertools.product(values[:, 0], repeat=3))
    (found,) = bootstrap_means(values, seed=0, resamples=10_000)
    assert means[0] == found["low"] == 0.0 and means[-1] == found["high"] == 1.0, "each end has 1/27 > 2.5 % of them"
    assert bootstrap_means(np.ones((30, 1)), seed=0, resamples=100)[0]["low"] == 1.0
    some = np.random.default_rng(2).random((50, 2))
    first, again, other = (bootstrap_means(some, seed=seed, resamples=200) for seed in (0, 0, 1))
    assert first == again and first[0]["value"] == other[0]["value"] and first[0]["low"] != other[0]["low"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_MAX_CELLS", 50 * 7)
        assert bootstrap_means(some, seed=0, resamples=200) == first


def test_refusals() -> None:
    """Other problems, or none: a sentence, not a number."""
    with pytest.raises(UserError, match=r"1 only in the first and 2 only in the second, e\.g\. 'a'"):
        paired_difference({"a": 1.0, "x": 0.0}, {"b": 1.0, "c": 1.0, "x": 1.0})
    with pytest.raises(UserError, match="no problem to compare"):
        paired_difference({}, {})
