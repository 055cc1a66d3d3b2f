"""avg@n, pass@k and maj@n of graded answers, with intervals over problems. Needs rows, not a model.

    avg@n    mean reward of a problem's answers, then over problems
    pass@k   unbiased: 1 - C(n-c, k) / C(n, k) for c right answers of n (Chen et al. 2021, arXiv:2107.03374, eq. 1);
             every k from 1 to n, each over the problems with at least k graded answers
    maj@n    is the answer most samples agree on right? Equal answers are one cluster (`votes.py`); those without a
             parsed answer are one INVALID cluster, which can win and is then wrong. Largest clusters that tie share
             the problem: it scores the share of them that is right, which is the mean over all orders of the samples.
             The published rule, which depends on that order, is in `published.py`
    format   share of the graded answers in which the grader found a final answer

An answer is right when its reward is at least `success_at`. An ungraded answer (reward None) is counted, has no vote
and is never a zero; a problem with no graded answer leaves every mean and is counted. Problems may have different
numbers of answers: each problem weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NotRequired, TypedDict, TypeVar

from opdkit.errors import UserError
from opdkit.measure.held_out import HeldOut
from opdkit.measure.intervals import Estimate, estimate_mean
from opdkit.measure.votes import SameAnswer, clusters
from opdkit.types import Finish, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One graded answer, as much of a `Rollout` as measuring needs."""

    problem_id: str
    sample_id: int
    reward: float | None  # None: not graded
    parsed: str | None  # the final answer as the grader read it; None: it found none
    finish: Finish
    num_tokens: int | None = None


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemScore:
    """The numbers of one problem. n = graded answers; rates are None where n is 0."""

    problem_id: str
    num_graded: int
    num_ungraded: int
    num_correct: int
    mean_reward: float | None
    majority: float | None  # share of the winning clusters that is right; None: nothing to vote on (`problem_scores`)
    format_rate: float | None  # None also where there is nothing to vote on
    truncated_rate: float  # of all answers
    mean_tokens: float | None  # of all answers; None where some length is unknown


class Accuracy(TypedDict):
    """`E` of the run folder's eval files and summary.json."""

    problems: int  # problems with at least one graded answer; the means are over these
    samples: int  # n of avg@n: graded answers of a problem, the largest number where they differ
    avg_at_n: Estimate
    pass_at_k: dict[str, Estimate]
    maj_at_n: Estimate
    format_rate: Estimate
    answer_tokens: Estimate  # each problem's mean length, over problems
    num_answers: int
    num_truncated: int  # finish == "length"
    num_no_answer: int  # graded, and the grader found no final answer
    num_ungraded: int
    num_ungraded_problems: int
    mean_answer_tokens: float | None  # over all answers; None where lengths are unknown
    divergence: NotRequired[HeldOut]  # with eval.divergence, of the student


def answers_of(rollouts: Iterable[Rollout]) -> list[Answer]:
    return [
        Answer(
            problem_id=rollout.problem_id,
            sample_id=rollout.sample_id,
            reward=rollout.reward,
            parsed=rollout.parsed,
            finish=rollout.finish,
            num_tokens=len(rollout.answer_ids),
        )
        for rollout in rollouts
    ]


def accuracy(
    answers: Sequence[Answer],
    *,
    success_at: float = 1.0,
    same: SameAnswer | None = None,
    has_votes: bool = True,
    has_finals: bool = True,
) -> Accuracy:
    """All accuracy numbers of one dataset. The order of `answers` does not matter.

    same: when two parsed answers are one vote. None: when the texts are equal (graders write equal answers alike).
    has_votes: False for a task without final answers to vote on (programs): maj_at_n is unknown.
    has_finals: False for a grader that need not read any (an environment): where no answer has one, maj_at_n and
    format_rate are unknown, and nothing is without an answer.
    Raises UserError for no answers at all, or one (problem_id, sample_id) twice.
    """
    has_finals = has_finals or any(answer.parsed is not None for answer in answers)
    scores = problem_scores(answers, success_at=success_at, same=same, has_votes=has_votes, has_finals=has_finals)
    most = max(score.num_graded for score in scores)
    ks = range(1, most + 1)
    passes = {
        k: [pass_at_k(score.num_graded, score.num_correct, k) if k <= score.num_graded else None for score in scores]
        for k in ks
    }
    lengths = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    return Accuracy(
        problems=sum(score.num_graded > 0 for score in scores),
        samples=most,
        avg_at_n=estimate_mean([score.mean_reward for score in scores]),
        pass_at_k={str(k): estimate_mean(values) for k, values in passes.items()},
        maj_at_n=estimate_mean([score.majority for score in scores]),
        format_rate=estimate_mean([score.format_rate for score in scores]),
        answer_tokens=estimate_mean([score.mean_tokens for score in scores], scale=None),
        num_answers=len(answers),
        num_truncated=sum(answer.finish == "length" for answer in answers),
        num_no_answer=sum(has_finals and a.reward is not None and a.parsed is None for a in answers),
        num_ungraded=sum(answer.reward is None for answer in answers),
        num_ungraded_problems=sum(score.num_graded == 0 for score in scores),
        mean_answer_tokens=sum(lengths) / len(lengths) if len(lengths) == len(answers) else None,
    )


def problem_scores(
    answers: Iterable[Answer],
    *,
    success_at: float = 1.0,
    same: SameAnswer | None = None,
    has_votes: bool = True,
    has_finals: bool = True,
) -> list[ProblemScore]:
    """One `ProblemScore` per problem, sorted by problem id.

    majority is None for a problem without graded answers and without `has_votes`. Both it and format_rate are None for
    every problem without `has_finals`, and if some right answer was saved without its parsed form: calling such answers
    INVALID would report 0 for a perfect model.
    """
    groups = by_problem(answers)
    if not groups:
        raise UserError("there are no answers to measure: the rows are empty")
    every = (answer for group in groups.values() for answer in group)
    was_parsed = has_finals and not any(is_right(answer, success_at) and answer.parsed is None for answer in every)
    return [_problem_score(group, success_at, same, was_parsed, has_votes) for group in groups.values()]


def by_problem(answers: Iterable[A]) -> dict[str, list[A]]:
    """Problem id -> its answers by sample id, sorted by problem id.

    Raises UserError for one (problem_id, sample_id) twice, ValueError for a reward that is no number.
    """
    groups: dict[str, list[A]] = {}
    for answer in answers:
        groups.setdefault(answer.problem_id, []).append(answer)
    return {problem_id: _in_order(groups[problem_id]) for problem_id in sorted(groups)}


def contested(answers: Iterable[Answer], *, success_at: float = 1.0) -> list[list[str]]:
    """The distinct wrong answers of each problem where it matters to maj@n which of them are equal.

    It does not where no answer is right, or where all wrong ones together are fewer than the right or the INVALID ones:
    so most problems need no comparing.
    """
    groups = []
    for group in by_problem(answers).values():
        graded = [answer for answer in group if answer.reward is not None]
        right = sum(is_right(answer, success_at) for answer in graded)
        invalid = sum(answer.parsed is None for answer in graded)
        wrong = [a.parsed for a in graded if a.parsed is not None and not is_right(a, success_at)]
        if right and len(wrong) >= max(right, invalid) and len(texts := list(dict.fromkeys(wrong))) > 1:
            groups.append(texts)
    return groups


def is_right(answer: Answer, success_at: float) -> bool:
    return answer.reward is not None and answer.reward >= success_at


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k answers, drawn without replacement from n of which c are right, is right.

    Unbiased for the chance of any of k fresh samples; exact integers until one division. k > n has no unbiased
    estimate and is refused (common code returns 1.0 there, even for c = 0).
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def _problem_score(
    group: list[Answer], success_at: float, same: SameAnswer | None, was_parsed: bool, has_votes: bool
) -> ProblemScore:
    graded = [answer for answer in group if answer.reward is not None]
    rewards = [answer.reward for answer in graded if answer.reward is not None]
    lengths = [answer.num_tokens for answer in group if answer.num_tokens is not None]
    parsed = graded if was_parsed else []
    return ProblemScore(
        problem_id=group[0].problem_id,
        num_graded=len(graded),
        num_ungraded=len(group) - len(graded),
        num_correct=sum(is_right(answer, success_at) for answer in graded),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        majority=_majority(parsed, success_at, same) if parsed and has_votes else None,
        format_rate=sum(answer.parsed is not None for answer in parsed) / len(parsed) if parsed else None,
        truncated_rate=sum(answer.finish == "length" for answer in group) / len(group),
        mean_tokens=sum(lengths) / len(lengths) if len(lengths) == len(group) else None,
    )


def _majority(graded: list[Answer], success_at: float, same: SameAnswer | None) -> float:
    """The mean, over the largest clusters, of the share of right answers in them.

    The grader has already told right answers from wrong ones, so `same` is asked within each kind only.
    """
    right = {answer.parsed for answer in graded if is_right(answer, success_at)}

    def one_kind(first: str, second: str) -> bool:
        return same is not None and (first in right) == (second in right) and same(first, second)

    found = clusters([answer.parsed for answer in graded], one_kind if same else None)
    winners = [cluster for cluster in found if len(cluster) == len(found[0])]
    shares = [
        sum(graded[i].parsed is not None and is_right(graded[i], success_at) for i in cluster) / len(cluster)
        for cluster in winners
    ]
    return sum(shares) / len(shares)


def _in_order(group: list[A]) -> list[A]:
    group = sorted(group, key=lambda answer: answer.sample_id)
    for answer in group:
        if answer.reward is not None and not math.isfinite(answer.reward):
            raise ValueError(
                f"answer {answer.problem_id!r}, {answer.sample_id} has reward {answer.reward}; unknown is None"
            )
    for first, second in pairwise(group):
        if first.sample_id == second.sample_id:
            raise UserError(
                f"problem {first.problem_id!r} has sample {first.sample_id} twice: the rows of two runs are mixed, "
                "or one run was read twice; measure one run at a time"
            )
    return group
