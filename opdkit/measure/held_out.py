"""How far a student is from its target on problems that it does not learn from: the numbers, and in words."""

from __future__ import annotations

from typing import Literal, TypedDict

from opdkit.measure.intervals import Estimate

KINDS: tuple[Literal["reverse_kl", "forward_kl"], ...] = ("reverse_kl", "forward_kl")


class HeldOut(TypedDict):
    """Nats a token: of each problem its tokens' mean, and of those the mean over problems with its 95 % interval."""

    reverse_kl: Estimate  # KL(student || target)
    forward_kl: Estimate  # KL(target || student)
    num_tokens: int  # that were compared
    num_rows: int
    num_rows_not_compared: int  # whose target says nothing: nothing to read, or more than its positions


def in_words(found: HeldOut) -> str:
    if not found["num_tokens"]:
        return f"the target says nothing of any of {found['num_rows']} answers"
    reverse, forward, silent = found["reverse_kl"], found["forward_kl"], found["num_rows_not_compared"]
    left_out = f" ({silent} of {found['num_rows']} answers not compared)" if silent else ""
    return f"KL(student || target) {_number(reverse)}, KL(target || student) {_number(forward)} nats a token{left_out}"


def _number(estimate: Estimate) -> str:
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.3g}" + ("" if low is None or high is None else f" [{low:.3g}, {high:.3g}]")
