"""Which sampled answers are not worth learning from. Text in, a reason out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from opdkit.types import Rollout

Rule = Literal["truncated", "no_answer", "wrong", "repetition"]
RULES: tuple[Rule, ...] = ("truncated", "no_answer", "wrong", "repetition")

LINE_CHARS, LINE_TIMES = 20, 5  # a line of at least so many characters, so many times
WINDOW_CHARS, WINDOW_TIMES = 100, 3  # any stretch of text, so many times


def rejected_by(
    rollout: Rollout, turns: Sequence[str], rules: tuple[Rule, ...], *, has_finals: bool = True
) -> Rule | Literal["empty", "failure"] | None:
    """The first of `rules`, in the order of `RULES`, that the answer breaks; None if it may be kept.

    truncated   it ran into the token limit, an episode into any limit
    no_answer   the grader found no final answer in it; broken by none without `has_finals`, where nobody looks for one
    wrong       its reward is below 1; an ungraded answer is not known to be right, so it is rejected too
    repetition  the same long line 5 times, or the same 100 characters 3 times (thunlp/OPD's cold start, which samples
                windows every 10 characters and misses periods that 10 does not divide; here every window counts)

    An episode whose environment failed is a "failure", and an answer that ends without any text is "empty", under all
    rules: there is nothing to learn from them. turns: what the model wrote, of one turn or several.
    """
    if rollout.ended == "failure":
        return "failure"
    if not turns or not turns[-1].strip():
        return "empty"
    broken: dict[Rule, bool] = {
        "truncated": rollout.finish == "length" or rollout.ended not in ("answer", "done"),
        "no_answer": has_finals and rollout.parsed is None,
        "wrong": rollout.reward is None or rollout.reward < 1.0,
        "repetition": "repetition" in rules and any(map(repeats, turns)),
    }
    return next((rule for rule in RULES if rule in rules and broken[rule]), None)


def repeats(text: str) -> bool:
    """Whether a text goes round in circles."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) >= LINE_CHARS)
    if lines and max(lines.values()) >= LINE_TIMES:
        return True
    windows = Counter(text[start : start + WINDOW_CHARS] for start in range(len(text) - WINDOW_CHARS + 1))
    return bool(windows) and max(windows.values()) >= WINDOW_TIMES
