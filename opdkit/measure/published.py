"""The estimators of published code, to compare with published numbers. Ours are in `accuracy.py`.

    maj@n (greedy)   clusters by the greedy rule, the earliest at a tie; right if the winner's first answer is
                     (SaFo-Lab/PW-OPSD, eval/recompute_majn.py). The order of the samples decides ties and clusters
    best, worst,     k draws WITH replacement from a problem's n answers, then the largest reward, the smallest, the
    majority @k      reward of the most frequent answer (verl, trainer/ppo/metric_utils.py). verl takes the mean of 1000
                     random draws; here is the exact mean over all n^k. best@n is below pass@n: one right answer of 8
                     gives 0.656, not 1

Letters: n answers of a problem, k draws, m clusters of equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from opdkit.measure.accuracy import Answer, by_problem, is_right
from opdkit.measure.intervals import Estimate, estimate_mean
from opdkit.measure.votes import SameAnswer, greedy_clusters


class Published(TypedDict):
    """`published` of result.json: means over the problems with graded answers."""

    maj_at_n_greedy: Estimate
    best_at_k: dict[str, Estimate]  # k = 1, 2, 4, ..., n as verl logs them
    worst_at_k: dict[str, Estimate]
    majority_at_k: dict[str, Estimate]  # votes are equal texts


def published(
    answers: Sequence[Answer],
    *,
    success_at: float = 1.0,
    same: SameAnswer | None = None,
) -> Published:
    """same: as in `accuracy`. Ungraded answers are left out; a problem counts for k when it has k graded answers."""
    groups = [[a for a in group if a.reward is not None] for group in by_problem(answers).values()]
    groups = [group for group in groups if group] or [[]]
    most = max(map(len, groups))
    ks = [2**power for power in range(most.bit_length()) if 2**power < most] + ([most] if most else [])
    rows = []
    for group in groups:
        scores, votes = [a.reward for a in group if a.reward is not None], [a.parsed for a in group]
        row = [float(greedy_majority(group, success_at, same)) if group else math.nan]
        for k in ks:
            row += with_replacement(scores, votes, k) if k <= len(group) else (math.nan, math.nan, math.nan)
        rows.append(row)
    maj, *columns = map(estimate_mean, np.array(rows).T)
    names = [str(k) for k in ks]
    best, worst, majority = (dict(zip(names, columns[i::3], strict=True)) for i in range(3))
    return Published(maj_at_n_greedy=maj, best_at_k=best, worst_at_k=worst, majority_at_k=majority)


def greedy_majority(group: Sequence[Answer], success_at: float, same: SameAnswer | None) -> bool:
    """Whether the winner of the published vote is right. group: graded answers in the order of their sample ids."""
    winner = group[greedy_clusters([answer.parsed for answer in group], same)[0][0]]
    return winner.parsed is not None and is_right(winner, success_at)


def with_replacement(scores: Sequence[float], votes: Sequence[str | None], k: int) -> tuple[float, float, float]:
    """(best, worst, majority) of k draws with replacement: exact expectations.

    The largest of k draws is at most the i-th smallest score with chance (i / n)^k. All orders of a draw are equally
    likely, so clusters that tie are equally likely to be seen first, and so are the members of a cluster.
    """
    n = len(scores)
    upper = [(i / n) ** k for i in range(n + 1)]
    weights = [upper[i + 1] - upper[i] for i in range(n)]
    rising = sorted(scores)
    best = sum(w * s for w, s in zip(weights, rising, strict=True))
    worst = sum(w * s for w, s in zip(weights, reversed(rising), strict=True))
    members: dict[str | None, list[float]] = {}
    for score, vote in zip(scores, votes, strict=True):
        members.setdefault(vote, []).append(score)
    chances = _win_chances([len(cluster) / n for cluster in members.values()], k)
    majority = sum(w * sum(c) / len(c) for w, c in zip(chances, members.values(), strict=True))
    return best, worst, majority


def _win_chances(shares: Sequence[float], k: int) -> list[float]:
    """How likely each of m clusters is the most frequent of k draws; ties are shared.

    For every cluster and every number c of its draws: k! times the coefficient of x^(k - c) in the product of the other
    clusters' sums of (share x)^j / j!, j <= c, each with j = c marked as a tie.
    """
    chances: dict[float, float] = {}
    for share in shares:
        if share not in chances:  # most clusters are one answer: equal shares, equal chances
            others = list(shares)
            others.remove(share)
            chances[share] = 0.0
            for c in range(-(-k // len(shares)), k + 1):  # fewer than the mean cannot win
                tied = sum(ways / (ties + 1) for ties, ways in enumerate(_ways(others, c, k - c)))
                chances[share] += share**c / math.factorial(c) * tied * math.factorial(k)
    return [chances[share] for share in shares]


def _ways(others: Sequence[float], c: int, left: int) -> list[float]:
    """Entry t: the coefficient of x^left where t of the `others` have exactly c draws and the rest have fewer."""
    inverse_factorial = [1 / math.factorial(j) for j in range(min(c, left) + 1)]
    table = np.zeros((min(len(others), left // c) + 1, left + 1))  # [ties, draws]
    table[0, 0] = 1.0
    for share in others:
        terms = np.array([share**j * inverse for j, inverse in enumerate(inverse_factorial[:c])])
        fewer = np.stack([np.convolve(row, terms)[: left + 1] for row in table])
        if len(table) > 1:  # c <= left: one more tie is possible
            fewer[1:, c:] += share**c * inverse_factorial[c] * table[:-1, : left + 1 - c]
        table = fewer
    return [float(x) for x in table[:, left]]
