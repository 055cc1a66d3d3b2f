"""What an environment said in an earlier run, said again: for tools that cost, or do not say the same twice.

    environment = { name = "replay", run = "runs/shop" }

Read from the rows of a run. A turn is answered as it was in an episode of the same problem that had the same results so
far and called the same tools, in the same order, with the reward that it had, and ends the episode where it did; what
was never called is answered with an error. A turn without a call ends the episode, as an answer: data.task grades it,
since a recorded reward would be of other words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Step, Tool
from opdkit.rollouts.environments.functions import message_of
from opdkit.tasks.base import Option
from opdkit.types import Message, Problem

_COLUMNS = ("problem_id", "sample_id", "episode", "messages", "tools", "turns", "ended")
_NOT_KNOWN = "error: nothing is recorded of this call here"


@dataclass(frozen=True, slots=True)
class _Recorded:
    prompt: tuple[Message, ...]
    tools: tuple[Tool, ...]
    turns: tuple[tuple[Message, ...], ...]  # what the environment said to each
    rewards: tuple[float | None, ...]  # of each
    ends: bool  # with the last of them, because the environment said so


class Replay:
    """Of a problem that the run did not have, the episode fails."""

    def __init__(self, run: Annotated[str, Option("the folder of a run with episodes in its rows")]) -> None:
        self._recorded = _read(Path(run).expanduser().resolve())
        first = next(iter(self._recorded.values()))[0]
        self.tools: Sequence[Tool] = first.tools
        self._left: list[_Recorded] = []  # episodes that went as this one has
        self._turn = 0

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        if problem.id not in self._recorded:
            raise LookupError(f"no episode of problem {problem.id} is recorded")
        self._left = list(self._recorded[problem.id])
        self.tools = self._left[0].tools
        return self._left[0].prompt

    def step(self, action: Action, seed: int) -> Step:
        if not action.calls:
            return Step(done=True)
        asked = [call.name for call in action.calls]
        fitting = [one for one in self._left if self._turn < len(one.turns) and _names(one.turns[self._turn]) == asked]
        if not fitting:
            return Step(messages=tuple(message_of(call, _NOT_KNOWN, "tool_error") for call in action.calls))
        like, said = fitting[0], fitting[0].turns[self._turn]
        self._left = [one for one in fitting if one.turns[self._turn] == said]
        reward = like.rewards[self._turn]
        self._turn += 1
        results = iter(action.calls)
        answers = ({**one, "tool_call_id": next(results).id} if one["role"] == "tool" else one for one in said)
        done = like.ends and self._turn == len(like.turns)
        return Step(messages=tuple(answers), done=done, reward=reward)

    def close(self) -> None:
        """There is nothing to close."""


def _names(said: Sequence[Message]) -> list[str]:
    return [str(message.get("name")) for message in said if message["role"] == "tool"]


@lru_cache(maxsize=4)
def _read(run: Path) -> Mapping[str, list[_Recorded]]:
    """By problem, in the order of the rows. Raises UserError where there are none."""
    files = sorted((run / "rows").glob("*.parquet"))
    if not files:
        raise UserError(f"replay: {run} has no rows (run); name the folder of a run that has saved some")
    found: dict[str, list[_Recorded]] = {}
    for file in files:
        if set(_COLUMNS) - set(pq.read_schema(file).names):
            continue  # of the first files, which had no episodes
        episodes: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for row in sorted(pq.read_table(file, columns=list(_COLUMNS)).to_pylist(), key=lambda row: row["sample_id"]):
            if row["turns"]:
                number = row["sample_id"] if row["episode"] is None else row["episode"]
                episodes.setdefault((str(row["problem_id"]), number), []).append(row)
        for (problem, _), rows in episodes.items():
            found.setdefault(problem, []).append(_of(rows))
    if not found:
        raise UserError(f"replay: the rows of {run} hold no episodes (run)")
    return found


def _of(rows: Sequence[Mapping[str, Any]]) -> _Recorded:
    """rows: of one episode, in their order."""
    turns = [turn for row in rows for turn in row["turns"]]
    return _Recorded(
        prompt=tuple({str(key): str(value) for key, value in turn} for turn in rows[0]["messages"]),
        tools=tuple(json.loads(rows[0]["tools"] or "[]")),
        turns=tuple(tuple(json.loads(turn["messages"])) for turn in turns),
        rewards=tuple(turn["reward"] for turn in turns),
        ends=rows[0]["ended"] == "done",
    )
