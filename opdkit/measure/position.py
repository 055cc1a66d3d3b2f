"""Where along an answer can the teacher's signal be relied on? The branch-viability diagnostic, from saved branches.

A branch leaves one of the student's answers at a token where the teacher prefers another one: the answer up to there,
the teacher's token, and then the student going on by itself. Its viability is the reward it ends with. PW-OPSD
(arXiv:2605.21606) reports that relative position predicts viability (AUROC .83, 95 % interval [.66, .95]) and local
uncertainty does not (at most .57); its code is not published, so the definitions here are ours:

    position     (i - 0.5) / n of the i-th of n tokens
    viability    mean reward of the branches' continuations; `own` is the reward of the answers they left
    AUROC        chance that a branch with a right continuation has the larger predictor than one without; a tie counts
                 half; "oriented" takes the side of 1/2 that it is on for all branches, and says which

Letters: B branches, P problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from opdkit.measure.intervals import Difference, Estimate, estimate_difference, estimate_mean

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One branch. Rewards are None where nothing could be graded; uncertainties are those of the token it leaves at."""

    problem_id: str
    sample_id: int
    index: int  # of the token that is replaced, from 0
    length: int  # tokens of the answer
    rewards: tuple[float | None, ...]  # of its continuations
    own_reward: float | None  # of the answer
    student_entropy: float
    teacher_entropy: float
    reverse_kl: float
    student_logprob: float  # of the teacher's token
    teacher_logprob: float  # of the teacher's token

    @property
    def position(self) -> float:
        return (self.index + 0.5) / self.length

    @property
    def viability(self) -> float | None:
        known = [reward for reward in self.rewards if reward is not None]
        return sum(known) / len(known) if known else None


class Bin(TypedDict):
    start: float
    end: float
    branches: int
    viability: Estimate  # over problems
    own: Estimate
    difference: Difference  # viability minus own, of the same branches


class Predictor(TypedDict):
    auroc: float | None  # oriented; None: all branches are alike
    low: float | None
    high: float | None
    problems: int  # with a branch of the kind that is in fewer of them: what the interval rests on
    larger_is_viable: bool | None  # the orientation


PREDICTORS: Mapping[str, Callable[[Branch], float]] = {
    "relative_position": lambda b: b.position,
    "student_entropy": lambda b: b.student_entropy,
    "teacher_entropy": lambda b: b.teacher_entropy,
    "reverse_kl": lambda b: b.reverse_kl,
    "teacher_logprob": lambda b: b.teacher_logprob,
    "student_logprob": lambda b: b.student_logprob,
}


def by_position(branches: Sequence[Branch], num_bins: int) -> list[Bin]:
    """One entry for each bin of the relative position that has a branch."""
    placed: dict[int, list[Branch]] = {}
    for branch in branches:
        placed.setdefault(min(int(branch.position * num_bins), num_bins - 1), []).append(branch)
    return [_bin(number / num_bins, (number + 1) / num_bins, placed[number]) for number in sorted(placed)]


def predictors(branches: Sequence[Branch], *, right_at: float = 1.0) -> dict[str, Predictor]:
    """How well each number tells branches with a right continuation (reward at least `right_at`) from those without.

    Intervals are of the jackknife over problems: of P a - (P - 1) a_p, a the AUROC and a_p the one without problem p.
    Unknown where it rests on one problem. Branches with no graded continuation are left out.
    """
    graded = [branch for branch in branches if branch.viability is not None]
    right_B = np.array([any(r is not None and r >= right_at for r in branch.rewards) for branch in graded])
    names = {name: number for number, name in enumerate(dict.fromkeys(branch.problem_id for branch in graded))}
    problem_B = np.array([names[branch.problem_id] for branch in graded], dtype=np.int64)
    return {
        name: _predictor(np.array([value(branch) for branch in graded]), right_B, problem_B)
        for name, value in PREDICTORS.items()
    }


def auroc(score_B: Floats, right_B: npt.NDArray[np.bool_], weight_B: Floats) -> float | None:
    """Chance that a right one has the larger score, weighted; ties count half. None without both kinds."""
    order = np.argsort(score_B, kind="stable")
    score_B, right_B, weight_B = score_B[order], right_B[order], weight_B[order]
    starts = np.flatnonzero(np.r_[True, score_B[1:] != score_B[:-1]]) if len(score_B) else np.zeros(0, dtype=np.int64)
    rights = np.add.reduceat(weight_B * right_B, starts) if len(starts) else np.zeros(0)
    wrongs = np.add.reduceat(weight_B * ~right_B, starts) if len(starts) else np.zeros(0)
    pairs = rights.sum() * wrongs.sum()
    if not pairs > 0:
        return None
    return float((rights * (np.cumsum(wrongs) - wrongs / 2)).sum() / pairs)


def _bin(start: float, end: float, branches: Sequence[Branch]) -> Bin:
    by_problem: dict[str, list[tuple[float, float]]] = {}
    for branch in branches:
        if branch.viability is not None and branch.own_reward is not None:
            by_problem.setdefault(branch.problem_id, []).append((branch.viability, branch.own_reward))
    viability_P, own_P = np.array([np.mean(pairs, axis=0) for pairs in by_problem.values()]).reshape(-1, 2).T
    return Bin(
        start=start,
        end=end,
        branches=len(branches),
        viability=estimate_mean(viability_P),
        own=estimate_mean(own_P),
        difference=estimate_difference(own_P, viability_P),
    )


def _predictor(score_B: Floats, right_B: npt.NDArray[np.bool_], problem_B: npt.NDArray[np.int64]) -> Predictor:
    found = auroc(score_B, right_B, np.ones(len(score_B)))
    if found is None:
        return Predictor(auroc=None, low=None, high=None, problems=0, larger_is_viable=None)
    larger = found >= 0.5
    score_B, found = (score_B, found) if larger else (-score_B, 1 - found)
    num_problems = int(problem_B.max()) + 1
    rests_on = min(len(np.unique(problem_B[kind])) for kind in (right_B, ~right_B))
    without_P = [auroc(score_B, right_B, (problem_B != p).astype(np.float64)) for p in range(num_problems)]
    known_P = np.array([a for a in without_P if a is not None])
    low = high = None
    if num_problems > 1 and len(known_P) == num_problems:
        estimate = estimate_mean(num_problems * found - (num_problems - 1) * known_P, rests_on=rests_on)
        assert estimate["low"] is not None and estimate["high"] is not None
        low, high = max(0.0, min(found, estimate["low"])), min(1.0, max(found, estimate["high"]))
    return Predictor(auroc=found, low=low, high=high, problems=rests_on, larger_is_viable=larger)
