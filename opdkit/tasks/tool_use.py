"""The tool-use task: the calls in an answer against the gold calls, as a multiset of (name, arguments) pairs.

    answer -> what is meant for the reader -> calls (`tool_calls.py`) -> the gold's calls, each as often, in any order

The gold is a JSON list of calls: {"Action", "Action_Input"} (ToolAlpaca), {"name", "arguments"} (Hermes), or OpenAI's
`tool_calls`; arguments as an object or as JSON text. ToolAlpaca's golds mark a call that depends on what an earlier one
returns as "[Optional]name": it may be made or left out, and its name may be written with or without the mark.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from opdkit.errors import UserError
from opdkit.tasks.base import Grade, Option, whole_text
from opdkit.tasks.final_text import after_thinking
from opdkit.tasks.tool_calls import Call, Unreadable, calls_in, gold_calls, same
from opdkit.types import Problem

FEEDBACK_MODES = ("outcome", "reveal")
MAX_FEEDBACK_CHARACTERS = 2000

_OPTIONAL = "[Optional]"
_MAX_PARSED_CHARACTERS = 4000
_NO_CALL = (
    "No tool call was found. Write each call as a line with Action: and the name of a tool, and a line with Action "
    "Input: and its arguments as a JSON object."
)


class _Gold(NamedTuple):
    key: Hashable
    name: str
    call: Call
    is_optional: bool


class ToolUseTask:
    """Scores 1.0 or 0.0. `parsed` is the calls as JSON with sorted keys: the same calls in one order are one vote."""

    name = "tool_use"
    needs_gold: ClassVar[bool] = True

    def __init__(
        self,
        *,
        ordered: Annotated[bool, Option("calls must come in the gold's order")] = False,
        tolerant: Annotated[bool, Option('"5" counts as 5 and "true" as true in arguments')] = False,
        feedback: Annotated[
            Literal["outcome", "reveal"], Option('"reveal" prints the gold calls, as published')
        ] = "outcome",
    ) -> None:
        if feedback not in FEEDBACK_MODES:
            raise UserError(f"tool_use feedback is {feedback!r}; choices: {', '.join(FEEDBACK_MODES)}")
        self._ordered, self._tolerant, self._reveal = ordered, tolerant, feedback == "reveal"

    @staticmethod
    def warnings(options: Mapping[str, Any]) -> list[str]:
        if options["feedback"] != "reveal":
            return []
        return [
            'feedback = "reveal" prints the gold calls, so a context that shows it gives the answer away (as published)'
        ]

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [self._grade(problem, text) for problem, text in items]

    def close(self) -> None:
        pass

    def _grade(self, problem: Problem, text: str) -> Grade:
        if problem.gold is None:
            return Grade(score=None, verdict="error", feedback="the problem has no gold answer")
        try:
            gold = _read_gold(problem.gold, self._tolerant)
        except Unreadable as error:
            return Grade(score=None, verdict="error", feedback=f"the gold answer cannot be used: {error}")
        calls = calls_in(after_thinking(text))
        if not calls and any(not call.is_optional for call in gold):
            return Grade(score=0.0, verdict="no_answer", feedback=_NO_CALL)
        keys = [_key(call, self._tolerant) for call in calls]
        right = _fits_in_order(keys, gold) if self._ordered else _fits(keys, gold)
        return Grade(
            score=float(right),
            verdict="correct" if right else "wrong",
            parsed=_parsed(calls),
            feedback=None if right else _revealed(calls, gold) if self._reveal else _feedback(calls, keys, gold),
        )


@lru_cache(maxsize=4096)
def _read_gold(gold: str, tolerant: bool) -> tuple[_Gold, ...]:
    """Raises Unreadable."""
    calls = gold_calls(gold)
    return tuple(_Gold(_key(c, tolerant), _bare_name(c), c, c.name.startswith(_OPTIONAL)) for c in calls)


def _bare_name(call: Call) -> str:
    return call.name.removeprefix(_OPTIONAL).strip()


def _key(call: Call, tolerant: bool) -> Hashable:
    """Equal for equal calls; a call whose arguments cannot be read equals none, not even itself."""
    if call.arguments is None:
        return object()
    return _bare_name(call), same(call.arguments, tolerant=tolerant)


def _fits(keys: Sequence[Hashable], gold: Sequence[_Gold]) -> bool:
    """Every call that must be made once, no other but optional ones."""
    left = list(keys)
    for call in sorted(gold, key=lambda call: call.is_optional):
        if call.key in left:
            left.remove(call.key)
        elif not call.is_optional:
            return False
    return not left


def _fits_in_order(keys: Sequence[Hashable], gold: Sequence[_Gold]) -> bool:
    reached = {0}  # how many calls of the answer may have been used up so far
    for call in gold:
        used = {n + 1 for n in reached if n < len(keys) and keys[n] == call.key}
        reached = used | (reached if call.is_optional else set())
    return len(keys) in reached


def _parsed(calls: Sequence[Call]) -> str:
    written = [{"name": call.name, "arguments": call.arguments, "fault": call.fault} for call in calls]
    kept = [{key: value for key, value in call.items() if value is not None} for call in written]
    return whole_text(json.dumps(kept, sort_keys=True, ensure_ascii=False))[:_MAX_PARSED_CHARACTERS]


def _feedback(calls: Sequence[Call], keys: Sequence[Hashable], gold: Sequence[_Gold]) -> str:
    """What is wrong with each call, in words that hold nothing of the gold that the answer does not hold itself."""
    lines = []
    left = [call.key for call in gold]
    names = {call.name for call in gold}
    for number, (call, key) in enumerate(zip(calls, keys, strict=True), start=1):
        if key in left:
            left.remove(key)
            continue
        if call.fault:
            reason = f"its input cannot be read, {call.fault}"
        elif key in {call.key for call in gold}:
            reason = "it was made already"
        else:
            reason = "its arguments are not the ones needed" if _bare_name(call) in names else "it is not needed here"
        lines.append(f"Call {number} ({call.name[:60] or 'without a name'}): {reason}.")
    if not lines:
        lines = ["A call is missing." if _lacks(keys, gold) else "The calls are not in the order needed."]
    return _cut("\n".join(lines))


def _lacks(keys: Sequence[Hashable], gold: Sequence[_Gold]) -> bool:
    left = list(keys)
    for call in gold:
        if call.key in left:
            left.remove(call.key)
        elif not call.is_optional:
            return True
    return False


def _revealed(calls: Sequence[Call], gold: Sequence[_Gold]) -> str:
    """The published sentences (SDPO, MOPD), which print the gold; here call by call, where they merge all inputs."""
    said_names, gold_names = [call.name for call in calls], [call.call.name for call in gold]
    parts = []
    if sorted(said_names) != sorted(gold_names):
        parts.append(f"Actions mismatch: predicted {said_names}, expected {gold_names}")
    said, wanted = [call.arguments for call in calls], [call.call.arguments for call in gold]
    if said != wanted:
        parts.append(f"Action inputs mismatch: predicted {said}, expected {wanted}")
    return _cut("; ".join(parts) or "The calls are not in the order needed.")


def _cut(text: str) -> str:
    text = whole_text(text)
    return text if len(text) <= MAX_FEEDBACK_CHARACTERS else text[: MAX_FEEDBACK_CHARACTERS - 4] + " ..."
