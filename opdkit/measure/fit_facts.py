"""What `opdkit fit` measures (`Facts`) and the limits its rules use (`Thresholds`), each with where it comes from.

"Rethinking OPD" is arXiv:2604.13016, which gives trends and not limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from opdkit.errors import UserError
from opdkit.measure.intervals import Difference, Estimate


def _limit(default: float, source: str) -> Any:
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Every limit a rule uses; `metadata["source"]` of each field says where it comes from."""

    overlap_good: float = _limit(0.70, "Rethinking OPD: the run that succeeds starts at an overlap ratio of 72 %")
    overlap_low: float = _limit(
        0.50, "our choice: half of what either model considers is not among the other's likely tokens"
    )
    mass_good: float = _limit(0.97, "Rethinking OPD: shared tokens carry 97-99 % of both models' mass")
    mass_low: float = _limit(0.80, "our choice: a fifth of the probability is on tokens the other does not list")
    coverage: float = _limit(0.90, "our choice; reverse KL moves an entry in proportion to the student's probability")
    chance_high: float = _limit(0.25, "our choice: what two random lists share, beyond which the ratio says little")
    entropy_gap_high: float = _limit(0.50, "our choice, nats; Rethinking OPD: the gap narrows where it succeeds")
    divergence_min: float = _limit(0.005, "our choice, nats a token of reverse KL: below it there is nothing to learn")
    gain_min: float = _limit(0.02, "our choice, reward: a teacher that answers no better has little to give")
    continuation_min: float = _limit(0.03, "Rethinking OPD: it falls from +0.366 to +0.024 where training collapses")
    reward_auc_low: float = _limit(
        0.60, "our choice; Rethinking OPD measures 0.73 and 0.75, and warns of relying on it"
    )
    solved_sometimes: float = _limit(0.30, "our choice; PACED (arXiv:2603.11178) weighs p (1 - p), 0 at both ends")
    truncated_high: float = _limit(0.20, "our choice, the limit of a run's own warning")
    long_answer_tokens: float = _limit(7168, "Rethinking OPD: caps of 3K and 7K are best, 10K and 15K collapse")
    one_to_one_good: float = _limit(0.85, "our choice; arXiv:2610.08448 measures 85-97 % between families of models")
    think_difference: float = _limit(0.50, "our choice: share of answers with think tags, student against teacher")
    stop_ratio: float = _limit(
        0.10, "our choice: the teacher's probability of stopping where the student stops, to its"
    )

    def changed(self, values: Mapping[str, Any]) -> Thresholds:
        """With other values. Raises UserError for a name that is none, or a value that is no number."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"--threshold {name} is not a threshold; they are {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"--threshold {name}={value}: give a number")
        return Thresholds(**{**known, **{name: float(value) for name, value in values.items()}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of some lengths, in tokens."""

    median: float
    p90: float
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """The teacher goes on from the first `prefix_tokens` of the student's answers: its reward minus the student's."""

    prefix_tokens: int
    advantage: Difference  # over problems
    num_answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """How either side is asked, and how it begins, thinks and ends."""

    student_opening: str  # what the chat template writes behind the question
    teacher_opening: str
    same_prompts: bool  # both templates make the same prompts of all questions
    same_stop_ids: bool
    student_think: float  # share of answers with a think tag
    teacher_think: float | None  # None: the teacher was not asked to answer
    student_stop: float | None  # mean probability of stopping where the student stopped; None: no answer was finished
    teacher_stop: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything the answers told. None: unknown."""

    k: int
    num_ids: int
    overlap: Mapping[str, float | None]  # `overlap.summary` of all tokens
    first_token: Mapping[str, float | None]  # of the first token of each answer
    top_mass: Mapping[int, float]  # k -> the smaller of both sides' mean mass on their own k likeliest ids
    coverage: Mapping[int, float]  # k -> the teacher's mean mass on the student's k likeliest ids
    student: Estimate  # reward of one answer
    gain: Difference | None  # the teacher's minus the student's, same problems; None: it was not asked to answer
    continuations: Sequence[Continuation]
    reward_auc: float | None  # of the mean log q - log p of an answer, for telling right from wrong
    pass_rates: Sequence[float]  # of the problems with a graded answer
    answer_tokens: Spread
    prompt_tokens: Spread
    max_answer_tokens: int
    max_prompt_tokens: int
    share_truncated: float
    share_unread: float  # answers the teacher could not read: no context, or longer than its positions
    share_long_prompts: float  # problems that are left out
    pattern: Pattern
    context: str  # what the teacher reads beside the question; "none"
    divergence: str | None  # of the recipe's method; None: it has no direction
    support: str | None  # likewise: the entries it compares
    # Of the answers' tokens, with a teacher of another tokenizer: one_to_one, merged, masked, digits, ...; the numbers
    # above are then of the first, over the ids that both know. None: one tokenizer.
    heard: Mapping[str, float | None] | None = None
