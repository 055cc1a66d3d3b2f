"""Which wrong final answers of the math task are one vote: the same mathematical object in another spelling.

The grader only compares answers with the gold answer. For maj@n the answers of a problem are compared with each other,
in the same killable workers; pairs of plain numbers are decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from opdkit.tasks.math.values import decide
from opdkit.tasks.pool import Outcome, WorkerPool

_Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class MathVotes:
    """`same` of `measure.votes`. Answers that were never compared (see `contested` there) are different."""

    equal: Mapping[_Pair, bool]
    num_undecided: int  # comparisons that ran out of time or failed; they count as different

    def __call__(self, first: str, second: str) -> bool:
        return self.equal.get((first, second), False)


def math_votes(groups: Iterable[Collection[str]], *, cpu_s: float = 2.0) -> MathVotes:
    """groups: the distinct `parsed` answers of each problem that need comparing.

    Every pair is compared both ways round, since a comparison may find the one and not the other.
    """
    pairs = dict.fromkeys(pair for group in groups for pair in itertools.permutations(group, 2))
    equal: dict[_Pair, bool] = {}
    for pair in pairs:
        decision = decide(*pair)
        if isinstance(decision, bool):
            equal[pair] = decision
    asked = [pair for pair in pairs if pair not in equal]
    num_undecided = 0
    for pair, outcome in zip(asked, _compare(asked, cpu_s), strict=True):
        equal[pair] = outcome.status == "ok" and bool(outcome.value)
        num_undecided += outcome.status != "ok"
    return MathVotes(equal, num_undecided)


def _compare(pairs: list[_Pair], cpu_s: float) -> list[Outcome]:
    if not pairs:
        return []
    pool = WorkerPool("opdkit.tasks.math.equal", cpu_s=cpu_s)
    try:
        return pool.map(pairs)
    finally:
        pool.close()
