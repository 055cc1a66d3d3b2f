"""What the model wrote of an answer, apart from what an environment said to it.

Graders read the last of its turns: a tool that prints the right answer earns nothing. Peers and feedback are shown as
transcripts. An answer of one turn is that turn.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from opdkit.contexts.base import Cut, Reader
from opdkit.types import AUTHORS, Rollout

OBSERVATION_TOKENS = 128  # of each thing that an environment said, in a transcript
_TOOL = AUTHORS.index("tool")


def model_turns(rollout: Rollout) -> list[tuple[int, ...]]:
    """The ids of each turn of the model, in order, without a token that the environment wrote."""
    whose = zip(rollout.turn_numbers.tolist(), (rollout.authors == _TOOL).tolist(), rollout.answer_ids, strict=True)
    runs = groupby(whose, key=lambda one: one[:2])
    return [tuple(token for *_, token in run) for (_, is_tool), run in runs if not is_tool]


def last_turn(rollout: Rollout) -> tuple[int, ...]:
    """The ids that a grader reads."""
    return next(reversed(model_turns(rollout)), ())


def transcript(rollout: Rollout, reader: Reader, said: Callable[[str], str], cut: Cut) -> tuple[str, int]:
    """An answer as others are shown it, and how many tokens of observations were cut: of one turn what it says, of an
    episode every turn with its author in front. said: of a turn's text what is shown (without its thought)."""
    turns = [said(reader.answer_text(ids)) for ids in model_turns(rollout)]
    if not rollout.turns:
        return "".join(turns[-1:]), 0
    lines, num_cut = [], 0
    for text, record in zip(turns, rollout.turns, strict=False):  # a turn that was cut before its first token is none
        lines.append(f"Assistant: {text.strip()}")
        for message in record.messages:
            shown, left_out = cut(str(message["content"]), OBSERVATION_TOKENS)
            who = f"Tool {message['name']}" if message["role"] == "tool" else "User"
            lines.append(f"{who}: {shown}")
            num_cut += left_out
    return reader.torn("\n".join(lines)), num_cut
