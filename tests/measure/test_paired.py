"""Paired comparisons: by hand, against unpaired means, and what is left out is counted."""

from __future__ import annotations

import numpy as np
import pytest

from opdkit.errors import UserError
from opdkit.measure.accuracy import Answer, accuracy
from opdkit.measure.paired import compare


def rows(rewards: dict[str, list[float | None]], votes: dict[str, list[str]] | None = None) -> list[Answer]:
    return [
        Answer(
            problem_id=problem,
            sample_id=sample,
            reward=reward,
            parsed=votes[problem][sample] if votes else "x" if reward else "y",
            finish="stop",
            num_tokens=10,
        )
        for problem, found in rewards.items()
        for sample, reward in enumerate(found)
    ]


def test_by_hand() -> None:
    """p rises from 0 to 1/2, q stays at 1; z and w are answered by one side only."""
    a = rows({"p": [0.0, 0.0], "q": [1.0, 1.0], "z": [1.0, 1.0]})
    b = rows({"q": [1.0, 1.0], "p": [1.0, 0.0], "w": [0.0, 0.0]})
    found = compare(a, b)
    assert (found["problems"], found["only_a"], found["only_b"]) == (2, 1, 1)
    avg = found["metrics"]["avg"]
    assert (avg["before"], avg["after"], avg["value"], avg["problems"]) == (0.5, 0.75, 0.25, 2)
    assert found["metrics"]["pass@2"]["value"] == 0.5
    assert found["metrics"]["maj@2"]["value"] == 0.25, "a tie of one right and one wrong vote is half a problem"
    assert list(found["metrics"])[-3:] == ["format_rate", "truncated_rate", "answer_tokens"]


def test_the_values_are_those_of_accuracy() -> None:
    """On shared problems with equal n, every compared metric is the difference of the two unpaired means."""
    rng = np.random.default_rng(0)
    a, b = (rows({f"p{p}": (rng.random(4) < q).astype(float).tolist() for p in range(20)}) for q in (0.3, 0.6))
    found, one, two = compare(a, b)["metrics"], accuracy(a), accuracy(b)
    pairs = {"avg": "avg_at_n", "maj@4": "maj_at_n", "format_rate": "format_rate", "answer_tokens": "answer_tokens"}
    for name, key in pairs.items():
        assert found[name]["value"] == pytest.approx(two[key]["value"] - one[key]["value"])  # type: ignore[literal-required]
    for k in ("1", "2", "4"):
        assert found[f"pass@{k}"]["value"] == pytest.approx(two["pass_at_k"][k]["value"] - one["pass_at_k"][k]["value"])


def test_unequal_numbers_of_samples() -> None:
    """pass@k and maj@n stop at the smaller n; the vote is over the first n answers of both."""
    a = rows({"p": [0.0, 0.0, 1.0, 1.0, 1.0], "q": [1.0] * 5})
    b = rows({"p": [0.0, 0.0], "q": [1.0, 1.0]})
    found = compare(a, b)
    assert (found["samples_a"], found["samples_b"]) == (5, 2)
    assert [name for name in found["metrics"] if "@" in name] == ["pass@1", "pass@2", "maj@2"]
    assert found["metrics"]["maj@2"]["before"] == 0.5, "all five answers of p would have a right majority"


def test_ungraded_answers_leave_the_mean() -> None:
    found = compare(rows({"p": [None, 1.0], "q": [None, None]}), rows({"p": [1.0, 1.0], "q": [1.0, 1.0]}))
    assert found["metrics"]["avg"]["problems"] == 1 and found["metrics"]["avg"]["value"] == 0.0


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match="1 and 1 problems, and none is in both"):
        compare(rows({"p": [1.0]}), rows({"q": [1.0]}))
