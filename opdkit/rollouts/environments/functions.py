"""An environment whose tools are Python functions, as TRL's `tools=`: hints and a docstring become the schema.

    def multiply(a: int, b: int) -> int:
        '''Multiplies two integers.

        Args:
            a: The one.
            b: The other.
        '''
        return a * b

    environment = "my_tools.py:multiply"        one function
    environment = "my_tools.py:TOOLS"           TOOLS = [multiply, add]: several

A turn without a call is the answer, and ends the episode. Functions may be `async def`. One that is `@pure` always says
the same of the same arguments: its results are kept, and shared by all episodes of a worker.
"""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Call, Failure, Step, Tool
from opdkit.tasks.base import place_and_fault
from opdkit.types import Message, Problem

Function = TypeVar("Function", bound=Callable[..., Any])
_MAX_KEPT = 10_000  # results of pure functions in a worker
_kept: OrderedDict[tuple[str, str, str], str] = OrderedDict()


def pure(function: Function) -> Function:
    """Says that a tool's result depends on its arguments alone, so that it need not be called twice."""
    function.pure = True  # type: ignore[attr-defined]
    return function


class ToolError(Exception):
    """What a tool raises to tell the model a sentence, and not the name of an exception."""


class FunctionTools:
    """The problem's own messages are the prompt; `functions` are the tools."""

    def __init__(self, functions: Sequence[Callable[..., Any]], tools: Sequence[Tool] | None = None) -> None:
        """tools: their schemas, where hints and docstrings are not to be read."""
        self.tools = [schema_of(function) for function in functions] if tools is None else list(tools)
        names = [tool["function"]["name"] for tool in self.tools]
        self._functions = dict(zip(names, functions, strict=True))
        self.is_async = any(map(inspect.iscoroutinefunction, functions))

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        return problem.messages

    def step(self, action: Action, seed: int) -> Any:
        if not action.calls:
            return Step(done=True)
        return self._step_async(action) if self.is_async else self._step(action)

    def close(self) -> None:
        """There is nothing to close."""

    def _step(self, action: Action) -> Step:
        return Step(messages=tuple(message_of(call, *self._result(call)) for call in action.calls))

    async def _step_async(self, action: Action) -> Step:
        messages = []
        for call in action.calls:  # one after the other: a later call may rely on an earlier one
            result, failure = self._result(call)
            if inspect.isawaitable(result):
                try:
                    result = await result
                except Exception as error:
                    result, failure = error_text(error), "tool_error"
            messages.append(message_of(call, result, failure))
        return Step(messages=tuple(messages))

    def _result(self, call: Call) -> tuple[Any, Failure | None]:
        function, arguments = self._functions[call.name], call.arguments or {}
        try:
            if not getattr(function, "pure", False) or inspect.iscoroutinefunction(function):
                return function(**arguments), None
            key = (function.__module__, call.name, json.dumps(arguments, sort_keys=True))
            if key not in _kept:
                _kept[key] = text_of(function(**arguments))
                if len(_kept) > _MAX_KEPT:
                    _kept.popitem(last=False)
            _kept.move_to_end(key)
            return _kept[key], None
        except Exception as error:  # a tool is somebody's code: it raises anything
            return error_text(error), "tool_error"


def schema_of(function: Callable[..., Any]) -> Tool:
    """Raises UserError where a hint or the docstring is missing."""
    from transformers.utils import get_json_schema  # seconds: only who needs it waits for it

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, and what odd hints raise
        name = getattr(function, "__name__", repr(function)[:80])
        raise UserError(
            f"the tool {name} cannot be described: {' '.join(str(error).split())}; a tool has type hints, and a "
            'docstring with "Args:" and a line "name: what it is" for each argument'
        ) from None
    schema["function"].pop("return", None)  # not all templates know it, and TRL leaves it out of the prompt as well
    return schema


def message_of(call: Call, result: Any, failure: Failure | None = None) -> dict[str, str]:
    """The answer to a call."""
    message = {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text_of(result)}
    return message if failure is None else {**message, "failure": failure}


def text_of(result: Any) -> str:
    """Text as it is; lists and tables as JSON; all else as Python prints it."""
    if isinstance(result, str):
        return result
    if isinstance(result, list | tuple | Mapping):
        try:
            return json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            pass
    return str(result)


def error_text(error: BaseException) -> str:
    """One line, without a traceback or a place: it is for a model."""
    if isinstance(error, ToolError):
        return f"error: {' '.join(str(error).split())[:300]}"
    return "error: " + place_and_fault(error).rpartition(" (")[0][:300]
