"""Tool calls in what a model wrote, in the format that its chat template teaches it.

    hermes    <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>        Qwen 2.5 and 3, Hermes; within the tags
              also <function=f><parameter=x>1</parameter></function> (Qwen 3 Coder, 3.5)
    llama3    {"name": "f", "parameters": {"x": 1}}                              Llama 3.1: only if it is the whole turn
    mistral   [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]                also [TOOL_CALLS]f[ARGS]{"x": 1}
    harmony   <|channel|>commentary to=functions.f<|message|>{"x": 1}<|call|>    gpt-oss

A call inside a thought is none, and a call that breaks off is malformed: it is answered with a sentence, and counted.
Linear in the text, which is hostile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any, Literal, get_args

from opdkit.tasks.final_text import final_channel
from opdkit.tasks.tool_calls import MAX_CALLS, MAX_NAME_CHARACTERS, Call, Unreadable, calls_of, decode, decode_all

CallFormat = Literal["hermes", "llama3", "mistral", "harmony"]
CALL_FORMATS: tuple[CallFormat, ...] = get_args(CallFormat)

_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_BROKEN_OFF = "it breaks off"
_TOOL_CALL_OPENS = re.compile(r"^[ \t]*<tool_call>|<tool_call>(?=\s*[{\[<])", re.MULTILINE)  # a sentence names it only
_PYTHON_TAG = "<|python_tag|>"
_NAMED = re.compile(r"\{\s*\"name\"\s*:\s*\"([^\"]{1,200})\"")
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")  # Mistral's template refuses others, and a model may write any
_BETWEEN = re.compile(r"[\s;]*")
_HARMONY_BREAK = re.compile(r"<\|(?:call|end|return|start)\|>")
_HARMONY_HEADER = re.compile(r"\s*(?:assistant|to=|<\|channel\|>)")
_HARMONY_TO = re.compile(r"\bto=([\w.-]{1,200})")


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What a turn calls. calls: in order; one that cannot be read has a `fault`. said: the text around them, stripped,
    without the thought."""

    calls: tuple[Call, ...]
    said: str

    @property
    def malformed(self) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.fault is not None)


def parse_calls(text: str, call_format: CallFormat, *, in_thought: bool = False, turn: int = 0) -> ParsedTurn:
    """The calls of a turn that the model ended itself (a turn that was cut calls nothing).

    text: with its special tokens, without the stop token. in_thought: the prompt had opened the thought already. turn:
    goes into the ids of calls that name none, nine letters and digits as Mistral's template wants them.
    """
    spoken = text if call_format == "harmony" else _after_thought(text, in_thought)
    if spoken is None:
        return ParsedTurn((), "")
    found, said = _PARSERS[call_format](spoken)
    return ParsedTurn(tuple(_with_ids(found[:MAX_CALLS], turn)), said.strip())


def _with_ids(calls: Sequence[Call], turn: int) -> Iterator[Call]:
    """Each has one of its own: what the model called it, where that is nine letters and digits, or one of ours."""
    taken: set[str] = set()
    for place, call in enumerate(calls):
        ours = (f"t{turn % 10_000:04d}c{number:03d}" for number in count(place))
        named = [call.id] if _CALL_ID.fullmatch(call.id) else []
        own = next(one for one in chain(named, ours) if one not in taken)
        taken.add(own)
        yield replace(call, id=own)


def _after_thought(text: str, in_thought: bool) -> str | None:
    """What is said and called. None: the thought never ends."""
    for opened, closed in _THOUGHTS:
        _, found, rest = text.rpartition(closed)
        if found:
            return rest.partition(opened)[0]
    if in_thought:
        return None
    for opened, _ in _THOUGHTS:
        text = text.partition(opened)[0]
    return text


def _hermes(text: str) -> tuple[list[Call], str]:
    calls: list[Call] = []
    said, *blocks = _TOOL_CALL_OPENS.split(text)
    for block in blocks:
        inside, closed, behind = block.partition("</tool_call>")
        calls += _block_calls(inside.strip(), whole=bool(closed))
        said += behind
    return calls, said


def _block_calls(block: str, *, whole: bool) -> list[Call]:
    """What stands in the tags. One that is not closed is whole where its JSON is."""
    if block.startswith("<function="):
        return [_tagged_call(block)]
    try:
        calls = calls_of(decode_all(block))
    except Unreadable as error:
        return [Call(_name_in(block), None, str(error) if whole else _BROKEN_OFF)]
    return calls or [Call("", None, "it has no name and arguments")]


def _tagged_call(block: str) -> Call:
    """A value is text, or JSON where it reads as some."""
    header, opened, rest = block.removeprefix("<function=").partition(">")
    name = header.strip()
    body, closed, _ = rest.rpartition("</function>")
    if not opened or not closed:
        return Call(name[:MAX_NAME_CHARACTERS], None, _BROKEN_OFF)
    arguments: dict[str, Any] = {}
    for part in body.split("<parameter=")[1:]:
        key, opened, value = part.partition(">")
        value, closed, _ = value.rpartition("</parameter>")
        if not opened or not closed:
            return Call(name, None, _BROKEN_OFF)
        arguments[key.strip()] = _value_of(value.removeprefix("\n").removesuffix("\n"))
    return Call(name, arguments)


def _value_of(text: str) -> Any:
    try:
        return decode_all(text)
    except Unreadable:
        return text


def _llama3(text: str) -> tuple[list[Call], str]:
    """Bare JSON, which a sentence around it makes an example."""
    body, marked = text.strip(), text.strip().startswith(_PYTHON_TAG)
    body = body.removeprefix(_PYTHON_TAG).strip()
    if not body.startswith("{") and not marked:
        return [], text
    calls: list[Call] = []
    position = 0
    while position < len(body):
        try:
            value, position = decode(body, position)
        except Unreadable as error:
            is_call = marked or calls or _NAMED.match(body)  # a set in braces is mathematics
            return ([*calls, Call(_name_in(body[position:]), None, str(error))], "") if is_call else ([], text)
        found = calls_of(value) if marked or {"parameters", "arguments"} & value.keys() else None
        if found is None:
            return ([*calls, Call("", None, "it has no name and parameters")], "") if marked or calls else ([], text)
        calls += found
        position = _BETWEEN.match(body, position).end()  # type: ignore[union-attr]  # it matches nothing, too
        if position < len(body) and body[position] != "{":
            return [], text  # words follow
    return calls, ""


def _mistral(text: str) -> tuple[list[Call], str]:
    calls: list[Call] = []
    said, *blocks = text.split("[TOOL_CALLS]")
    for block in blocks:
        header, named, arguments = block.partition("[ARGS]")
        if named:
            name, _, call_id = header.partition("[CALL_ID]")
            calls.append(replace(_with_arguments(name.strip(), arguments), id=call_id.strip()))
        else:
            calls += _block_calls(block.strip(), whole=False)
    return calls, said


def _harmony(text: str) -> tuple[list[Call], str]:
    """A message to a function is a call on any channel but the thought's end; what is said is the channel `final`."""
    calls: list[Call] = []
    for message in _HARMONY_BREAK.split(text):
        header, opened, body = message.partition("<|message|>")
        to = _HARMONY_TO.search(header) if opened or _HARMONY_HEADER.match(header) else None
        if to is None:
            continue
        name = to[1].removeprefix("functions.")
        calls.append(_with_arguments(name, body) if opened else Call(name, None, _BROKEN_OFF))
    return calls, "" if calls else final_channel(text)


def _with_arguments(name: str, text: str) -> Call:
    try:
        value = decode_all(text.strip() or "{}")
    except Unreadable as error:
        return Call(name[:MAX_NAME_CHARACTERS], None, str(error))
    is_object = isinstance(value, dict)
    return Call(
        name[:MAX_NAME_CHARACTERS], value if is_object else None, None if is_object else "it is not a JSON object"
    )


def _name_in(text: str) -> str:
    """The name in JSON that cannot be read, for whoever is told of it."""
    found = _NAMED.search(text[:1000])
    return found[1] if found else ""


_PARSERS: Mapping[CallFormat, Callable[[str], tuple[list[Call], str]]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
    "harmony": _harmony,
}
