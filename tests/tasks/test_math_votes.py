"""Math answers that are one vote of maj@n."""

from opdkit.measure.accuracy import Answer, accuracy, contested
from opdkit.tasks.math.votes import math_votes


def rows(*votes: tuple[str | None, float]) -> list[Answer]:
    return [
        Answer(problem_id="p", sample_id=i, reward=reward, parsed=text, finish="stop")
        for i, (text, reward) in enumerate(votes)
    ]


def test_spellings_of_one_wrong_answer_are_one_vote() -> None:
    """Two spellings of 1/sqrt(2) outvote one right answer; as texts they would tie with it.

    Proves nothing about which answers the comparison finds equal: that is tests/tasks/test_math.py.
    """
    answers = rows(("\\frac{\\sqrt{2}}{2}", 0.0), ("\\frac{1}{\\sqrt{2}}", 0.0), ("3", 1.0))
    assert accuracy(answers)["maj_at_n"]["value"] == 1 / 3
    votes = math_votes(contested(answers))
    assert votes.num_undecided == 0
    assert accuracy(answers, same=votes)["maj_at_n"]["value"] == 0.0


def test_only_what_can_change_the_winner_is_compared() -> None:
    """No right answer, or more right ones than wrong ones: nothing to compare. Plain numbers need no worker."""
    assert contested(rows(("1", 0.0), ("2", 0.0))) == []
    assert contested(rows(("1", 1.0), ("1", 1.0), ("2", 0.0))) == []
    assert contested(rows(("1", 1.0), ("2", 0.0), ("3", 0.0), (None, 0.0), (None, 0.0), (None, 0.0))) == []
    assert contested(rows(("1", 1.0), ("2", 0.0), ("3", 0.0), ("2", 0.0))) == [["2", "3"]]
    votes = math_votes([["2", "3"]])
    assert not votes("2", "3") and not votes("never", "compared")
