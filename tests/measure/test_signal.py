"""Rank metrics of teacher scores: by hand, against loops, invariance, sample sets, refusals."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.measure.intervals import side_of
from opdkit.measure.ranking import METRICS, problem_metrics
from opdkit.measure.signal import ScoredAnswer, difficulty, signal_metrics

NAN = math.nan


def metrics_of(scores: list[float], rewards: list[float], success: list[int] | None = None) -> dict[str, float]:
    labels = [int(reward >= 1) for reward in rewards] if success is None else success
    return dict(zip(METRICS, problem_metrics([scores], [rewards], [labels])[0].tolist(), strict=True))


def row(
    problem: str, sample: int, score: float, reward: float, condition: str = "base", **more: object
) -> ScoredAnswer:
    plain = ScoredAnswer(
        condition=condition,
        problem_id=problem,
        sample_id=sample,
        score=score,
        reward=reward,
        success=reward >= 1,
        bucket="medium",
        effective=True,
        num_context_tokens=10,
        num_truncated_tokens=0,
        copy=False,
    )
    return replace(plain, **more)


def test_by_hand() -> None:
    """q = 1 2 3 4, r = 0 1 0 1. Pairs with other rewards: 4, of which (1,2) (1,4) (3,4) are right and (2,3) is not.

    tau = (3-1)/4; ranks of r are 1.5 3.5 1.5 3.5; q scaled is 0 1/3 2/3 1; the highest is right.
    """
    found = metrics_of([1, 2, 3, 4], [0, 1, 0, 1])
    assert found["pairwise_accuracy"] == found["success_auc"] == 0.75
    assert found["kendall_tau"] == 0.5
    assert found["spearman"] == pytest.approx(2 / math.sqrt(5 * 4))
    assert found["success_point_biserial"] == pytest.approx(1 / math.sqrt(5))
    assert found["success_brier_minmax"] == pytest.approx((0 + 4 / 9 + 4 / 9 + 0) / 4)
    assert found["top1_hit_rate"] == 1
    assert metrics_of([0, 0], [0, 1])["success_brier_sigmoid"] == 0.25


def test_ties_by_hand() -> None:
    """A tie of scores is wrong for pairwise accuracy, half for AUC, absent for tau; the first of the highest is top."""
    found = metrics_of([5, 5, 1], [1, 0, 0])
    assert found["pairwise_accuracy"] == 0.5 and found["success_auc"] == 0.75 and found["kendall_tau"] == 1
    assert found["top1_hit_rate"] == 1 and metrics_of([5, 5, 1], [0, 1, 0])["top1_hit_rate"] == 0


@pytest.mark.parametrize(
    ("scores", "rewards", "undefined"),
    [
        ([1, 2, 3], [1, 1, 1], METRICS[:5]),
        ([1, 2, 3], [0, 0, 0], METRICS[:5]),
        ([2, 2, 2], [0, 1, 0], ("spearman", "kendall_tau", "success_point_biserial", "success_brier_minmax")),
        ([1, 2, 3], [0.2, 0.5, 0.1], ("success_auc", "success_point_biserial")),
        ([1], [1], METRICS),
    ],
)
def test_undefined_by_hand(scores: list[float], rewards: list[float], undefined: tuple[str, ...]) -> None:
    """Not a number exactly where the definition has none; a constant is found in the values, not in a variance."""
    found = metrics_of(scores, rewards)
    assert tuple(name for name in METRICS if math.isnan(found[name])) == undefined
    shifted = metrics_of([score + 0.1 for score in scores], rewards)
    assert [math.isnan(shifted[name]) for name in METRICS] == [math.isnan(found[name]) for name in METRICS]


def test_against_loops() -> None:
    """200 random problems of 2 to 8 answers with many ties equal the definitions written as loops over pairs."""
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 8)
        q = [rng.randint(-3, 3) / 2 for _ in range(n)]
        r = [rng.choice([0.0, 0.5, 1.0]) for _ in range(n)]
        found = metrics_of(q, r)
        pairs = [(i, j) for i, j in itertools.combinations(range(n), 2)]
        untied = [(i, j) for i, j in pairs if r[i] != r[j]]
        right = [(q[i] - q[j]) * (r[i] - r[j]) > 0 for i, j in untied]
        strict = [ok for ok, (i, j) in zip(right, untied, strict=True) if q[i] != q[j]]
        assert _same(found["pairwise_accuracy"], sum(right) / len(untied) if untied else NAN)
        assert _same(found["kendall_tau"], (2 * sum(strict) - len(strict)) / len(strict) if strict else NAN)
        wins = [(q[i] > q[j]) + (q[i] == q[j]) / 2 for i in range(n) for j in range(n) if r[i] == 1 > r[j]]
        assert _same(found["success_auc"], sum(wins) / len(wins) if wins else NAN)
        assert _same(found["spearman"], _correlation(_ranks(q), _ranks(r)))
        assert _same(found["success_point_biserial"], _correlation(q, [float(x == 1) for x in r]))


def _same(found: float, expected: float) -> bool:
    return (math.isnan(found) and math.isnan(expected)) or found == pytest.approx(expected, abs=1e-12)


def _ranks(x: list[float]) -> list[float]:
    return [1 + sum(b < a for b in x) + (x.count(a) - 1) / 2 for a in x]


def _correlation(x: list[float], y: list[float]) -> float:
    return NAN if len(set(x)) == 1 or len(set(y)) == 1 else float(np.corrcoef(x, y)[0, 1])


def many(num_problems: int = 30, seed: int = 0) -> list[ScoredAnswer]:
    rng = random.Random(seed)
    rows = []
    for p, s in itertools.product(range(num_problems), range(6)):
        reward = float(rng.random() < p / num_problems)
        shared = {"bucket": difficulty(p % 6, 6), "effective": rng.random() < 0.8}
        rows.append(row(f"p{p}", s, rng.gauss(reward, 1), reward, **shared))
        rows.append(row(f"p{p}", s, rng.gauss(3 * reward, 1), reward, condition="solution", **shared))
    return rows


def test_row_order_does_not_matter() -> None:
    """Shuffled rows give the same bits: values, intervals, differences, every sample set and bucket."""
    rows = many()
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    found = signal_metrics(rows)
    assert found == signal_metrics(shuffled)
    json.dumps(found, allow_nan=False)


def test_monotone_scores_do_not_matter() -> None:
    """What ranks answers sees the order of the scores only: any rising function of them changes nothing."""
    q, r = [0.3, -1.0, 2.0, 0.4], [1.0, 0.0, 1.0, 0.5]
    before, after = metrics_of(q, r), metrics_of([math.exp(x) for x in q], r)
    for name in ("spearman", "kendall_tau", "pairwise_accuracy", "success_auc", "top1_hit_rate"):
        assert before[name] == after[name]


def test_sample_sets_by_hand() -> None:
    """p has both verdicts, q only failures, and one answer of p was not shown all: who is in which set."""
    rows = [
        row("p", 0, 1.0, 1.0),
        row("p", 1, 0.5, 0.0),
        row("p", 2, 2.0, 0.0, effective=False, num_context_tokens=40, num_truncated_tokens=3),
        row("q", 0, 0.1, 0.0),
        row("q", 1, 0.2, 0.0),
    ]
    found = {name: part["conditions"]["base"] for name, part in signal_metrics(rows).items()}
    assert {name: (part["answers"], part["problems"]) for name, part in found.items()} == {
        "all_samples": (5, 2),
        "effective_only": (4, 2),
        "reward_zero_only": (4, 2),
        "reward_zero_effective_only": (3, 1),
        "both_present_all": (3, 1),
        "both_present_effective_only": (2, 1),
    }
    everything = found["all_samples"]
    assert everything["metrics"]["success_auc"] == {
        "value": 0.5, "low": None, "high": None, "problems": 1, "undefined": 1,
    }  # fmt: skip
    assert everything["mean_context_tokens"] == 16 and everything["truncation_rate"] == 0.2
    assert found["both_present_effective_only"]["metrics"]["success_auc"]["value"] == 1


def test_published_puts_zeros_where_nothing_is_defined() -> None:
    """One perfect problem and one of successes only: AUC 1 over 1 problem; published: 0.5 over 2."""
    rows = [row("p", 0, 1.0, 1.0), row("p", 1, 0.0, 0.0), row("q", 0, 1.0, 1.0), row("q", 1, 0.0, 1.0)]
    for definitions, expected in (("careful", (1.0, 1, 1)), ("published", (0.5, 2, 0))):
        part = signal_metrics(rows, definitions=definitions)["all_samples"]["conditions"]["base"]
        auc = part["metrics"]["success_auc"]
        assert (auc["value"], auc["problems"], auc["undefined"]) == expected


def test_paired_conditions_are_over_the_same_problems() -> None:
    """`solution` had something to show for p only: paired, base is measured on p only; unpaired on both."""
    rows = [row(problem, s, float(s), float(s)) for problem in ("p", "q") for s in (0, 1)]
    rows += [
        row(p, s, float(s), float(s), condition="solution", effective=p == "p") for p in ("p", "q") for s in (0, 1)
    ]
    part = signal_metrics(rows)["effective_only"]
    assert {name: found["problems"] for name, found in part["conditions"].items()} == {"base": 2, "solution": 1}
    assert {name: found["problems"] for name, found in part["paired"].items()} == {"base": 1, "solution": 1}


def test_difference_to_base_is_paired() -> None:
    """Every problem gains exactly 1/4 of AUC: the difference is above 0 although the two intervals overlap."""
    rows = []
    for p in range(20):
        low, high = (0.5, 0.75) if p % 2 else (0.0, 0.25)
        for condition, auc in (("base", low), ("solution", high)):  # one success among four failures
            rows += [row(f"p{p}", s, float(s), 0.0, condition=condition) for s in range(4)]
            rows.append(row(f"p{p}", 4, 4 * auc - 0.5, 1.0, condition=condition))
    conditions = signal_metrics(rows)["all_samples"]["conditions"]
    assert conditions["base"]["difference_to_base"] is None
    auc = conditions["solution"]["metrics"]["success_auc"]
    assert auc["value"] == 0.5 and auc["low"] < auc["high"]
    difference = conditions["solution"]["difference_to_base"]["success_auc"]
    assert difference["value"] == 0.25 and difference["low"] > 0.1
    assert conditions["base"]["metrics"]["success_auc"]["high"] > auc["low"]


def test_buckets_split_the_problems() -> None:
    """Each bucket's metrics are those of its problems alone; together they count all."""
    rows = many()
    whole = signal_metrics(rows)["all_samples"]["conditions"]["base"]
    for bucket in ("easy", "medium", "hard"):
        own = [r for r in rows if r.bucket == bucket]
        alone = signal_metrics(own)["all_samples"]["conditions"]["base"]["metrics"]
        for name in METRICS:
            assert whole["by_bucket"][bucket][name]["value"] == pytest.approx(alone[name]["value"], nan_ok=True)
            assert whole["by_bucket"][bucket][name]["undefined"] == alone[name]["undefined"]


def test_difficulty() -> None:
    """With 8 answers both definitions agree; with 2, half is easy and never 4."""
    assert [difficulty(n, 8) for n in range(9)] == [difficulty(n, 8, "published") for n in range(9)]
    assert [difficulty(n, 8) for n in (0, 1, 3, 4, 8)] == ["hard", "medium", "medium", "easy", "easy"]
    assert difficulty(1, 2) == "easy" and difficulty(1, 2, "published") == "medium"


def test_refusals() -> None:
    """No rows; one row twice; a score that is no number."""
    with pytest.raises(UserError, match="no scored answers"):
        signal_metrics([])
    with pytest.raises(UserError, match="answer 'p', 0 under base is there twice"):
        signal_metrics([row("p", 0, 1.0, 1.0)] * 2)
    with pytest.raises(ValueError, match="score nan"):
        signal_metrics([row("p", 0, NAN, 1.0)])


def test_any_two_conditions_are_compared_over_the_answers_of_both() -> None:
    """Twelve problems, each one success and two failures. `rich` ranks the success first, `poor` last; of the failures
    one is scored under `rich` alone, and so no part of the difference. Every pair is there, richer minus poorer."""
    rows = []
    for p in range(12):
        for condition, score in (("base", 0.0), ("poor", -1.0), ("rich", 1.0)):
            rows += [row(f"p{p}", 0, score, 1.0, condition), row(f"p{p}", 1, 0.0, 0.0, condition)]
        rows.append(row(f"p{p}", 2, 5.0, 0.0, "rich"))
    pairs = signal_metrics(rows, order=["base", "poor", "rich"])["all_samples"]["pairs"]
    found = {(pair["condition"], pair["minus"]): pair for pair in pairs}
    assert list(found) == [("poor", "base"), ("rich", "base"), ("rich", "poor")]
    auc = found["rich", "poor"]["difference"]["success_auc"]
    assert (auc["value"], auc["before"], auc["after"], auc["problems"]) == (1.0, 0.0, 1.0, 12)
    assert found["rich", "poor"]["answers"] == 24 and side_of(auc) == "above"
    assert found["rich", "base"]["difference"]["success_auc"]["value"] == 0.5


def test_without_the_answers_that_repeat_a_shown_one() -> None:
    """The success that repeats what `rich` shows lifts it; without it nothing is left of the difference. A copy under
    either condition leaves both sides."""
    rows = []
    for p in range(12):
        for condition in ("poor", "rich"):
            rows.append(row(f"p{p}", 0, float(condition == "rich"), 1.0, condition, copy=condition == "rich"))
            rows += [row(f"p{p}", 1, 0.0, 1.0, condition), row(f"p{p}", 2, 0.0, 0.0, condition)]
    (pair,) = signal_metrics(rows)["all_samples"]["pairs"]
    assert (pair["answers"], pair["copies"]) == (36, 12)
    assert pair["difference"]["success_auc"]["value"] == 0.25
    assert pair["without_copies"] is not None and pair["without_copies"]["success_auc"]["value"] == 0.0
    assert side_of(pair["without_copies"]["success_auc"]) == "unsettled", "identical zeros are no proof"
    (unknown,) = signal_metrics([replace(one, copy=None) for one in rows])["all_samples"]["pairs"]
    assert unknown["copies"] is None and unknown["without_copies"] is None
