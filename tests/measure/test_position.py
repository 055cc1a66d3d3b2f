"""Branch viability by hand. Does not reproduce the published AUROC: neither its code nor its branches are public."""

from __future__ import annotations

import numpy as np
import pytest

from opdkit.measure.position import Branch, auroc, by_position, predictors


def branch(
    index: int, *rewards: float | None, own: float | None = 0.0, problem: str = "a", entropy: float = 1.0
) -> Branch:
    return Branch(
        problem_id=problem,
        sample_id=0,
        index=index,
        length=10,
        rewards=rewards,
        own_reward=own,
        student_entropy=entropy,
        teacher_entropy=1.0,
        reverse_kl=1.0,
        student_logprob=-1.0,
        teacher_logprob=-0.1,
    )


def test_viability_by_bin() -> None:
    """Two halves: early branches end right half of the time, late ones always; an empty bin is not there."""
    some = [branch(0, 0.0), branch(2, 1.0), branch(9, 1.0, 1.0, problem="b", own=1.0)]
    early, late = by_position(some, 2)
    assert (early["start"], early["end"], early["branches"]) == (0.0, 0.5, 2)
    assert early["viability"]["value"] == 0.5 and early["own"]["value"] == 0.0 and early["difference"]["value"] == 0.5
    assert late["viability"]["value"] == 1.0 and late["difference"]["value"] == 0.0
    assert [b["start"] for b in by_position(some, 10)] == [0.0, 0.2, 0.9]


def test_problems_weigh_the_same_and_ungraded_branches_leave() -> None:
    """Problem a: 1 and 0; problem b: 0. Mean over problems (1/2 + 0) / 2; what nobody graded is no zero."""
    some = [branch(0, 1.0), branch(1, 0.0), branch(0, 0.0, problem="b"), branch(0, None, problem="c")]
    (only,) = by_position(some, 1)
    assert only["viability"]["value"] == 0.25 and only["viability"]["problems"] == 2 and only["branches"] == 4
    (none,) = by_position([branch(0, None)], 1)
    assert none["viability"]["value"] is None


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2], [0, 0, 1], 0.75),
        ([1, 2], [1, 1], None),
        ([], [], None),
    ],
)
def test_auroc(scores: list[float], right: list[int], expected: float | None) -> None:
    assert auroc(np.array(scores, dtype=float), np.array(right, dtype=bool), np.ones(len(scores))) == expected


def test_weights_are_repetitions() -> None:
    """The branch of weight 2 counts as if it were there twice: what a bootstrap draw is."""
    score, right = np.array([1.0, 2.0, 3.0]), np.array([False, True, False])
    twice = auroc(np.array([1.0, 2.0, 3.0, 3.0]), np.array([False, True, False, False]), np.ones(4))
    assert auroc(score, right, np.array([1.0, 1.0, 2.0])) == twice == pytest.approx(1 / 3)


def test_position_predicts_and_entropy_does_not() -> None:
    """Late branches are viable, whatever their entropy: position 1.0; entropy, which is all the same, 0.5."""
    some = [branch(i, float(i >= 5), problem=str(i % 4)) for i in range(10)]
    found = predictors(some)
    assert found["relative_position"]["auroc"] == 1.0 and found["relative_position"]["larger_is_viable"]
    assert found["student_entropy"]["auroc"] == 0.5
    turned = predictors([branch(9 - i, float(i >= 5), problem=str(i % 4)) for i in range(10)])["relative_position"]
    assert turned["auroc"] == 1.0 and turned["larger_is_viable"] is False
    assert turned["low"] is not None and turned["low"] <= 1.0 <= (turned["high"] or 0.0)


def test_where_all_branches_are_alike_nothing_is_predicted() -> None:
    found = predictors([branch(0, 1.0), branch(5, 1.0)])["relative_position"]
    assert found == {"auroc": None, "low": None, "high": None, "problems": 0, "larger_is_viable": None}


def test_one_problem_has_no_interval() -> None:
    found = predictors([branch(0, 0.0), branch(5, 1.0)])["relative_position"]
    assert found["auroc"] == 1.0 and found["low"] is None


def test_a_predictor_without_a_mistake_is_no_proof() -> None:
    """30 problems, each with a late branch that is viable and an early one that is not: AUROC 1 with an interval below
    it, narrower than with 4 problems; where one problem alone has a viable branch, the interval is unknown."""
    lows = []
    for problems in (30, 4):
        some = [branch(i, float(i == 9), problem=str(p)) for p in range(problems) for i in (0, 9)]
        found = predictors(some)["relative_position"]
        assert (found["auroc"], found["high"], found["problems"]) == (1.0, 1.0, problems)
        lows.append(found["low"])
    assert lows[1] < lows[0] < 0.9
    rare = [branch(9 if p == 0 else 0, float(p == 0), problem=str(p)) for p in range(30)]
    assert predictors(rare)["relative_position"]["low"] is None


def test_few_problems_of_the_rarer_kind_widen_the_interval() -> None:
    """3 of 30 problems have a viable branch, and are told apart without a mistake: what it rests on is 3."""
    some = [branch(9 if p < 3 else 0, float(p < 3), problem=str(p)) for p in range(30)]
    found = predictors(some)["relative_position"]
    assert (found["auroc"], found["problems"]) == (1.0, 3) and found["low"] is not None and found["low"] < 0.7
