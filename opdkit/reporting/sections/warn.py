"""What a reader must know before believing the numbers: everything cut, left out, ungraded or skipped, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opdkit.metric_lines import found
from opdkit.reporting.figures.curves import number
from opdkit.reporting.html.numbers import share
from opdkit.reporting.run import RunContents
from opdkit.run.sentinels import GAP_LIMITS, wide_gap

# Metric -> what its sum over the run counts. Shares are of all sampled answers, where that is what is counted.
_OF_ANSWERS: Mapping[str, str] = {
    "rollout/num_truncated": "training answers were cut at the length limit",
    "rollout/num_ungraded": "training answers could not be graded; they have no reward, not a reward of 0",
    "rollout/num_no_answer": "training answers held no final answer the grader could read",
    "teacher/num_rows_without_view": "training answers had no teacher context: its part of the loss lacks them",
    "teacher/num_rows_too_long": "training answers were longer, with their context, than the teacher's positions: its "
    "part of the loss lacks them",
}
_COUNTED: Mapping[str, str] = {
    "train/num_skipped_steps": "Steps that changed nothing: the gradient was not finite, or nothing was counted",
    "train/num_steps_without_gradient": "Steps that taught nothing: every gradient was zero (equal rewards, nothing to "
    "read, nothing counted)",
    "teacher/num_truncated_tokens": "Tokens of teacher contexts cut to fit",
    "metrics/num_non_finite": "Metric values that were not finite, and are gaps in the curves",
}
# Evaluations: every count stands in the table of results; a sentence from this share of the answers on.
_NOTABLE = {"num_truncated": 0.02, "num_no_answer": 0.1, "num_ungraded": 0.0}
_EVALUATED: Mapping[str, str] = {
    "num_truncated": "answers were cut at the length limit",
    "num_ungraded": "answers could not be graded and are in no mean",
    "num_no_answer": "answers held no final answer the grader could read",
}


def warnings(run: RunContents) -> list[str]:
    """One sentence for each fault that occurred; empty when nothing did."""
    said = [str(sentence) for sentence in (run.summary or {}).get("warnings", ())]
    return [*_ended(run), *said, *_sentinels(run), *_training(run), *_evaluation(run)]


def _ended(run: RunContents) -> Iterator[str]:
    ended = (run.summary or {}).get("ended")
    if isinstance(ended, Mapping):
        planned = run.setting("train", "steps")
        yield f"The run ended after step {ended.get('step')} of {planned}: {ended.get('why')}."


def _sentinels(run: RunContents) -> Iterator[str]:
    """Every time that the run went back, and how often each found something in the steps that count."""
    for back in run.went_back:
        why = ", ".join(f"sentinels.{name}" for name in back.found_by)
        yield (
            f"The run went back from step {back.from_step} to step {back.to_step} ({why}; attempt {back.attempt}): the "
            "curves show the steps that were taken last, metrics.jsonl has them all."
        )
    steps: dict[str, list[Any]] = {}
    for line in run.metrics:
        for name in found(line):
            steps.setdefault(name, []).append(line["step"])
    for name, own in steps.items():
        if name != "sampler_gap":  # said below, also of runs that were made before there were sentinels
            yield f"sentinels.{name} found something in {len(own):,} steps, first in step {own[0]}."


def _training(run: RunContents) -> Iterator[str]:
    num_answers = _total(run, "rollout/num_rows")
    for name, what in _OF_ANSWERS.items():
        if count := _total(run, name):
            yield f"{share(count, num_answers) if num_answers else f'{count:,.0f}'} {what}."
    for name, what in _COUNTED.items():
        if count := _total(run, name):
            yield f"{what}: {count:,.0f}."
    dtype = run.setting("model", "dtype")
    if dtype in GAP_LIMITS and (wide := sum(wide_gap(_gap(line), dtype) is not None for line in run.metrics)):
        yield f"Steps in which sampler and trainer disagreed on log-probs by more than rounding: {wide:,}."
    unsolved = [line for line in run.metrics if line.get("context/share_of_groups_with_success") == 0]
    if unsolved:
        yield f"Steps in which no group had a success to show the teacher: {len(unsolved):,}."
    failures = max((number(line, "metrics/num_sink_failures") or 0.0 for line in run.metrics), default=0.0)
    if failures:  # counted since the run began, not in each step
        yield f"Steps that a metrics service beside metrics.jsonl did not take: {failures:,.0f}."


def _evaluation(run: RunContents) -> Iterator[str]:
    for dataset, entries in run.headline.items():
        for entry in entries:
            counts = entry.measured.counts
            for name, what in _EVALUATED.items():
                count, of = counts.get(name, 0), counts.get("num_answers", 0)
                if count > _NOTABLE[name] * of:
                    yield f"{entry.label}, {dataset}: {share(count, of)} {what}."


def _gap(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    return {name: number(line, name) for name in ("rollout/sampler_gap_bias", "rollout/sampler_gap_p999")}


def _total(run: RunContents, name: str) -> float:
    values: list[Any] = [line.get(name) for line in run.metrics]
    return float(sum(value for value in values if isinstance(value, (int, float))))
