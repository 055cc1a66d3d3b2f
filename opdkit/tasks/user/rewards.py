"""Reward functions of TRL's form: `f(prompts, completions, **columns) -> list[float]`, all by keyword.

A function that takes `completions` is one. It sees a whole batch; every column of the data set that it names, or all of
them if it takes `**kwargs`, is a list beside it; `gold`, `solution`, `id`, `task` and what `meta` holds are there too.
Prompts and completions are texts, and chat turns where the data's own prompts are (as in TRL).

In a file or a module it is a user's task like any other (`task.py`), in a process of its own. One that no other process
can import (a notebook's, a script's, a closure) is called in this one: `InProcess`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from opdkit.errors import UserError
from opdkit.tasks.base import Grade, Task
from opdkit.types import Problem

ALL = "*"  # asks for every column
PREFIX = "python:"  # of the name that a function has which is in no file
_NOT_SEEN = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")  # TRL's; graders read text


def is_reward_function(found: Any) -> bool:
    return not inspect.isclass(found) and callable(found) and "completions" in _parameters(found)


def asked_columns(function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns it names, and "prompt", which says texts from chat turns; `ALL` as well if it takes any."""
    parameters = _parameters(function)
    named = [name for name, kind in parameters.items() if kind.kind is not inspect.Parameter.VAR_KEYWORD]
    asked = {*named, "prompt"} - {"prompts", "completions"}
    return tuple(sorted(asked)) + ((ALL,) if len(named) < len(parameters) else ())


def reward_faults(function: Callable[..., Any], name: str) -> str | None:
    """A sentence about a function that cannot be called as TRL calls one."""
    if inspect.iscoroutinefunction(function):
        return f"the reward {name} is async; give a plain function"
    for parameter in _parameters(function).values():
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            return f"the reward {name} takes {parameter.name} by position; everything is given to it by keyword"
        if parameter.name in _NOT_SEEN and parameter.default is inspect.Parameter.empty:
            return f"the reward {name} asks for {parameter.name}, which no grader sees: graders read text"
    return None


class RewardTask:
    """Such a function as a task. A number of 1 or more is a right answer, None one that stays ungraded."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name, self._function = name, function
        self._parameters = _parameters(function)
        self._takes_all = ALL in asked_columns(function)

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Raises UserError for a column that a problem lacks, TypeError or ValueError for what are no numbers."""
        prompts, completions = zip(*(_read(problem, text) for problem, text in items), strict=True)
        texts = {"prompts": list(prompts), "completions": list(completions)}
        given = {name: values for name, values in texts.items() if self._takes_all or name in self._parameters}
        said = self._function(**given, **self._columns(items))
        if inspect.iscoroutine(said):
            said.close()
            raise TypeError("an async function; give a plain one")
        scores = said.tolist() if hasattr(said, "tolist") else said  # of numpy, of torch
        if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(items):
            raise TypeError(f"{len(items)} completions, and not as many numbers: {said!r:.100}")
        return [_graded(score, text) for score, (_, text) in zip(scores, items, strict=True)]

    def close(self) -> None:
        pass

    def _columns(self, items: Sequence[tuple[Problem, str]]) -> dict[str, list[Any]]:
        known = [_known(problem) for problem, _ in items]
        names = {name for one in known for name in one} if self._takes_all else {*()}
        asked = {
            name: parameter
            for name, parameter in self._parameters.items()
            if name not in ("prompts", "completions") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        for name, parameter in asked.items():
            if any(name in one for one in known):
                names.add(name)
            elif parameter.default is inspect.Parameter.empty:
                has = ", ".join(sorted(known[0]))
                raise UserError(f"{self.name} asks for the column {name}, which the problems lack (there are {has})")
        return {name: [one.get(name) for one in known] for name in sorted(names - {"prompts", "completions"})}


@dataclass(frozen=True, slots=True, eq=False)
class InProcess:
    """A reward function that is in no file, as what `UserTask` is for one that is. Called, it makes the task."""

    function: Callable[..., Any]
    name: str
    arguments: ClassVar[tuple[()]] = ()
    needs_gold: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        return asked_columns(self.function)

    @property
    def digests(self) -> dict[str, str]:
        """Of its text, or of its byte code where Python has no text of it. What it closes over is not part of it."""
        try:
            text = inspect.getsource(self.function)
        except (OSError, TypeError):
            code = getattr(self.function, "__code__", None)
            text = repr((code.co_code, code.co_consts, code.co_names)) if code else type(self.function).__qualname__
        return {"": hashlib.sha256(text.encode()).hexdigest()}

    def __call__(self) -> Task:
        return RewardTask(self.function, self.name)

    def warnings(self, options: Mapping[str, Any]) -> list[str]:
        return [
            f"{self.name.removeprefix(PREFIX)} can be imported from no file, so it runs in this process, without a "
            "time limit: what hangs or crashes in it ends the run"
        ]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _read(problem: Problem, text: str) -> tuple[Any, Any]:
    """Prompt and completion as the data has its prompts: texts, or chat turns."""
    asked = [dict(turn) for turn in problem.messages]
    questions = [turn for turn in asked if turn.get("role") != "system"]
    if isinstance(problem.row.get("prompt"), list | tuple) or len(questions) > 1:
        return asked, [{"role": "assistant", "content": text}]
    return questions[0]["content"] if questions else "", text


def _known(problem: Problem) -> dict[str, Any]:
    """The row's own columns, above what every problem has."""
    standard = {"id": problem.id, "task": problem.task, "gold": problem.gold, "solution": problem.solution}
    own = {name: value for name, value in problem.row.items() if name != "prompt"}
    return {"answer": problem.gold, **standard, **problem.meta, **problem.columns, **own}


def _graded(score: Any, text: str) -> Grade:
    if score is None:
        return Grade(score=None, verdict="error", feedback="the reward function gave None")
    if not isinstance(score, Real):
        raise TypeError(f"a reward is {type(score).__name__}, not a number")
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"a reward is {number}")
    return Grade(score=number, verdict="correct" if number >= 1 else "wrong", parsed=text.strip())
