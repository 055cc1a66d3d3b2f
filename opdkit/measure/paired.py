"""Two models on the same problems: how much better is B than A, problem by problem, with intervals.

Pairing takes the difficulty of the problems out of the interval: it is narrower than what two separate intervals
suggest, and the only one that answers "is B better than A on these problems". Every metric of `accuracy.py` that is a
number per problem is compared; pass@k and maj@n at what both sides can give (k and n at most the smaller number of
samples, for maj@n the first samples of each).

Letters: P problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from opdkit.errors import UserError
from opdkit.measure.accuracy import Answer, ProblemScore, by_problem, pass_at_k, problem_scores
from opdkit.measure.intervals import SHARE, Difference, estimate_difference
from opdkit.measure.votes import SameAnswer

Votes = Callable[[Sequence[Answer]], SameAnswer | None]  # answers -> which of them are equal


class Comparison(TypedDict):
    problems: int  # answered by both
    only_a: int
    only_b: int
    samples_a: int
    samples_b: int
    metrics: dict[str, Difference]  # "avg", "pass@1", "pass@2", ..., "maj@n", "format_rate", ...; after is B


def compare(
    a: Sequence[Answer],
    b: Sequence[Answer],
    *,
    votes: Votes | None = None,
    has_votes: bool = True,
    has_finals: tuple[bool, bool] = (True, True),
) -> Comparison:
    """Raises UserError where no problem was answered by both. votes, has_votes: as in `accuracy`, for either side;
    has_finals: of each."""
    groups_a, groups_b = by_problem(a), by_problem(b)
    shared = [problem_id for problem_id in groups_a if problem_id in groups_b]
    if not shared:
        raise UserError(
            f"the two answered different problems: {len(groups_a)} and {len(groups_b)} problems, and none is in both"
        )
    sides = [[answer for problem_id in shared for answer in groups[problem_id]] for groups in (groups_a, groups_b)]
    scores = [problem_scores(side, has_finals=reads) for side, reads in zip(sides, has_finals, strict=True)]
    most = [max(score.num_graded for score in side) for side in scores]
    n = min(most)
    firsts = [_first(groups, shared, n) for groups in (groups_a, groups_b)]
    majorities = [
        [s.majority for s in problem_scores(side, same=same, has_votes=has_votes, has_finals=reads)]
        for side, reads in zip(firsts, has_finals, strict=True)
        for same in [votes(side) if votes else None]
    ]
    columns = [_columns(side, majority, n) for side, majority in zip(scores, majorities, strict=True)]
    before, after = columns
    return Comparison(
        problems=len(shared),
        only_a=len(groups_a) - len(shared),
        only_b=len(groups_b) - len(shared),
        samples_a=most[0],
        samples_b=most[1],
        metrics={
            name: estimate_difference(before[name], after[name], scale=None if name == "answer_tokens" else SHARE)
            for name in before
        },
    )


def _first(groups: dict[str, list[Answer]], shared: Sequence[str], n: int) -> list[Answer]:
    """The first n graded answers of every problem (one of its answers where none is graded)."""
    kept = []
    for problem_id in shared:
        graded = [answer for answer in groups[problem_id] if answer.reward is not None]
        kept += graded[:n] or groups[problem_id][:1]
    return kept


def _columns(scores: Sequence[ProblemScore], majority: Sequence[float | None], n: int) -> dict[str, list[float | None]]:
    ks = sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | ({n} if n else set()))
    columns: dict[str, list[float | None]] = {"avg": [score.mean_reward for score in scores]}
    for k in ks:
        columns[f"pass@{k}"] = [
            pass_at_k(score.num_graded, score.num_correct, k) if score.num_graded >= k else None for score in scores
        ]
    if n > 1:
        columns[f"maj@{n}"] = list(majority)
    columns["format_rate"] = [score.format_rate for score in scores]
    columns["truncated_rate"] = [score.truncated_rate for score in scores]
    columns["answer_tokens"] = [score.mean_tokens for score in scores]
    return columns
