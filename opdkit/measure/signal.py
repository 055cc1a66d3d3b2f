"""Does a teacher rank answers as the verifier does? Rank metrics of teacher scores, with intervals over problems.

For every problem and condition (what the teacher read) the answers have teacher scores (mean log-prob of a token,
nats), rewards and success labels; `ranking.py` has the metrics. A problem on which a metric is not defined leaves its
mean and is counted.

Letters: C conditions, P problems, N answers of a problem (the largest number), M metrics, B difficulty buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from opdkit.errors import UserError
from opdkit.measure.bootstrap import bootstrap_means
from opdkit.measure.intervals import SHARE, Difference, Estimate, estimate_difference, estimate_mean
from opdkit.measure.ranking import METRICS, Definitions, Flags, Floats, problem_metrics

Bucket = Literal["easy", "medium", "hard"]
SampleSet = Literal[
    "all_samples",
    "effective_only",
    "reward_zero_only",
    "reward_zero_effective_only",
    "both_present_all",
    "both_present_effective_only",
]
_CORRELATIONS = ("spearman", "kendall_tau", "success_point_biserial")  # from -1 to 1, the others from 0 to 1
SAMPLE_SETS: tuple[SampleSet, ...] = get_args(SampleSet)
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)
RESAMPLES = 2000  # the published number; 10 000 move the ends by a few thousandths
BASE = "base"  # the condition that shows nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """One answer as the teacher scored it under one condition."""

    condition: str
    problem_id: str
    sample_id: int
    score: float
    reward: float
    success: bool
    bucket: Bucket  # of the problem
    effective: bool  # everything the condition shows was there to be shown
    num_context_tokens: int
    num_truncated_tokens: int  # cut off what was shown
    copy: bool | None  # it says word for word what the condition shows; None: not known


class Measured(TypedDict):
    """A metric over problems, and how many problems with two answers or more have no value of it."""

    value: float | None
    low: float | None
    high: float | None
    problems: int
    undefined: int


class ConditionSignal(TypedDict):
    problems: int  # with two answers or more in this sample set
    answers: int
    mean_context_tokens: float | None
    truncation_rate: float | None  # share of the answers whose context was cut
    metrics: dict[str, Measured]
    difference_to_base: dict[str, Difference] | None  # as in `pairs`; None: base, or no base
    by_bucket: dict[Bucket, dict[str, Measured]]


class PairSignal(TypedDict):
    """One condition minus another, problem by problem, over the answers that both have in this sample set."""

    condition: str
    minus: str
    answers: int
    copies: int | None  # of these, how many equal an answer that either condition shows; None: not known
    difference: dict[str, Difference]
    without_copies: dict[str, Difference] | None  # the same without them: a shown answer is probable for being shown


class SampleSetSignal(TypedDict):
    conditions: dict[str, ConditionSignal]
    # The same over the problems that have two answers or more under every condition that has any.
    paired: dict[str, ConditionSignal]
    pairs: list[PairSignal]  # any two conditions


def difficulty(num_successes: int, num_answers: int, definitions: Definitions = "careful") -> Bucket:
    """How hard a problem is for who answered it: no success, fewer than half, or at least half.

    published: at least 4 successes are easy, whatever the number of answers. With 8 answers that is the same.
    """
    if num_successes == 0:
        return "hard"
    easy = num_successes >= 4 if definitions == "published" else 2 * num_successes >= num_answers
    return "easy" if easy else "medium"


def signal_metrics(
    rows: Sequence[ScoredAnswer],
    *,
    definitions: Definitions = "careful",
    seed: int = 0,
    resamples: int = RESAMPLES,
    order: Sequence[str] = (),
) -> dict[SampleSet, SampleSetSignal]:
    """All metrics of all sample sets. The order of `rows` does not matter.

    order: of the conditions; those it does not name follow, `base` first and then by name.
    seed, resamples: of the published bootstrap, which `definitions = "published"` gives the metrics; ours has no draw,
    and is what differences have.
    Sample sets: all answers; those whose condition could show all it shows (`effective`); those with reward 0; the
    problems with a success and a failure among their answers; and the crossings with `effective`.
    Raises UserError for no rows, or one (condition, problem, sample) twice; ValueError for a score that is no number.
    """
    table = _tabulate(rows, order)
    return {name: _sample_set(table, mask, definitions, seed, resamples) for name, mask in _masks(table).items()}


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows as arrays. Problems and samples are sorted, so that the order of the rows is gone."""

    conditions: list[str]
    scores_CPN: Floats  # NaN: not there
    effective_CPN: Flags
    context_CPN: Floats
    truncated_CPN: Flags
    copy_CPN: Flags
    copies_known: bool
    rewards_PN: Floats
    success_PN: Flags
    bucket_P: npt.NDArray[np.int64]  # index into BUCKETS


def _tabulate(rows: Sequence[ScoredAnswer], order: Sequence[str]) -> _Table:
    if not rows:
        raise UserError("there are no scored answers to measure: the scores are empty")
    place = {name: index for index, name in enumerate(order)}
    conditions = sorted({row.condition for row in rows}, key=lambda c: (place.get(c, len(place)), c != BASE, c))
    samples: dict[str, dict[int, int]] = {}
    for problem_id, sample_id in sorted({(row.problem_id, row.sample_id) for row in rows}):
        places = samples.setdefault(problem_id, {})
        places[sample_id] = len(places)
    problems = {problem_id: place for place, problem_id in enumerate(samples)}
    shape = (len(conditions), len(problems), max(map(len, samples.values())))
    table = _Table(
        conditions=conditions,
        scores_CPN=np.full(shape, np.nan),
        effective_CPN=np.zeros(shape, dtype=bool),
        context_CPN=np.zeros(shape),
        truncated_CPN=np.zeros(shape, dtype=bool),
        copy_CPN=np.zeros(shape, dtype=bool),
        copies_known=all(row.copy is not None for row in rows),
        rewards_PN=np.full(shape[1:], np.nan),
        success_PN=np.zeros(shape[1:], dtype=bool),
        bucket_P=np.zeros(shape[1], dtype=np.int64),
    )
    number = {condition: place for place, condition in enumerate(conditions)}
    for row in rows:
        _place(table, row, (number[row.condition], problems[row.problem_id], samples[row.problem_id][row.sample_id]))
    return table


def _place(table: _Table, row: ScoredAnswer, at: tuple[int, int, int]) -> None:
    who = f"answer {row.problem_id!r}, {row.sample_id} under {row.condition}"
    if not (math.isfinite(row.score) and math.isfinite(row.reward)):
        raise ValueError(f"{who} has score {row.score} and reward {row.reward}; an unscored answer is not a row")
    if not math.isnan(table.scores_CPN[at]):
        raise UserError(f"{who} is there twice: the scores of two analyses are mixed; measure one at a time")
    table.scores_CPN[at] = row.score
    table.effective_CPN[at] = row.effective
    table.context_CPN[at] = row.num_context_tokens
    table.truncated_CPN[at] = row.num_truncated_tokens > 0
    table.copy_CPN[at] = bool(row.copy)
    table.rewards_PN[at[1:]] = row.reward
    table.success_PN[at[1:]] = row.success
    table.bucket_P[at[1]] = BUCKETS.index(row.bucket)


def _masks(table: _Table) -> dict[SampleSet, Flags]:
    every = ~np.isnan(table.scores_CPN)
    there = every.any(0)
    success = (there & table.success_PN).any(-1)
    failure = (there & ~table.success_PN).any(-1)
    subsets: dict[str, Flags] = {
        "all_samples": every,
        "reward_zero_only": every & (table.rewards_PN == 0),
        "both_present_all": every & np.asarray(success & failure)[:, None],
    }
    subsets["effective_only"] = every & table.effective_CPN
    for name in ("reward_zero", "both_present"):
        whole = subsets["reward_zero_only" if name == "reward_zero" else "both_present_all"]
        subsets[f"{name}_effective_only"] = whole & table.effective_CPN
    return {name: subsets[name] for name in SAMPLE_SETS}


def _sample_set(table: _Table, mask_CPN: Flags, definitions: Definitions, seed: int, resamples: int) -> SampleSetSignal:
    enough_CP = mask_CPN.sum(-1) >= 2
    used_C = enough_CP.any(-1)
    common_P = enough_CP[used_C].all(0) if used_C.any() else np.zeros(enough_CP.shape[1], dtype=bool)
    paired_CPN = mask_CPN & common_P[:, None] & used_C[:, None, None]
    pairs = _pairs(table, mask_CPN, definitions)
    to_base = _pairs(table, paired_CPN, definitions, to=[BASE])
    return SampleSetSignal(
        conditions=_conditions(table, mask_CPN, definitions, seed, resamples, pairs),
        paired=_conditions(table, paired_CPN, definitions, seed, resamples, to_base),
        pairs=pairs,
    )


def _conditions(
    table: _Table, mask_CPN: Flags, definitions: Definitions, seed: int, resamples: int, pairs: Sequence[PairSignal]
) -> dict[str, ConditionSignal]:
    differences = {pair["condition"]: pair["difference"] for pair in pairs if pair["minus"] == BASE}
    found = {}
    for c, condition in enumerate(table.conditions):
        if not mask_CPN[c].any():
            continue
        values_PM = _values(table, c, mask_CPN[c], definitions)
        in_buckets = [(bucket, table.bucket_P == b) for b, bucket in enumerate(BUCKETS)]
        parts = [values_PM, *(np.where(in_P[:, None], values_PM, np.nan) for _, in_P in in_buckets)]
        enough_P = mask_CPN[c].sum(-1) >= 2
        whole, *buckets = _estimates(parts, definitions, seed, resamples)
        found[condition] = ConditionSignal(
            problems=int(enough_P.sum()),
            answers=int(mask_CPN[c].sum()),
            mean_context_tokens=float(table.context_CPN[c][mask_CPN[c]].mean()),
            truncation_rate=float(table.truncated_CPN[c][mask_CPN[c]].mean()),
            metrics=_counted(whole, int(enough_P.sum())),
            difference_to_base=differences.get(condition),
            by_bucket={
                bucket: _counted(part, int((enough_P & in_P).sum()))
                for (bucket, in_P), part in zip(in_buckets, buckets, strict=True)
            },
        )
    return found


def _estimates(
    parts: Sequence[Floats], definitions: Definitions, seed: int, resamples: int
) -> list[dict[str, Estimate]]:
    """Of each [P, M]. One call, so that published intervals of one condition are of one set of resamples."""
    if definitions == "published":
        found = bootstrap_means(np.concatenate(parts, axis=1), seed=seed, resamples=resamples)
        return [
            dict(zip(METRICS, found[i * len(METRICS) : (i + 1) * len(METRICS)], strict=True)) for i in range(len(parts))
        ]
    return [
        {name: estimate_mean(values_PM[:, m], _scale(name)) for m, name in enumerate(METRICS)} for values_PM in parts
    ]


def _pairs(
    table: _Table, mask_CPN: Flags, definitions: Definitions, to: Sequence[str] | None = None
) -> list[PairSignal]:
    """Every condition minus every earlier one (or those of `to`), each pair over the answers that both have."""
    known: dict[tuple[int, bytes], Floats] = {}

    def values(c: int, mask_PN: Flags) -> Floats:
        key = c, np.packbits(mask_PN).tobytes()
        if key not in known:
            known[key] = _values(table, c, mask_PN, definitions)
        return known[key]

    def difference(after: int, before: int, mask_PN: Flags) -> dict[str, Difference]:
        sides = values(before, mask_PN), values(after, mask_PN)
        return {
            name: estimate_difference(sides[0][:, m], sides[1][:, m], _scale(name)) for m, name in enumerate(METRICS)
        }

    found = []
    for after in range(len(table.conditions)):
        for before in range(after):
            both_PN = mask_CPN[after] & mask_CPN[before]
            if not both_PN.any() or (to is not None and table.conditions[before] not in to):
                continue
            alone_PN = both_PN & ~(table.copy_CPN[after] | table.copy_CPN[before])
            found.append(
                PairSignal(
                    condition=table.conditions[after],
                    minus=table.conditions[before],
                    answers=int(both_PN.sum()),
                    copies=int((both_PN & ~alone_PN).sum()) if table.copies_known else None,
                    difference=difference(after, before, both_PN),
                    without_copies=difference(after, before, alone_PN) if table.copies_known else None,
                )
            )
    return found


def _values(table: _Table, c: int, mask_PN: Flags, definitions: Definitions) -> Floats:
    return problem_metrics(table.scores_CPN[c], table.rewards_PN, table.success_PN, mask_PN, definitions=definitions)


def _scale(metric: str) -> tuple[float, float]:
    return (-1.0, 1.0) if metric in _CORRELATIONS else SHARE


def _counted(estimates: dict[str, Estimate], problems: int) -> dict[str, Measured]:
    return {name: Measured(**e, undefined=problems - e["problems"]) for name, e in estimates.items()}
