"""What a reader must know before believing the numbers: everything cut, left out, ungraded or skipped, counted.

The weightiest first, and nothing twice: what a run said while it trained stands with the count of the same fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.metric_lines import SENTINELS, found
from opdkit.recipe.sentinels import SENTINELS as NAMES
from opdkit.reporting.figures.curves import number
from opdkit.reporting.html.numbers import share
from opdkit.reporting.run import RunContents
from opdkit.run.sentinels import GAP_LIMITS, wide_gap

WRONG, LOST, NOTE = 3.0, 2.0, 1.0  # weights: numbers may be wrong; something is missing from them; good to know


@dataclass(frozen=True, slots=True)
class Warned:
    """weight: one of the three, and below 1 more by the share that is concerned. about: the metric, if there is one."""

    weight: float
    sentence: str
    about: str = ""


# Metric -> what its sum over the run counts, as a share of all sampled answers.
_OF_ANSWERS: Mapping[str, str] = {
    "rollout/num_truncated": "training answers were cut at the length limit",
    "rollout/num_ungraded": "training answers could not be graded; they have no reward, not a reward of 0",
    "rollout/num_no_answer": "training answers held no final answer the grader could read",
    "teacher/num_rows_without_view": "training answers had no teacher context: its part of the loss lacks them",
    "teacher/num_rows_too_long": "training answers were longer, with their context, than the teacher's positions: its "
    "part of the loss lacks them",
}
_COUNTED: Mapping[str, tuple[float, str]] = {
    "train/num_skipped_steps": (
        WRONG,
        "Steps that changed nothing: the gradient was not finite, or nothing was counted",
    ),
    "train/num_steps_without_gradient": (
        WRONG,
        "Steps that taught nothing: every gradient was zero (equal rewards, nothing to read, nothing counted)",
    ),
    "teacher/num_truncated_tokens": (NOTE, "Tokens of teacher contexts cut to fit"),
    "metrics/num_non_finite": (WRONG, "Metric values that were not finite, and are gaps in the curves"),
}
# What the run itself says of the same faults; a step's alarm knows why, the metrics how often.
_SAID: Mapping[str, str] = {
    "rollout/num_truncated": r"% of the answers ran into sampling\.max_answer_tokens",
    "rollout/num_ungraded": r"% of the answers could not be graded",
    "teacher/num_rows_without_view": r"% of the answers gave the teacher nothing to read",
    "teacher/num_rows_too_long": r"% of the answers were longer, with their context",
    "train/num_steps_without_gradient": r"the step taught nothing and changed nothing",
    "rollout/sampler_gap_bias": r"the sampler's log-probs are not the trainer's",
    "context/share_of_groups_with_success": r"no group has a success",
    **{f"{SENTINELS}{name}": rf"\(sentinels\.{name}\)" for name in NAMES},
}
# Evaluations: every count stands in the table of results; a sentence from this share of the answers on.
_NOTABLE = {"num_truncated": 0.02, "num_no_answer": 0.1, "num_ungraded": 0.0}
_EVALUATED: Mapping[str, str] = {
    "num_truncated": "answers were cut at the length limit",
    "num_ungraded": "answers could not be graded and are in no mean",
    "num_no_answer": "answers held no final answer the grader could read",
}


def warnings(run: RunContents, unread: Iterable[str] = ()) -> list[str]:
    """One sentence for each fault that occurred; empty when nothing did. unread: what of the files could not be."""
    return list(dict.fromkeys(each.sentence for each in weighed(run, unread)))


def weighed(run: RunContents, unread: Iterable[str] = ()) -> list[Warned]:
    """The weightiest first."""
    files = [Warned(LOST + 0.99, sentence) for sentence in unread]
    counted = [*_ended(run), *_sentinels(run), *_training(run), *_evaluation(run)]
    told = (run.summary or {}).get("warnings", ())
    said = [_said(str(sentence)) for sentence in (told if isinstance(told, list) else ())]
    alone = [each for each in said if not any(each.about and each.about == other.about for other in counted)]
    merged = [_with_reason(each, said) for each in counted]
    return sorted([*files, *alone, *merged], key=lambda each: -each.weight)


def _ended(run: RunContents) -> Iterator[Warned]:
    ended = (run.summary or {}).get("ended")
    if isinstance(ended, Mapping):
        planned = run.setting("train", "steps")
        yield Warned(NOTE, f"The run ended after step {ended.get('step')} of {planned}: {ended.get('why')}.")
    best = (run.summary or {}).get("best")
    if isinstance(best, Mapping) and best.get("step") != (run.summary or {}).get("steps"):
        where = f"The best checkpoint by {best.get('chosen_on')} is that of step {best.get('step')}"
        yield Warned(NOTE, f"{where}; the results here are those of the last step.")


def _sentinels(run: RunContents) -> Iterator[Warned]:
    """Every time that the run went back, and how often each found something in the steps that count."""
    for back in run.went_back:
        why = ", ".join(f"sentinels.{name}" for name in back.found_by)
        sentence = (
            f"The run went back from step {back.from_step} to step {back.to_step} ({why}; attempt {back.attempt}): the "
            "curves show the steps that were taken last, metrics.jsonl has them all."
        )
        yield Warned(LOST, sentence)
    steps: dict[str, list[Any]] = {}
    for line in run.metrics:
        for name in found(line):
            steps.setdefault(name, []).append(line["step"])
    for name, own in steps.items():
        if name != "sampler_gap":  # said below, also of runs that were made before there were sentinels
            sentence = f"sentinels.{name} found something in {len(own):,} steps, first in step {own[0]}."
            yield Warned(WRONG, sentence, f"{SENTINELS}{name}")


def _said(sentence: str) -> Warned:
    about = next((name for name, words in _SAID.items() if re.search(words, sentence)), "")
    return Warned(LOST, sentence, about)


def _with_reason(counted: Warned, said: Sequence[Warned]) -> Warned:
    """With what a step's alarm said of it; a share that the count says too is left out."""
    for each in said:
        if counted.about == each.about and counted.about and not _SAID[each.about].startswith("%"):
            return replace(counted, sentence=f"{counted.sentence} First, {each.sentence}.")
    return counted


def _training(run: RunContents) -> Iterator[Warned]:
    num_answers = _total(run, "rollout/num_rows")
    for name, what in _OF_ANSWERS.items():
        if count := _total(run, name):
            part = min(0.9, count / num_answers) if num_answers else 0.9
            yield Warned(LOST + part, f"{share(count, num_answers) if num_answers else f'{count:,.0f}'} {what}.", name)
    for name, (weight, what) in _COUNTED.items():
        if count := _total(run, name):
            yield Warned(weight, f"{what}: {count:,.0f}.", name)
    dtype = run.setting("model", "dtype")
    if dtype in GAP_LIMITS and (wide := sum(wide_gap(_gap(line), dtype) is not None for line in run.metrics)):
        sentence = f"Steps in which sampler and trainer disagreed on log-probs by more than rounding: {wide:,}."
        yield Warned(WRONG + 0.5, sentence, "rollout/sampler_gap_bias")
    about = "context/share_of_groups_with_success"
    if unsolved := sum(line.get(about) == 0 for line in run.metrics):
        yield Warned(LOST, f"Steps in which no group had a success to show the teacher: {unsolved:,}.", about)
    failures = max((number(line, "metrics/num_sink_failures") or 0.0 for line in run.metrics), default=0.0)
    if failures:  # counted since the run began, not in each step
        yield Warned(NOTE, f"Steps that a metrics service beside metrics.jsonl did not take: {failures:,.0f}.")


def _evaluation(run: RunContents) -> Iterator[Warned]:
    for dataset, entries in run.headline.items():
        for entry in entries:
            counts = entry.measured.counts
            for name, what in _EVALUATED.items():
                count, of = counts.get(name, 0), counts.get("num_answers", 0)
                if of > 0 and count > _NOTABLE[name] * of:
                    yield Warned(LOST + min(0.9, count / of), f"{entry.label}, {dataset}: {share(count, of)} {what}.")


def _gap(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    return {name: number(line, name) for name in ("rollout/sampler_gap_bias", "rollout/sampler_gap_p999")}


def _total(run: RunContents, name: str) -> float:
    return sum(number(line, name) or 0.0 for line in run.metrics)
