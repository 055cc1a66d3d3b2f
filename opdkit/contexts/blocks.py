"""Blocks of text, and the wording that joins them to the question: how it is said, not who is shown.

A wording is a layout with one place for each kind of block, and one item for each kind. Only `{names}` that are listed
here are places; every other brace is text, and what stands in a block is never searched for places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from opdkit.tasks.final_text import final_channel
from opdkit.types import Message

BlockKind = Literal["success", "another", "failure", "summary", "failed_summary", "feedback"]

# Where the layout shows a block of each kind.
PLACES: dict[BlockKind, str] = {
    "success": "{success}",
    "another": "{another}",
    "failure": "{failure}",
    "summary": "{summaries}",
    "failed_summary": "{summaries}",
    "feedback": "{feedback}",
}
_PLACE = re.compile("|".join(re.escape(place) for place in sorted({"{question}", *PLACES.values()})))
_SPACE = re.compile(r"\s*")
_SUMMARY_CHARACTERS = 300  # of an answer without a summary of its own; SDPO's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One piece of evidence."""

    kind: BlockKind
    text: str
    source: tuple[str, int] | None = None  # (problem_id, sample_id) of the peer who wrote it; None: nobody's answer
    num_truncated_tokens: int = 0


class Wording(BaseModel):
    """How blocks are introduced. The defaults are SDPO's and MOPD's, character for character (`published`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Where each part stands; a part that is not shown is empty.
    layout: str = "{question}{success}{summaries}{another}{failure}{feedback}\n\nCorrectly solve the original question."
    success: str = "\nCorrect solution:\n\n{text}"  # the first right answer
    another: str = "\nAnother successful solution:\n\n{text}"  # every success slot after the first
    failure: str = "\nA known failed solution (avoid repeating this mistake):\n\n{text}"  # a wrong answer
    # The grader's, on the answer itself.
    feedback: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}"
    summary: str = "\nSummary of another successful solution:\n\n{text}\n\n"  # of a right answer
    failed_summary: str = "\nSummary of another unsuccessful solution:\n\n{text}\n\n"  # of a wrong answer

    @model_validator(mode="after")
    def _each_place_once(self) -> Self:
        for place in _PLACE.findall(self.layout):
            if self.layout.count(place) > 1:
                raise ValueError(f"wording.layout has {place} twice; name every place once")
        if "{question}" not in self.layout:
            raise ValueError("wording.layout has no {question}; add it where the problem itself is asked")
        for kind in PLACES:
            if getattr(self, kind).count("{text}") != 1:
                raise ValueError(f"wording.{kind} must have {{text}} once, where the text is shown")
        return self

    def compose(self, question: Sequence[Message], blocks: Sequence[Block]) -> tuple[Message, ...]:
        """The chat turns of the problem, the last one laid out with the blocks. Blocks of a kind keep their order."""
        shown = dict.fromkeys(PLACES.values(), "")
        for block in blocks:
            shown[PLACES[block.kind]] += getattr(self, block.kind).replace("{text}", block.text)
        *earlier, last = question
        shown["{question}"] = last["content"]
        return (*earlier, {**last, "content": _PLACE.sub(lambda place: shown[place[0]], self.layout)})


# The published code says it in two ways: in the settings its scripts read, and in the defaults behind them, which its
# teacher-signal analysis used.
WORDINGS = {
    "published": Wording(),
    "published_dataclass": Wording(
        layout="{question}{success}{summaries}{another}{failure}{feedback}\n\nCorrectly solve the original question.\n",
        success="\nCorrect solution:\n\n{text}\n\n",
        another="\nAnother successful solution:\n\n{text}\n\n",
        failure="\nA known failed solution (avoid repeating this mistake):\n\n{text}\n\n",
        feedback="\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}\n\n",
    ),
}


def without_thinking(text: str) -> str:
    """The text without each `<think>...</think>` and the white space behind it. A thought never closed stays.

    Of an answer in gpt-oss's format, what it says to the reader (`final_channel`).

    A scan, not one regular expression: an answer of nothing but `<think>` would take quadratic time.
    """
    text = final_channel(text)
    kept, at = [], 0
    while (start := text.find("<think>", at)) >= 0 and (end := text.find("</think>", start)) >= 0:
        kept.append(text[at:start])
        space = _SPACE.match(text, end + len("</think>"))
        assert space is not None  # it matches the empty string
        at = space.end()
    return "".join([*kept, text[at:]])


def summary_of(text: str, tag: str) -> str:
    """What stands in the first `<tag>...</tag>`; of an answer without, the first 300 characters (as published)."""
    _, opened, rest = text.partition(f"<{tag}>")
    inside, closed, _ = rest.partition(f"</{tag}>")
    return inside.strip() if opened and closed else text[:_SUMMARY_CHARACTERS].strip()
