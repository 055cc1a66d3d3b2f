"""Where the model's own stream of tokens is not what its chat template would show of the same conversation.

An episode keeps every token as it was sampled. A template may show less of it later: many drop the thoughts of earlier
turns. Whoever serves the model through its template then asks it something else than it was trained on, which is said
before a run begins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from opdkit.contexts.suffix import Suffixes
from opdkit.errors import UserError
from opdkit.types import Message

_ASKED, _THOUGHT, _SAID, _TOLD = "What is 17*23?", "Xthought", "Xsaid", "391"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One kind of conversation: how many tokens differ between the stream and the template's rendering, and where the
    first of them is."""

    case: str
    num_tokens: int
    first: int | None


def drifts(suffixes: Suffixes, tools: Sequence[Mapping[str, Any]] = ()) -> list[Drift]:
    """Of a tool's result and of a new user turn, behind a turn of the model with and without a thought; a kind that the
    template refuses is missing. tools: none where the environment has none."""
    return [
        replace(compared(stream, rendered), case=case)
        for case, messages in _conversations(tools)
        if (both := _both(suffixes, messages)) is not None
        for stream, rendered in [both]
    ]


def compared(stream: Sequence[int], rendered: Sequence[int]) -> Drift:
    """num_tokens: of the longer of the two parts that a common beginning and a common end leave."""
    first = next((i for i, (a, b) in enumerate(zip(stream, rendered, strict=False)) if a != b), None)
    if first is None:
        shorter, longer = sorted((len(stream), len(rendered)))
        return Drift(case="", num_tokens=longer - shorter, first=None if longer == shorter else shorter)
    blocks = difflib.SequenceMatcher(None, stream[first:], rendered[first:], autojunk=False).get_matching_blocks()
    same = sum(block.size for block in blocks)
    return Drift(case="", num_tokens=max(len(stream), len(rendered)) - first - same, first=first)


def drift_warnings(suffixes: Suffixes, tools: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """One sentence, where they differ."""
    found = [drift for drift in drifts(suffixes, tools) if drift.num_tokens]
    if not found:
        return []
    listed = "; ".join(f"{one.case}: {one.num_tokens} tokens differ from {one.first} on" for one in found)
    return [
        f'episode.history = "keep": the model reads its own turns as it wrote them, and the chat template of '
        f"{suffixes.renderer.name} would show them otherwise ({listed}); a server that uses the template asks the "
        "model something else than it was trained on. Train and serve with a template that appends "
        '(model.chat_template), or set episode.history = "rerender"'
    ]


def _conversations(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Message]]]:
    for has_thought in (True, False):
        behind = "behind a thought" if has_thought else "behind a turn without a thought"
        said: dict[str, Any] = {"role": "assistant", "content": _SAID}
        if has_thought:
            said["content"] = f"<think>\n{_THOUGHT}\n</think>\n\n{_SAID}"
        asked = {"role": "user", "content": _ASKED}
        if tools:
            name = str(tools[0].get("function", tools[0]).get("name"))
            call = {"type": "function", "id": "call00000", "function": {"name": name, "arguments": {"x": _SAID}}}
            told = {"role": "tool", "name": name, "tool_call_id": "call00000", "content": _TOLD}
            yield f"a tool's result {behind}", [asked, {**said, "tool_calls": [call]}, told]
        yield f"a new user turn {behind}", [asked, said, {"role": "user", "content": _TOLD}]


def _both(suffixes: Suffixes, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(the stream, the template's rendering); None where the template or the tokenizer refuses the conversation."""
    renderer = suffixes.renderer
    said = suffixes.as_role(messages[2:])
    try:
        prompt = renderer.prompt_text(messages[:1])
        whole = renderer.history_text(messages[:2])
        rendered = renderer.prompt_ids([*messages[:2], *said])
        after, end = suffixes.after(None, messages[2:]), suffixes.end_behind(messages[2:])
        common = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(prompt, whole, strict=False)))
        words, _, rest = whole[common:].rpartition(_SAID)
        turn = words + _SAID + (rest.partition(end)[0] if end and end in rest else rest.rstrip("\n"))
        return (*renderer.encode(prompt), *renderer.encode(turn), *after.ids), rendered
    except UserError:  # or a tokenizer of few characters cannot read these
        return None
