"""Tool calls in a text, and when two of them are the same. Linear in the text and bounded in depth: it is hostile.

Three ways of writing calls are read:

    Action: getWeather                      <tool_call>                              {"name": "getWeather",
    Action Input: {"city": "Oslo"}          {"name": "getWeather",                    "arguments": {"city": "Oslo"}}
                                             "arguments": {"city": "Oslo"}}
                                            </tool_call>
    ReAct, ToolAlpaca                       Hermes, Qwen                             JSON, alone or in a list
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

MAX_DEPTH = 32  # of JSON inside JSON; no tool asks for more
MAX_CALLS = 256  # that are read of one answer
MAX_NAME_CHARACTERS = 200
_MAX_DIGITS = 400  # of an integer; Python's own limit is an error in the middle of a text
_MAX_ATTEMPTS = 64  # at finding JSON in an answer without marks

_MARK = re.compile(r"(?<!\w)Action(?P<input>[ _]Input)?\**:\**")
_BEFORE_A_MARK = re.compile(r"[^\w\n]*(?:\d{1,3}[.)][^\w\n]*)?")  # of its line: "- ", "2. **"
_MAX_BEFORE = 80  # characters
_WHOLE_CALL = re.compile(r"Action\**:\**[ \t]*\S{1,200}+\s[^\w{]{0,40}Action[ _]Input\**:[^\w{]{0,40}(?:json\s)?\s*\{")
_TOOL_CALL = re.compile(r"<(?P<close>/?)tool_call>")
_JSON_FOLLOWS = re.compile(r"\s*[{\[]")
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_INLINE_FENCE = re.compile(r"```[\w-]*\s*")
_JSON_START = re.compile(r"^[ \t]*(?=[{\[])|(?=\{\s*\"(?:name|function)\"\s*:)", re.MULTILINE)
_SPACE = re.compile(r"\s*")
_CALL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_MARKS = "`*\"' \t\r"
_NAMES, _ARGUMENTS = ("name", "Action", "action"), ("arguments", "Action_Input", "Action Input", "parameters", "args")


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `fault`: why its arguments cannot be read; a tool would refuse it. `id`: by which its result is
    named, in episodes."""

    name: str
    arguments: dict[str, Any] | None
    fault: str | None = None
    id: str = ""


class Unreadable(ValueError):
    """Not a list of tool calls; the message says why."""


def calls_in(text: str) -> list[Call]:
    """The calls of an answer, in order, however it writes them. Empty if there are none."""
    if any(not tag["close"] for tag in _tags(text)):
        return list(islice(_tagged_calls(text), MAX_CALLS))
    return list(islice(_action_calls(text), MAX_CALLS)) or _json_calls(text)


def gold_calls(text: str) -> list[Call]:
    """The calls of a gold answer, a JSON list of them. Raises Unreadable."""
    calls = calls_of(decode_all(text.strip()))
    if calls is None:
        raise Unreadable("it is no list of objects with a name and arguments")
    for call in calls:
        if call.fault:
            raise Unreadable(f"the arguments of {call.name} cannot be read: {call.fault}")
    return calls


def same(value: Any, *, tolerant: bool) -> Hashable:
    """A key that is equal for equal JSON values: key order is free, 1 is 1.0, and true is not 1.

    tolerant: text that reads as a number, true, false or null is that value, and white space around text is free.
    """
    if value is None or isinstance(value, bool):
        return ("literal", value)
    if isinstance(value, int | float):
        return ("number", value)
    if isinstance(value, dict):
        return ("object", frozenset((name, same(item, tolerant=tolerant)) for name, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(same(item, tolerant=tolerant) for item in value))
    text = value.strip() if tolerant else value
    if tolerant and len(text) <= _MAX_DIGITS and not text.startswith(("{", "[", '"')):
        try:
            return same(decode_all(text), tolerant=True)
        except Unreadable:
            pass
    return ("text", text)


def _tagged_calls(text: str) -> Iterator[Call]:
    """What stands in `<tool_call>` tags; one that is left open at the end was cut off, unless its JSON is whole."""
    start: int | None = None
    for tag in _tags(text):
        if tag["close"] and start is not None:
            yield from _block_calls(text[start : tag.start()])
            start = None
        elif not tag["close"]:
            start = tag.end()
    if start is not None:
        yield from _block_calls(text[start:])


def _tags(text: str) -> Iterator[re.Match[str]]:
    """A tag that only a sentence names opens nothing: it begins its line, or JSON follows."""
    for tag in _TOOL_CALL.finditer(text):
        if tag["close"] or not _before(text, tag.start()).strip() or _JSON_FOLLOWS.match(text, tag.end()):
            yield tag


def _before(text: str, position: int) -> str:
    """What stands before it in its line; of a long line, the beginning, which is more than marks."""
    start = text.rfind("\n", max(0, position - _MAX_BEFORE), position) + 1
    return text[start:position] if start or position <= _MAX_BEFORE else "..., a sentence"


def _block_calls(block: str) -> list[Call]:
    try:
        calls = calls_of(decode_all(block.strip()))
    except Unreadable as error:
        return [Call("", None, str(error))]
    return [Call("", None, "it has no name and arguments")] if calls is None else calls


def _action_calls(text: str) -> Iterator[Call]:
    """`Action: NAME`, each with the `Action Input:` that follows it; without one, it has no arguments.

    A mark begins its line, or follows the name or input before it; inside a sentence only a whole call is one, not what
    is thought about ("Thought: Action: guess would be risky")."""
    position, name = 0, None
    while mark := _next_mark(text, position):
        position = mark.end()
        if not mark["input"]:
            if name is not None:
                yield Call(name, {})
            line = _rest_of_line(text, position)
            inline = _MARK.search(line)
            name = line[: inline.start() if inline else None].strip(_NAME_MARKS)
            position += inline.start() if inline else len(line)
        elif name is not None:
            call, position = _with_input(name, text, position)
            yield call
            name = None
    if name is not None:
        yield Call(name, {})


def _next_mark(text: str, position: int) -> re.Match[str] | None:
    for mark in _MARK.finditer(text, position):
        follows = mark.start() - position < _MAX_BEFORE and not re.search(r"[\w\n]", text[position : mark.start()])
        if follows or _BEFORE_A_MARK.fullmatch(_before(text, mark.start())) or _WHOLE_CALL.match(text, mark.start()):
            return mark
    return None


def _rest_of_line(text: str, start: int) -> str:
    return text[start : start + MAX_NAME_CHARACTERS].partition("\n")[0]


def _with_input(name: str, text: str, start: int) -> tuple[Call, int]:
    """The call, and where its input ends."""
    position = _after(_INLINE_FENCE, text, _after(_SPACE, text, start))
    if text[position : position + 1] != "{":
        line = _rest_of_line(text, start).strip(_NAME_MARKS)
        is_empty = not line or line in ("None", "null")
        return (Call(name, {}) if is_empty else Call(name, None, "it is not a JSON object")), start
    try:
        value, end = decode(text, position)
    except Unreadable as error:
        newline = text.find("\n", position)
        return Call(name, None, str(error)), len(text) if newline < 0 else newline
    return Call(name, value), end


def _json_calls(text: str) -> list[Call]:
    """JSON calls without marks: in the last fenced block that has some, else on lines that begin with them."""
    fences = list(_FENCE.finditer(text))[-2 * _MAX_ATTEMPTS :]
    for opening, closing in reversed(list(pairwise(fences))):
        calls = _values_calls(text[opening.end() : closing.start()])
        if calls:
            return calls
    return _values_calls(text)


def _values_calls(text: str) -> list[Call]:
    """All JSON values that begin a line (or with a name) and are calls; few attempts: each may read to the end."""
    calls: list[Call] = []
    position, attempts = 0, 0
    while attempts < _MAX_ATTEMPTS and len(calls) < MAX_CALLS and (line := _JSON_START.search(text, position)):
        attempts += 1
        try:
            value, position = decode(text, line.end())
        except Unreadable:
            newline = text.find("\n", line.end())
            position = len(text) if newline < 0 else newline
        else:
            calls += calls_of(value) or []
    return calls


def calls_of(value: Any) -> list[Call] | None:
    """The calls that a JSON value is; None if it is none."""
    if isinstance(value, list):
        found = [calls_of(item) for item in value]
        return None if any(calls is None for calls in found) else [call for calls in found for call in calls or []]
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("tool_calls"), list):  # an OpenAI message
        return calls_of(value["tool_calls"])
    call_id = value.get("id")
    if isinstance(value.get("function"), dict):  # and one of its calls
        value = value["function"]
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    if name is None:
        return None
    arguments: Any = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = decode_all(arguments.strip() or "{}")
        except Unreadable as error:
            return [Call(name, None, str(error))]
    if arguments is None:
        arguments = {}
    fault = None if isinstance(arguments, dict) else "they are not a JSON object"
    named = call_id if isinstance(call_id, str) and _CALL_ID.fullmatch(call_id) else ""
    return [Call(name, arguments if fault is None else None, fault, named)]


def decode_all(text: str) -> Any:
    """The one JSON value of a text. Raises Unreadable: also for what is too deep, too large or said twice."""
    value, end = decode(text, 0)
    if text[end:].strip():
        raise Unreadable("something follows the JSON")
    return value


def decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends. Raises Unreadable."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Unreadable(f"it is not valid JSON ({error.msg})") from None
    except RecursionError:
        raise Unreadable(f"it is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise Unreadable(str(error)) from None
    if _is_deep(value):
        raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")
    return value, end


def _is_deep(value: Any) -> bool:
    """A loop, since what it looks for would be too deep for a recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("it holds a number that is too large")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which JSON has not")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_no_constant
)


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start
