"""The part of an answer that is meant for the reader, and what stands in it. In linear time: the text is hostile."""

from __future__ import annotations

import re
from collections import deque

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
HARMONY_CHANNEL, _HARMONY_MESSAGE = "<|channel|>", "<|message|>"
_HARMONY_END = re.compile(r"<\|(?:end|return|call|start|channel|endoftext)\|>")
_FINAL = re.compile(r"\s*final\b")


def final_channel(text: str) -> str:
    """What an answer in gpt-oss's format (harmony) says to the reader: its last message on the channel `final`.

    "" where it has none: it was cut while it thought, or called a tool. Any other text comes back as it is.
    """
    if HARMONY_CHANNEL not in text or _HARMONY_MESSAGE not in text:
        return text
    said = ""
    for message in text.split(HARMONY_CHANNEL)[1:]:
        header, opened, body = message.partition(_HARMONY_MESSAGE)
        if opened and _FINAL.match(header) and not _HARMONY_END.search(header):
            said = _HARMONY_END.split(body, maxsplit=1)[0]
    return said


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; of thinking that never ends, what stands before it."""
    final = final_channel(text).rpartition(_THINK_CLOSE)[2]
    return final.partition(_THINK_OPEN)[0]


def last_tagged(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`, stripped; None if there is none."""
    start: int | None = None
    found: str | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()], None
    return None if found is None else found.strip()


def unclosed_tag(text: str) -> str | None:
    """What follows an `<answer>` that is the last tag and stays open, stripped."""
    last = deque(_TAG.finditer(text), maxlen=1)
    return text[last[0].end() :].strip() if last and not last[0][1] else None
