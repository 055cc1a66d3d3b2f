"""Conversations as other systems lay them out -> the chat turns to be answered, and the answer that stands behind them.

    messages        [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]    as OpenAI's API and TRL
    conversations   [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]  ShareGPT
    instruction     with `input` and `output`, and perhaps `history` [[asked, answered]]   Alpaca

The last turn is the answer if it is the assistant's; all turns before it are what is asked. An Alpaca input stands in
the line behind its instruction. Tools cannot be rendered, so rows with tools are none that can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opdkit.data.files.formats import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.media import text_of_parts
from opdkit.types import Message

CONVERSATIONS = ("messages", "conversations", "instruction")  # columns, tried in this order
BESIDE = ("input", "output", "history", "tools")  # what is read beside them
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Conversation(NamedTuple):
    asked: tuple[Message, ...]  # ends with a user turn
    answer: str | None


def chat_turns(prompt: Any) -> tuple[Message, ...]:
    """A list of {role, content}, or ShareGPT's {from, value}. Raises Unusable."""
    if not isinstance(prompt, list):
        raise Unusable(f"the prompt is {type(prompt).__name__}, neither text nor a list of chat turns")
    return tuple(_turn(turn) for turn in prompt)


def asked_of(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, if the user's is the last. Raises Unusable."""
    if not turns or turns[-1]["role"] != "user":
        last = f"the last turn is the {turns[-1]['role']}'s" if turns else "there is no turn"
        raise Unusable(f"the prompt does not end with a user turn: {last}")
    return tuple(turns)


def conversation(turns: Sequence[Message]) -> Conversation:
    """Without a last turn of the assistant, which is the answer. Raises Unusable."""
    if turns and turns[-1]["role"] == "assistant":
        return Conversation(asked_of(turns[:-1]), turns[-1]["content"])
    return Conversation(asked_of(turns), None)


def alpaca(row: Row) -> Conversation:
    """Raises Unusable."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("history is not a list of pairs, asked and answered")
    turns = [
        {"role": role, "content": as_text(said, "history")}
        for pair in history
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    question = as_text(row["instruction"], "instruction")
    if row.get("input"):
        question = f"{question}\n{as_text(row['input'], 'input')}"
    answer = as_text(row["output"], "output") if row.get("output") else None
    return Conversation((*turns, {"role": "user", "content": question}), answer)


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable(f"a chat turn of the prompt is {type(turn).__name__}, not a role and a content")
    names = ("from", "value") if turn.get("role") is None and turn.get("from") is not None else ("role", "content")
    role, content = (turn.get(name) for name in names)
    extra = sorted(name for name, value in turn.items() if name not in names and value is not None)
    if extra:
        raise Unusable(f"a chat turn of the prompt has {', '.join(extra)}; only role and content can be rendered")
    if role is None or content is None:
        raise Unusable("a chat turn of the prompt lacks a role or a content")
    role = as_text(role, "role")
    text = as_text(text_of_parts(content), "content")
    return {"role": _ROLES.get(role, role) if names[0] == "from" else role, "content": text}


def as_text(value: Any, what: str) -> str:
    """A text, or a number as text. Refuses what cannot be written as UTF-8, which no tokenizer could read."""
    if value is None:
        raise Unusable(f"the {what} is missing")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise Unusable(f"the {what} is bytes that are not UTF-8") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # pandas turns a column of integers with a hole in it into 42.0
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise Unusable(f"the {what} is {type(value).__name__}, not text")
    text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Unusable(f"the {what} holds half a surrogate pair, which is not valid Unicode") from None
    if not text.strip():
        raise Unusable(f"the {what} is blank")
    return text
