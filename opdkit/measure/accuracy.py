"""avg@n, pass@k and maj@n of graded answers, with intervals over problems. Needs rows, not a model.

    avg@n    mean reward of a problem's answers, then over problems
    pass@k   unbiased: 1 - C(n-c, k) / C(n, k) for c right answers of n (Chen et al. 2021, arXiv:2107.03374, eq. 1);
             k = 1, 2, 4, ... and n itself, each over the problems with at least k graded answers
    maj@n    is the answer most samples agree on right? Answers in the order of sample_id; those without a parsed answer
             are one INVALID cluster, which can win and is then wrong; the largest cluster wins, the earliest at a tie;
             it is right if its first answer is (SaFo-Lab/PW-OPSD, eval/recompute_majn.py)

An answer is right when its reward is at least `success_at`. An ungraded answer (reward None) is counted, has no vote
and is never a zero; a problem with no graded answer leaves every mean and is counted. Problems may have different
numbers of answers: each problem weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import numpy as np

from opdkit.errors import UserError
from opdkit.measure.intervals import RESAMPLES, Estimate, bootstrap_means
from opdkit.types import Finish, Rollout

SameAnswer = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One graded answer, as much of a `Rollout` as measuring needs."""

    problem_id: str
    sample_id: int
    reward: float | None  # None: not graded
    parsed: str | None  # the final answer as the grader read it; None: it found none
    finish: Finish
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemScore:
    """The numbers of one problem. n = graded answers; rates are None where n is 0."""

    problem_id: str
    num_graded: int
    num_ungraded: int
    num_correct: int
    mean_reward: float | None
    majority_correct: bool | None  # None: nothing to vote on (see `problem_scores`)


class Accuracy(TypedDict):
    """`E` of the run folder's eval files and summary.json."""

    problems: int  # problems with at least one graded answer; the means are over these
    samples: int  # n of avg@n: graded answers of a problem, the largest number where they differ
    avg_at_n: Estimate
    pass_at_k: dict[str, Estimate]
    maj_at_n: Estimate
    num_answers: int
    num_truncated: int  # finish == "length"
    num_no_answer: int  # graded, and the grader found no final answer
    num_ungraded: int
    num_ungraded_problems: int
    mean_answer_tokens: float | None  # over all answers; None where lengths are unknown


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
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Accuracy:
    """All accuracy numbers of one dataset. The order of `answers` does not matter.

    same: when two parsed answers are one vote. None: when the texts are equal (graders write equal answers alike),
        which does not depend on order. A function is used greedily, as published (see `clusters`).
    Raises UserError for no answers at all, or one (problem_id, sample_id) twice.
    """
    scores = problem_scores(answers, success_at=success_at, same=same)
    most = max(score.num_graded for score in scores)
    ks = [2**power for power in range(most.bit_length()) if 2**power < most] + ([most] if most else [])
    columns = [[_float(score.mean_reward), _float(score.majority_correct)] for score in scores]
    for row, score in zip(columns, scores, strict=True):
        row += [pass_at_k(score.num_graded, score.num_correct, k) if k <= score.num_graded else math.nan for k in ks]
    avg, maj, *passes = bootstrap_means(np.array(columns), seed=seed, resamples=resamples)
    lengths = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    return Accuracy(
        problems=sum(score.num_graded > 0 for score in scores),
        samples=most,
        avg_at_n=avg,
        pass_at_k={str(k): estimate for k, estimate in zip(ks, passes, strict=True)},
        maj_at_n=maj,
        num_answers=len(answers),
        num_truncated=sum(answer.finish == "length" for answer in answers),
        num_no_answer=sum(answer.reward is not None and answer.parsed is None for answer in answers),
        num_ungraded=sum(answer.reward is None for answer in answers),
        num_ungraded_problems=sum(score.num_graded == 0 for score in scores),
        mean_answer_tokens=sum(lengths) / len(lengths) if len(lengths) == len(answers) else None,
    )


def problem_scores(
    answers: Iterable[Answer], *, success_at: float = 1.0, same: SameAnswer | None = None
) -> list[ProblemScore]:
    """One `ProblemScore` per problem, sorted by problem id.

    majority_correct is None for a problem without graded answers, and for every problem if some right answer was saved
    without its parsed form: such a task (programs, say) has no final answers to vote on, and calling them INVALID would
    report 0 for a perfect model.
    """
    by_problem: dict[str, list[Answer]] = {}
    for answer in answers:
        by_problem.setdefault(answer.problem_id, []).append(answer)
    if not by_problem:
        raise UserError("there are no answers to measure: the rows are empty")
    groups = [_in_order(by_problem[problem_id]) for problem_id in sorted(by_problem)]
    has_votes = not any(_right(answer, success_at) and answer.parsed is None for group in groups for answer in group)
    return [_problem_score(group, success_at, same, has_votes) for group in groups]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k answers, drawn without replacement from n of which c are right, is right.

    Unbiased for the chance of any of k fresh samples; exact integers until one division. k > n has no unbiased
    estimate and is refused (common code returns 1.0 there, even for c = 0).
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def clusters(parsed: Sequence[str | None], same: SameAnswer | None = None) -> list[list[int]]:
    """Indices of equal answers, largest cluster first, the earlier one first at a tie. None is one cluster of its own.

    same None: equal texts. Otherwise the published greedy rule: an answer joins the first cluster whose first member it
    equals in either order; where `same` is not transitive, the result depends on the order of the answers. Equal texts
    are one vote under every `same` (some graders cannot even parse an answer to find it equal to itself).
    """
    found: list[list[int]] = []
    by_text: dict[str | None, list[int]] = {}
    for index, text in enumerate(parsed):
        home = by_text.get(text)
        if home is None and text is not None and same is not None:
            home = next((cluster for cluster in found if _joins(text, parsed[cluster[0]], same)), None)
        if home is None:
            home = []
            found.append(home)
        by_text.setdefault(text, home)
        home.append(index)
    return sorted(found, key=len, reverse=True)  # stable: first come, first at a tie


def _joins(text: str, representative: str | None, same: SameAnswer) -> bool:
    return representative is not None and (same(text, representative) or same(representative, text))


def _problem_score(group: list[Answer], success_at: float, same: SameAnswer | None, has_votes: bool) -> ProblemScore:
    graded = [answer for answer in group if answer.reward is not None]
    rewards = [answer.reward for answer in graded if answer.reward is not None]
    majority_correct = None
    if graded and has_votes:
        winner = graded[clusters([answer.parsed for answer in graded], same)[0][0]]
        majority_correct = winner.parsed is not None and _right(winner, success_at)
    return ProblemScore(
        problem_id=group[0].problem_id,
        num_graded=len(graded),
        num_ungraded=len(group) - len(graded),
        num_correct=sum(_right(answer, success_at) for answer in graded),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        majority_correct=majority_correct,
    )


def _in_order(group: list[Answer]) -> list[Answer]:
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


def _right(answer: Answer, success_at: float) -> bool:
    return answer.reward is not None and answer.reward >= success_at


def _float(value: float | bool | None) -> float:
    return math.nan if value is None else float(value)
