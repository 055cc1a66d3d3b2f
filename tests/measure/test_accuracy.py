"""avg@n, pass@k and maj@n: by hand, against published code (tests/parity/metrics.json), invariances, refusals."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.measure.accuracy import Answer, accuracy, answers_of, pass_at_k
from opdkit.measure.published import published
from opdkit.measure.votes import clusters, greedy_clusters
from opdkit.types import Rollout

CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parents[1] / "parity" / "metrics.json").read_text())["cases"]
}
MAJORITY = [name for name in CASES if name.startswith("pub.metrics.maj.")]


def answer(problem: str, sample: int, reward: float | None, parsed: str | None = "x", **rest: Any) -> Answer:
    rest = {"finish": "stop", "num_tokens": 10} | rest
    return Answer(problem_id=problem, sample_id=sample, reward=reward, parsed=parsed, **rest)


def equality_of(case: dict[str, Any]) -> Any:
    """Equality as the case's grader decided it."""
    if (pairs := case["config"]["equal_pairs"]) is not None:
        return lambda first, second: first == second or [first, second] in pairs
    from math_verify import parse, verify

    def same(first: str, second: str) -> bool:
        return bool(verify(parse(f"${second}$"), parse(f"${first}$")))

    return same


@pytest.mark.parametrize("name", MAJORITY)
def test_majority_matches_published_code(name: str) -> None:
    """Clusters, their order, the winner, Pass/Avg/Maj@N and the format rate are the published ones.

    Does not prove anything about the grader: who is correct, and (with math-verify) who is equal, is given.
    """
    case = CASES[name]
    same, outputs = equality_of(case), case["outputs"]
    answers = []
    for number, (problem, expected) in enumerate(
        zip(case["inputs"]["problems"], outputs["per_problem"], strict=True), start=1
    ):
        parsed = [p if ok else None for p, ok in zip(problem["predictions"], problem["formatted"], strict=True)]
        found = [[parsed[cluster[0]], len(cluster)] for cluster in greedy_clusters(parsed, same)]
        assert found == expected["clusters"]
        answers += [
            answer(f"p{number}", sample, float(right), text)
            for sample, (text, right) in enumerate(zip(parsed, expected["correct"], strict=True))
        ]
    result = accuracy(answers, same=same)
    majority = published(answers, same=same)["maj_at_n_greedy"]
    one_by_one = [
        published([a for a in answers if a.problem_id == f"p{number + 1}"], same=same)
        for number in range(len(outputs["per_problem"]))
    ]
    expected = [float(problem["majority_correct"]) for problem in outputs["per_problem"]]
    assert [one["maj_at_n_greedy"]["value"] for one in one_by_one] == expected
    most = str(result["samples"])
    close = {"abs": case["tolerance"]["abs"], "rel": 0}
    assert 100 * result["pass_at_k"][most]["value"] == pytest.approx(outputs["pass_at_n_percent"], **close)
    assert 100 * result["avg_at_n"]["value"] == pytest.approx(outputs["average_at_n_percent"], **close)
    assert 100 * majority["value"] == pytest.approx(outputs["majority_at_n_percent"], **close)
    assert 100 * result["format_rate"]["value"] == pytest.approx(outputs["format_rate_percent"], **close)


@pytest.mark.parametrize(
    "name", [name for name in MAJORITY if "majority_correct_raw_string_vote" in CASES[name]["outputs"]]
)
def test_raw_string_vote_matches_published_code(name: str) -> None:
    """The earlier published vote: texts alone, and unformatted answers have none."""
    case = CASES[name]
    found = []
    for problem, expected in zip(case["inputs"]["problems"], case["outputs"]["per_problem"], strict=True):
        voting = [sample for sample, formatted in enumerate(problem["formatted"]) if formatted]
        winner = greedy_clusters([problem["predictions"][sample] for sample in voting])[0][0]
        found.append(expected["correct"][voting[winner]])
    assert found == case["outputs"]["majority_correct_raw_string_vote"]


def test_pass_at_k_matches_published_code() -> None:
    """Every published value with k <= n. With k > n we refuse where published code answers 1.0 whatever c is."""
    case = CASES["pub.metrics.pass_at_k"]
    for (n, c, k), expected in zip(case["inputs"]["n_c_k"], case["outputs"]["pass_at_k"], strict=True):
        if k > n:
            with pytest.raises(ValueError, match="1 <= k <= n"):
                pass_at_k(n, c, k)
        else:
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    """The closed form equals drawing every k of the n answers: the definition itself."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [index < c for index in range(n)]
        drawn = [any(subset) for subset in itertools.combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(drawn) / len(drawn), abs=1e-15)


def test_by_hand() -> None:
    """Two problems of four answers. p: 1 right of 4, votes 7 7 8 None; q: all right.

    pass@2 of p = 1 - C(3,2)/C(4,2) = 1/2.
    """
    rows = [
        answer("p", 0, 0.0, "7", finish="length", num_tokens=30),
        answer("p", 1, 0.0, "7"),
        answer("p", 2, 1.0, "8"),
        answer("p", 3, 0.0, None),
        *[answer("q", sample, 1.0, "5") for sample in range(4)],
    ]
    result = accuracy(rows)
    assert result["problems"] == 2 and result["samples"] == 4 and result["num_answers"] == 8
    assert result["avg_at_n"]["value"] == 0.625
    assert [result["pass_at_k"][k]["value"] for k in ("1", "2", "3", "4")] == [0.625, 0.75, 0.875, 1.0]
    assert result["format_rate"]["value"] == 0.875 and result["answer_tokens"]["value"] == 12.5
    assert result["maj_at_n"]["value"] == 0.5
    assert (result["num_truncated"], result["num_no_answer"], result["num_ungraded"]) == (1, 1, 0)
    assert result["mean_answer_tokens"] == 12.5
    json.dumps(result, allow_nan=False)


def test_ungraded_is_not_zero() -> None:
    """An ungraded answer neither counts as wrong nor votes; a problem of only ungraded answers leaves the means."""
    rows = [
        answer("p", 0, 1.0, "4"),
        answer("p", 1, None, None),
        answer("p", 2, None, "9"),
        answer("p", 3, None, "9"),
        answer("q", 0, None, None),
    ]
    result = accuracy(rows)
    assert result["problems"] == 1 and result["num_ungraded"] == 4 and result["num_ungraded_problems"] == 1
    assert result["avg_at_n"] == {"value": 1.0, "low": None, "high": None, "problems": 1}
    assert result["maj_at_n"]["value"] == 1.0
    assert result["num_no_answer"] == 0, "an ungraded answer was never searched for a final answer"
    nothing = accuracy([answer("q", 0, None, None), answer("q", 1, None, None)])
    assert nothing["avg_at_n"]["value"] is None and nothing["pass_at_k"] == {} and nothing["samples"] == 0


def test_unequal_counts() -> None:
    """Each problem weighs the same, and each k is over the problems that have k answers, which is said."""
    rows = [answer("p", sample, float(sample == 0)) for sample in range(6)] + [answer("q", 0, 1.0), answer("q", 1, 0.0)]
    result = accuracy(rows)
    assert result["avg_at_n"]["value"] == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert [estimate["problems"] for estimate in result["pass_at_k"].values()] == [2, 2, 1, 1, 1, 1]


def test_partial_rewards() -> None:
    """avg@n averages rewards; pass@k and maj@n count rewards of at least `success_at`."""
    rows = [answer("p", 0, 0.5, "a"), answer("p", 1, 0.75, "b")]
    assert accuracy(rows)["avg_at_n"]["value"] == 0.625
    assert accuracy(rows)["pass_at_k"]["2"]["value"] == 0.0
    assert accuracy(rows, success_at=0.5)["pass_at_k"]["1"]["value"] == 1.0


def test_a_task_without_final_answers_has_no_vote() -> None:
    """Right answers saved without a parsed form (programs): maj@n is unknown, not 0."""
    rows = [answer("p", 0, 1.0, None), answer("p", 1, 0.0, None), answer("q", 0, 0.0, None), answer("q", 1, 0.0, None)]
    nothing = {"value": None, "low": None, "high": None, "problems": 0}
    assert accuracy(rows)["maj_at_n"] == nothing and accuracy(rows)["format_rate"] == nothing


def test_an_environment_that_reads_no_final_answer_has_none() -> None:
    """Nothing of it is parsed: unknown, and not 0; of one that does say what it read, a missing one is missing."""
    rows = [answer("p", 0, 0.5, None), answer("p", 1, 0.0, None)]
    nothing = {"value": None, "low": None, "high": None, "problems": 0}
    told = accuracy(rows, has_finals=False)
    assert told["format_rate"] == told["maj_at_n"] == nothing and told["num_no_answer"] == 0
    assert accuracy(rows)["format_rate"]["value"] == 0.0 and accuracy(rows)["num_no_answer"] == 2
    assert accuracy([*rows, answer("q", 0, 0.5, "a")], has_finals=False)["format_rate"]["value"] == 0.5


def test_row_order_does_not_matter() -> None:
    """Shuffled rows give the same bits, intervals and ties included."""
    rng = np.random.default_rng(3)
    rows = [
        answer(f"p{problem}", sample, float(rng.random() < 0.4), str(rng.integers(3)))
        for problem in range(20)
        for sample in range(4)
    ]
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    assert accuracy(rows) == accuracy(shuffled)


def test_avg_is_pass_at_1_for_zero_one_rewards() -> None:
    """The two estimators are one for 0/1 rewards, interval included; pass@k never falls with k."""
    rng = np.random.default_rng(4)
    rows = [answer(f"p{p}", s, float(rng.random() < p / 30)) for p in range(30) for s in range(8)]
    result = accuracy(rows)
    assert result["avg_at_n"] == pytest.approx(result["pass_at_k"]["1"])
    values = [estimate["value"] for estimate in result["pass_at_k"].values()]
    assert values == sorted(values) and len(values) == 8


def test_identical_texts_are_one_vote_even_if_the_grader_cannot_read_them() -> None:
    """`same` that is False even for x, x (math-verify on a stray dollar sign) does not split equal texts."""
    for rule in (clusters, greedy_clusters):
        assert rule(["$1", "2", "$1"], lambda first, second: False) == [[0, 2], [1]]


def chain(first: str, second: str) -> bool:
    """a = b and b = c, asked in that order only, and never a = c."""
    return (first, second) in {("a", "b"), ("b", "c")}


def test_clusters_do_not_depend_on_order() -> None:
    """Every order of the votes gives the same groups and the same maj@n; the published rule gives several."""
    votes = ["a", "b", "c", None, "x", "x", "x"]
    found, majorities, greedy = set(), set(), set()
    for order in itertools.permutations(range(len(votes))):
        parsed = [votes[i] for i in order]
        groups = [frozenset((order[i], parsed[i]) for i in cluster) for cluster in clusters(parsed, chain)]
        found.add(frozenset(groups))
        greedy.add(tuple(sorted(map(len, greedy_clusters(parsed, chain)))))
        if order[3:] == (3, 4, 5, 6) or order[:4] == (3, 4, 5, 6):
            rows = [answer("p", sample, float(text in ("a", "b", "c")), text) for sample, text in enumerate(parsed)]
            majorities.add(accuracy(rows, same=chain)["maj_at_n"]["value"])
    assert len(found) == 1 and len(next(iter(found))) == 3
    assert majorities == {0.5}, "two clusters of three, one of them right: they share the problem"
    assert len(greedy) > 1


def test_a_tie_is_the_mean_over_orders() -> None:
    """Two right, two wrong, two INVALID: a third. It equals the mean of the published rule over all orders."""
    votes = ["5", "5", "4", "4", None, None]
    drawn = []
    for order in itertools.permutations(votes):
        rows = [answer("p", sample, float(text == "5"), text) for sample, text in enumerate(order)]
        drawn.append(published(rows)["maj_at_n_greedy"]["value"])
    rows = [answer("p", sample, float(text == "5"), text) for sample, text in enumerate(votes)]
    assert accuracy(rows)["maj_at_n"]["value"] == pytest.approx(1 / 3) == pytest.approx(sum(drawn) / len(drawn))


def test_right_and_wrong_answers_are_never_one_vote() -> None:
    """The grader told them apart; a looser equality of the vote does not overrule it."""
    rows = [answer("p", 0, 1.0, "a"), answer("p", 1, 0.0, "b"), answer("p", 2, 0.0, "c")]
    assert accuracy(rows, same=lambda first, second: True)["maj_at_n"]["value"] == 0.0


def test_answers_of_rollouts() -> None:
    """Everything measuring needs is taken from the row."""
    rollout = Rollout(
        problem_id="p",
        sample_id=2,
        policy_version=0,
        prompt_ids=(1,),
        answer_ids=(5, 6, 7),
        answer_logprobs=None,
        answer_mask=np.ones(3, dtype=np.bool_),
        finish="length",
        reward=0.0,
        parsed="9",
    )
    expected = Answer(problem_id="p", sample_id=2, reward=0.0, parsed="9", finish="length", num_tokens=3)
    assert answers_of([rollout]) == [expected]


def test_refusals() -> None:
    """No rows; one row twice; a reward that is no number."""
    with pytest.raises(UserError, match="no answers to measure"):
        accuracy([])
    with pytest.raises(UserError, match="problem 'p' has sample 0 twice"):
        accuracy([answer("p", 0, 1.0), answer("p", 0, 0.0)])
    with pytest.raises(ValueError, match="reward nan"):
        accuracy([answer("p", 0, math.nan)])


def test_programs_have_no_vote() -> None:
    """Two right programs of different text are no two opinions: the vote is unknown, everything else is as it was."""
    answers = [
        answer("p", n, reward, f"program {n}", finish="stop", num_tokens=5) for n, reward in enumerate((1.0, 1.0, 0.0))
    ]
    voted, unvoted = accuracy(answers), accuracy(answers, has_votes=False)
    assert unvoted["maj_at_n"]["value"] is None and voted["maj_at_n"]["value"] is not None
    assert {**unvoted, "maj_at_n": None} == {**voted, "maj_at_n": None}
