"""TRL's `environment_factory`: a class without arguments whose public methods are the tools.

    environment = { name = "trl", factory = "my_env.py:Wordle" }

    class Wordle:
        def reset(self, **row) -> str | None     what it says is put behind the last user turn
        def guess(self, word: str) -> str        a tool: hints, and a docstring with "Args:"
        reward                                   or get_reward(): read when the episode has ended; else data.task grades

TRL's `tools=[f, g]` need no adapter: environment = "my_tools.py:TOOLS" (`functions.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters.named import graded, named, row_of
from opdkit.rollouts.environments.base import Grade, Transcript
from opdkit.rollouts.environments.functions import FunctionTools
from opdkit.tasks.base import Option
from opdkit.types import Message, Problem

_NO_TOOLS = ("reset", "get_reward", "close")


class Trl(FunctionTools):
    """One object of the factory's class an episode."""

    asks_columns = ("*",)

    def __init__(self, factory: Annotated[str, Option('a class of a file or module, "my_env.py:Wordle"')]) -> None:
        made = named(factory)
        self._inner: Any = made()
        names = [name for name in dir(made) if not name.startswith("_") and name not in _NO_TOOLS]
        tools = [getattr(self._inner, name) for name in names if inspect.isroutine(getattr(made, name))]
        if not callable(getattr(self._inner, "reset", None)) or not tools:
            raise UserError(f"trl: {factory} has no reset, or no public method that could be a tool (factory)")
        super().__init__(tools)
        if hasattr(self._inner, "get_reward") or hasattr(self._inner, "reward"):
            self.grade = self._grade

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        said = self._inner.reset(**_taken(self._inner.reset, row_of(problem)))
        if said is None:
            return problem.messages
        *before, last = problem.messages
        return (*before, {**last, "content": f"{last['content']}{said}"})

    def close(self) -> None:
        if callable(close := getattr(self._inner, "close", None)):
            close()

    def _grade(self, problem: Problem, transcript: Transcript) -> Grade:
        reward = self._inner.get_reward() if hasattr(self._inner, "get_reward") else self._inner.reward
        return graded(reward)


def _taken(function: Any, row: dict[str, Any]) -> dict[str, Any]:
    """What of a row the function takes: all of it where it has **row."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return row
    return {parameter.name: row[parameter.name] for parameter in parameters if parameter.name in row}
