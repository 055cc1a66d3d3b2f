"""What the model wrote of an answer, apart from what an environment said to it.

Graders read the last of its turns: a tool that prints the right answer earns nothing. Peers and feedback are shown as
transcripts. An answer of one turn is that turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from opdkit.contexts.base import Cut, Reader
from opdkit.errors import UserError
from opdkit.types import AUTHORS, Message, Rollout

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
    lines, num_cut = [], 0

    def heard(message: Message) -> None:
        nonlocal num_cut
        shown, left_out = cut(str(message["content"]), OBSERVATION_TOKENS)
        who = f"Tool {message['name']}" if message["role"] == "tool" else "User"
        lines.append(f"{who}: {shown}")
        num_cut += left_out

    for message in rollout.history:  # what was said before this row's turns
        if message["role"] == "assistant":
            lines.append(f"Assistant: {_with_calls(message, said)}")
        else:
            heard(message)
    turns = [said(reader.answer_text(ids)) for ids in model_turns(rollout)]
    if not rollout.turns:
        return "".join(turns[-1:]), 0
    for text, record in zip(turns, rollout.turns, strict=False):  # a turn that was cut before its first token is none
        lines.append(f"Assistant: {text.strip()}")
        for message in record.messages:
            heard(message)
    return reader.torn("\n".join(lines)), num_cut


def _with_calls(message: Message, said: Callable[[str], str]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    called = [f"{one['name']}({json.dumps(one['arguments'])})" for one in calls]
    return "\n".join([said(str(message["content"])).strip(), *called]).strip()


def whole_episodes(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """One row of each episode, its last, which says what came before it."""
    return list({(rollout.problem_id, rollout.episode_id): rollout for rollout in rollouts}.values())


def check_one_turn(rollouts: Iterable[Rollout], who: str) -> None:
    """Raises UserError for episodes, of which `who` would read another history than the model did."""
    if any(rollout.turns for rollout in rollouts):
        raise UserError(
            f"{who} reads answers of one turn, and these are episodes; `opdkit episodes` and `opdkit report` show them"
        )
