"""A step in words, for a reader who meets the method here for the first time: no more than its metrics bear out."""

from __future__ import annotations

from collections.abc import Iterator

from opdkit.methods.base import Method
from opdkit.reporting.figures.curves import number
from opdkit.reporting.html.numbers import share
from opdkit.reporting.run import RunContents

SHOWN = "context/share_"  # followed by the kinds of what the teacher was shown; of_...: a share of something else
NOTHING = f"{SHOWN}nothing"


def what_happened(run: RunContents) -> str | None:
    """None for a method that this opdkit does not know; the recipe is on the page all the same."""
    from pydantic import ValidationError

    from opdkit.methods import METHODS

    try:
        method = METHODS[run.setting("method", "name")].model_validate(dict(run.recipe["method"]))
    except (KeyError, TypeError, ValidationError):
        return None
    words = {
        "dataset": "In each step the student learned from answers that came with the problems.",
        "teacher": "In each step the student learned from answers that the teacher had written.",
    }
    return " ".join([words.get(method.answer_source) or _on_policy(run, method), *_exceptions(run), *_shown(run)])


def total(run: RunContents, name: str) -> float:
    """Sum of a metric over the steps that have it."""
    return sum(number(line, name) or 0.0 for line in run.metrics)


def silent_answers(run: RunContents) -> float:
    """Answers that the teacher should have scored and did not."""
    return total(run, "teacher/num_rows_without_view") + total(run, "teacher/num_rows_too_long")


def _on_policy(run: RunContents, method: Method) -> str:
    num_answers = total(run, "rollout/num_rows")
    done, sources = ["In each step the student wrote answers"], []
    if method.needs.views:
        scored = not num_answers or silent_answers(run) < num_answers
        done.append("a teacher scored every token of them" if scored else "a teacher was to score them and could not")
        sources += ["scores"] if scored else []
    if method.needs.reward:
        graded = not num_answers or total(run, "rollout/num_ungraded") < num_answers
        done.append("a grader rewarded them" if graded else "no grader could reward them")
        told_apart = not method.compares_rewards or not run.metrics or any(map(_has_two_rewards, run.metrics))
        sources += ["rewards"] if graded and told_apart else []
    nothing = run.metrics and total(run, "train/num_steps_without_gradient") == len(run.metrics)
    learned = f"it learned from the {' and the '.join(sources)}" if sources and not nothing else "it learned nothing"
    return f"{', '.join(done)}, and {learned}."


def _has_two_rewards(line: object) -> bool:
    """Whether answers to some problem of the step had different rewards, or it is not known."""
    return not isinstance(line, dict) or line.get("rollout/share_of_groups_with_one_reward") != 1


def _exceptions(run: RunContents) -> Iterator[str]:
    num_answers, silent = total(run, "rollout/num_rows"), silent_answers(run)
    if 0 < silent < num_answers:
        yield f"The teacher did not score {share(silent, num_answers)} answers."
    nothing = total(run, "train/num_steps_without_gradient")
    if 0 < nothing < len(run.metrics):
        yield f"It learned nothing in {share(nothing, len(run.metrics))} steps."


def _shown(run: RunContents) -> Iterator[str]:
    """What stood beside the problem, over all answers of the run."""
    lines = [line for line in run.metrics if NOTHING in line]
    if not lines:
        return
    names = {name for line in lines for name in line if name.startswith(SHOWN) and not name.startswith(f"{SHOWN}of_")}
    answers = [number(line, "rollout/num_rows") or 0.0 for line in lines]
    shown = {
        name: sum((number(line, name) or 0.0) * count for line, count in zip(lines, answers, strict=True))
        for name in names
    }
    told = sorted(((count, name.removeprefix(SHOWN)) for name, count in shown.items() if count), reverse=True)
    parts = [f"{name} for {share(count, sum(answers))} answers" for count, name in told]
    yield f"Beside the problem the teacher was shown: {'; '.join(parts)}."
