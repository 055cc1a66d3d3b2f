"""What a recipe says of a run's numbers in words: which evaluation is the best, and when enough is learned.

train.keep_best = "eval/gsm8k/avg_at_n"
train.stop_when = ["eval/gsm8k/avg_at_n >= 0.8", "eval/gsm8k/avg_at_n stalls for 5", "train/loss < 0.01 for 3"]
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Quantity of an evaluation -> whether more of it is better.
BETTER: Mapping[str, bool] = {
    "avg_at_n": True,
    "maj_at_n": True,
    "format_rate": True,
    "forward_kl": False,
    "reverse_kl": False,
}
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_NAME = r"(?P<name>[\w.@+-]+(?:/[\w.@+-]+)+)"
_LIMIT = re.compile(rf"{_NAME}\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[-+.\deE]+)(?:\s+for\s+(?P<times>[1-9]\d*))?")
_STALLS = re.compile(rf"{_NAME}\s+stalls\s+for\s+(?P<times>[1-9]\d*)")
_FORMS = (
    'write "METRIC >= NUMBER" (or <=, <, >; "... for 3": three times in a row), or "eval/SET/QUANTITY stalls for 5"'
)


@dataclass(frozen=True, slots=True)
class Condition:
    """sign and value; or None: that no value is better than the best one before the last `times`."""

    text: str
    name: str
    times: int
    sign: str | None = None
    value: float = 0.0

    def holds(self, values: Sequence[float]) -> bool:
        """values: of the metric, in order, as far as they are known."""
        if self.sign is not None:
            last = values[-self.times :]
            return len(last) == self.times and all(_SIGNS[self.sign](value, self.value) for value in last)
        if len(values) <= self.times:
            return False
        best, is_better = (max, operator.gt) if is_more_better(self.name) else (min, operator.lt)
        return not is_better(best(values[-self.times :]), best(values[: -self.times]))


def condition(text: str) -> Condition:
    """Raises ValueError for words that are none."""
    if found := _STALLS.fullmatch(text.strip()):
        if is_more_better(found["name"]) is None:
            raise ValueError(f"what stalls must be an evaluation of which more or less is better: {_quantities()}")
        return Condition(text, found["name"], int(found["times"]))
    found = _LIMIT.fullmatch(text.strip())
    try:
        value = float(found["value"]) if found else None
    except ValueError:
        value = None
    if found is None or value is None:
        raise ValueError(f"is no condition; {_FORMS}")
    return Condition(text, found["name"], int(found["times"] or 1), found["sign"], value)


def is_condition(text: str) -> str:
    condition(text)
    return text


def is_evaluation(name: str) -> str:
    """Raises ValueError unless the best of it can be chosen."""
    if is_more_better(name) is None:
        raise ValueError(f'is no number to choose by; write "eval/SET/QUANTITY", of {_quantities()}')
    return name


def is_more_better(name: str) -> bool | None:
    """Of an evaluation's metric; None: it cannot be said, or it is of no evaluation."""
    area, _, quantity = name.rpartition("/")
    if not area.startswith("eval/"):
        return None
    return True if re.fullmatch(r"pass_at_\d+", quantity) else BETTER.get(quantity)


def _quantities() -> str:
    return ", ".join(["pass_at_K", *BETTER])
