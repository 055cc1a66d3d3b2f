"""Published estimators: best, worst and majority of k draws with replacement, as verl logs them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from opdkit.measure.accuracy import Answer
from opdkit.measure.published import published, with_replacement

CASES = json.loads((Path(__file__).parents[1] / "parity" / "metrics.json").read_text())["cases"]
BOOTSTRAP = {case["id"]: case for case in CASES if case["id"].startswith("pub.metrics.bootstrap")}


@pytest.mark.parametrize("name", BOOTSTRAP)
def test_expectations_match_published_code(name: str) -> None:
    """The exact means of the vectors, and within 0.04 of verl's 1000 seeded resamples, whose mean they are."""
    case = BOOTSTRAP[name]
    scores, votes = case["inputs"]["scores"], case["inputs"]["predictions"]
    for k, outputs in ((k, out) for k, out in case["outputs"].items() if k.isdigit()):
        found = dict(zip(("best", "worst", "majority"), with_replacement(scores, votes, int(k)), strict=True))
        assert found == pytest.approx(outputs["expectation"], abs=1e-9, rel=1e-9)
        assert found == pytest.approx(outputs["numpy_seed42_1000_resamples"], abs=0.04)
    rows = [
        Answer(problem_id="p", sample_id=i, reward=s, parsed=v, finish="stop")
        for i, (s, v) in enumerate(zip(scores, votes, strict=True))
    ]
    logged = published(rows)
    assert {k: e["value"] for k, e in logged["best_at_k"].items()} == pytest.approx(
        {k: out["expectation"]["best"] for k, out in case["outputs"].items() if k.isdigit()}
    )


@pytest.mark.parametrize("votes", [["a", "b", "b", None], ["a", "a", "b", "b"], ["a", "b", "c", "d"], ["a"] * 4])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_majority_is_the_mean_over_all_draws(votes: list[str | None], k: int) -> None:
    """The closed form equals drawing all n^k samples, ties to the vote seen first: the definition itself."""
    scores = [0.1, 0.4, 1.0, 0.7]
    total = [0.0, 0.0, 0.0]
    for draw in itertools.product(range(4), repeat=k):
        drawn = [votes[i] for i in draw]
        winner = max(drawn, key=drawn.count)  # the first of the most frequent
        picked = [scores[i] for i in draw]
        for place, value in enumerate((max(picked), min(picked), picked[drawn.index(winner)])):
            total[place] += value / 4**k
    assert with_replacement(scores, votes, k) == pytest.approx(tuple(total), abs=1e-12)


def test_ungraded_answers_are_left_out() -> None:
    """They are no zero, and a problem with too few graded answers has no value for that k."""
    rows = [
        Answer(problem_id=p, sample_id=i, reward=r, parsed="x", finish="stop")
        for p, rewards in (("p", [1.0, None]), ("q", [1.0, 0.0]))
        for i, r in enumerate(rewards)
    ]
    found = published(rows)
    assert found["best_at_k"]["1"]["value"] == 0.75
    assert found["best_at_k"]["2"]["problems"] == 1
    nothing = published([Answer(problem_id="p", sample_id=0, reward=None, parsed=None, finish="stop")])
    assert nothing["maj_at_n_greedy"]["value"] is None and nothing["best_at_k"] == {}
