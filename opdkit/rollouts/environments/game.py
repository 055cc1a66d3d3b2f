"""A small game of text, drawn from the seed: find the key, then the door, on a grid with walls.

Every turn the model is shown the grid and says a direction. A step nearer to what it looks for is worth `step_reward`,
one that leads away costs as much; the key and the door are worth 1 each, and a move into a wall or a word that is no
direction costs `step_reward`. No tools: what the model says is read.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Sequence
from typing import Annotated

from opdkit.rollouts.environments.base import Action, Step, Tool, Transcript
from opdkit.tasks.base import Grade, Option
from opdkit.tasks.final_text import after_thinking
from opdkit.types import Message, Problem

Place = tuple[int, int]  # row, column
_MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_WORD = re.compile(r"\b(up|down|left|right)\b", re.IGNORECASE)
_RULES = (
    "You are @ on a grid. # is a wall. Find the key K first, then the door D. Say one word each turn: up, down, left "
    "or right."
)


class Game:
    """`problem` names the game with the seed, so that siblings play the same one; its messages are not shown."""

    tools: Sequence[Tool] = ()

    def __init__(
        self,
        size: Annotated[int, Option("rows and columns", at_least=3)] = 5,
        walls: Annotated[float, Option("share of the grid", at_least=0)] = 0.2,
        max_moves: Annotated[int, Option("then it is lost", at_least=1)] = 30,
        step_reward: Annotated[float, Option("of a step nearer", at_least=0)] = 0.1,
    ) -> None:
        if walls > 0.5:
            raise ValueError(f"walls = {walls}: more than half of the grid leaves no way; give 0 to 0.5")
        self._size, self._share, self._max_moves, self._step_reward = size, walls, max_moves, step_reward

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        draw = random.Random(f"{problem.id} {seed}")
        cells = [(row, column) for row in range(self._size) for column in range(self._size)]
        while True:
            draw.shuffle(cells)
            self._at, self._key, self._door, *rest = cells
            self._walls = set(rest[: int(self._share * len(cells))])
            self._has_key, self._moves = False, 0
            if self._distance(self._at, self._key) and self._distance(self._key, self._door):
                break
        return [{"role": "user", "content": f"{_RULES}\n\n{self._shown()}"}]

    def step(self, action: Action, seed: int) -> Step:
        self._moves += 1
        words = _WORD.findall(after_thinking(action.text))
        said = words[-1].lower() if words else None
        reward, remark = self._move(said)
        is_won = self._has_key and self._at == self._door
        is_over = is_won or self._moves >= self._max_moves
        messages = () if is_over else ({"role": "user", "content": f"{remark}\n\n{self._shown()}".lstrip()},)
        return Step(messages=messages, done=is_over, reward=reward, info={"won": float(is_won)} if is_over else {})

    def close(self) -> None:
        """There is nothing to close."""

    def grade(self, problem: Problem, transcript: Transcript) -> Grade:
        """1 for the door, and a half for the key alone."""
        is_won = self._has_key and self._at == self._door
        score = 1.0 if is_won else 0.5 if self._has_key else 0.0
        parsed = "door" if is_won else "key" if self._has_key else "nothing"
        return Grade(score=score, verdict="correct" if is_won else "wrong", parsed=parsed)

    def _move(self, said: str | None) -> tuple[float, str]:
        """The reward, and what is remarked."""
        if said is None:
            return -self._step_reward, "Say up, down, left or right."
        aim = self._door if self._has_key else self._key
        there = (self._at[0] + _MOVES[said][0], self._at[1] + _MOVES[said][1])
        if not self._is_free(there):
            return -self._step_reward, "There is a wall."
        before, self._at = self._distance(self._at, aim), there
        if there == aim:
            taken = "" if self._has_key else "You have the key."
            self._has_key = True
            return 1.0, taken
        nearer = (self._distance(there, aim) or 0) < (before or 0)
        return self._step_reward if nearer else -self._step_reward, ""

    def _is_free(self, place: Place) -> bool:
        return all(0 <= part < self._size for part in place) and place not in self._walls

    def _distance(self, start: Place, end: Place) -> int | None:
        """Steps of the shortest way. None: there is none."""
        seen, ways = {start}, deque([(start, 0)])
        while ways:
            place, steps = ways.popleft()
            if place == end:
                return steps
            for down, right in _MOVES.values():
                there = (place[0] + down, place[1] + right)
                if self._is_free(there) and there not in seen:
                    seen.add(there)
                    ways.append((there, steps + 1))
        return None

    def _shown(self) -> str:
        signs = {place: "#" for place in self._walls} | {self._door: "D"}
        signs |= {} if self._has_key else {self._key: "K"}
        signs[self._at] = "@"
        rows = range(self._size)
        return "\n".join("".join(signs.get((row, column), ".") for column in rows) for row in rows)
