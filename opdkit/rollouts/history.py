"""An episode as messages: what a server that uses the chat template would be sent of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from opdkit.contexts.suffix import Suffixes
from opdkit.rollouts.environments.base import Action, Turn
from opdkit.rollouts.tools import CallFormat, parse_calls
from opdkit.types import Message

_END_OF_THOUGHT = "</think>"


def messages_of(turns: Sequence[Turn], calls: CallFormat | None, *, in_thought: bool) -> list[Message]:
    """Every turn of the model and what was said to it, in order. in_thought: the prompt had opened the thought."""
    said: list[Message] = []
    for turn in turns:
        said.append(assistant_message(turn.action, calls, in_thought=in_thought))
        said += turn.step.messages if turn.step is not None else ()
    return said


def told_anew(history: Sequence[Message], suffixes: Suffixes, max_tokens: int) -> tuple[Message, ...]:
    """What an environment says was said, as the chat template is given it. What is not the model's is hostile, and of
    each such thing the model reads `max_tokens` tokens at most."""
    said: list[Message] = []
    for is_own, messages in groupby(history, key=lambda message: message["role"] == "assistant"):
        if is_own:
            said += messages
            continue
        texts = [(message, suffixes.shown(str(message["content"]), max_tokens).text) for message in messages]
        said += suffixes.as_role([{**message, "content": suffixes.renderer.torn(text)} for message, text in texts])
    return tuple(said)


def assistant_message(action: Action, calls: CallFormat | None, *, in_thought: bool) -> Message:
    """A turn as a server reads it: its thought, its words, and its calls apart. Where a call cannot be read, and in
    gpt-oss's format, whose channels are no text, the turn stays as it was written."""
    text = f"<think>\n{action.text}" if in_thought else action.text
    if not action.calls or calls is None or any(call.fault for call in action.calls):
        return {"role": "assistant", "content": text}
    said = parse_calls(action.text, calls, in_thought=in_thought, turn=action.turn).said
    thought, closed, _ = text.rpartition(_END_OF_THOUGHT)
    content = f"{thought}{closed}\n\n{said}" if closed else said
    made: list[dict[str, Any]] = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments or {})}}
        for call in action.calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}
