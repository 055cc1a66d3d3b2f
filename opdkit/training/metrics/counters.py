"""What a run counts from its steps, in checkpoints and in `summary.json`, and what its user must hear of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

LOST_SHARE = 0.2  # of the answers; from here on the summary says so

# Counter -> the metric it adds up; a metric that a step does not have counts nothing.
_COUNTED: Mapping[str, str] = {
    "answer_tokens": "rollout/tokens",
    "teacher_tokens": "teacher/tokens",
    "answers": "rollout/num_rows",
    "truncated_answers": "rollout/num_truncated",
    "ungraded_answers": "rollout/num_ungraded",
    "answers_without_context": "teacher/num_rows_without_view",
    "answers_too_long_for_teacher": "teacher/num_rows_too_long",
    "grader_crashes": "grading/num_crashes",
    "skipped_steps": "train/num_skipped_steps",
    "steps_without_gradient": "train/num_steps_without_gradient",
}
_LOST: Mapping[str, str] = {
    "answers_without_context": "gave the teacher nothing to read",
    "answers_too_long_for_teacher": "were longer, with their context, than the teacher's positions",
    "truncated_answers": "ran into sampling.max_answer_tokens",
    "ungraded_answers": "could not be graded",
}


def count(counters: MutableMapping[str, float], seen: Mapping[str, float | None], seconds: float) -> None:
    """Add one step, by its metrics."""
    counters["seconds"] = counters.get("seconds", 0.0) + seconds
    for name, metric in _COUNTED.items():
        value = seen.get(metric, 0.0)
        assert value is not None, metric
        counters[name] = counters.get(name, 0.0) + value


def lost_answers(counters: Mapping[str, float]) -> Iterator[str]:
    """A sentence for each way in which many of the run's answers were lost."""
    for name, why in _LOST.items():
        share = counters.get(name, 0.0) / max(1.0, counters.get("answers", 0.0))
        if share > LOST_SHARE:
            yield f"{share:.0%} of the answers {why}"
    if crashes := counters.get("grader_crashes"):
        yield f"the grader failed on {crashes:.0f} answers, which stayed ungraded"
