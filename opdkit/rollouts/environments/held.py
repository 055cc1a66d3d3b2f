"""One episode's environment between the loop and the user's code: what goes in fits its tools, what comes out is what
an environment may say, and every call is answered."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import FAILURES, Action, Failure, Step, Tool, Transcript, Turn
from opdkit.rollouts.environments.functions import FunctionTools
from opdkit.rollouts.environments.schema import call_fault, tool_faults
from opdkit.tasks.base import checked, whole_text
from opdkit.tasks.tool_calls import Call
from opdkit.tasks.user._worker import grade_as_json
from opdkit.types import Problem

MAX_CHARACTERS = 200_000  # of one message; the middle of a longer one is left out, and counted
_MAX_NAME_CHARACTERS = 1000
NO_RESULT = "error: the environment gave no result for this call"
_ROLES = {"reset": ("system", "user", "assistant", "tool"), "step": ("tool", "user")}
_ROLES["history"] = _ROLES["reset"]
_KEYS = {"role", "content", "name", "tool_call_id", "failure"}
_MAX_HISTORY = 4096  # messages


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes the environment of an episode."""

    make: Callable[..., Any]
    name: str


def is_environment(found: Any, module: str) -> bool:
    """Whether it is the class of an environment, and of this module: what it imports is not meant."""
    methods = ("reset", "step")
    own = inspect.isclass(found) and found.__module__ == module and not found.__name__.startswith("_")
    return own and all(callable(getattr(found, name, None)) for name in methods)


def maker_of(found: Any, name: str) -> Maker:
    """Of a class, a function that is a tool, or a list of some. Raises UserError for what is none of them."""
    functions = list(found) if isinstance(found, list | tuple) else [found]
    if functions and all(inspect.isroutine(function) for function in functions):
        return Maker(lambda: FunctionTools(functions), name)
    if not inspect.isclass(found):
        raise UserError(
            f"{name} is no environment: it is neither a class with reset(problem, seed) and step(action, seed), nor a "
            "function that is a tool, nor a list of some"
        )
    for method, given in (("reset", (None, 0)), ("step", (None, 0))):
        function = getattr(found, method, None)
        if not callable(function):
            raise UserError(f"the class {name} has no method {method}, which an environment has")
        try:
            inspect.signature(function).bind(None, *given)
        except TypeError as error:
            raise UserError(f"{name}.{method} cannot be called with two arguments: {error}") from None
        except ValueError:
            pass
    return Maker(found, name)


@dataclass(slots=True)
class Held:
    """The environment of one episode."""

    maker: Maker
    options: Mapping[str, Any]
    max_calls: int
    environment: Any = field(init=False)
    problem: Problem | None = None

    def __post_init__(self) -> None:
        self.environment = self.maker.make(**self.options)

    @property
    def described(self) -> dict[str, Any]:
        """Raises UserError for tools that cannot be offered."""
        environment = self.environment
        methods = [getattr(environment, name) for name in ("reset", "step", "grade", "close") if self._has(name)]
        return {
            "tools": self.tools(),
            "grades": self._has("grade"),
            "is_async": getattr(environment, "is_async", any(map(inspect.iscoroutinefunction, methods))),
            "repeatable": bool(getattr(environment, "repeatable", True)),
            "rewrites_history": bool(getattr(environment, "rewrites_history", False)),
        }

    def tools(self) -> list[Tool]:
        tools = list(getattr(self.environment, "tools", ()))
        if faults := list(tool_faults(tools)):
            raise UserError(*(f"the environment {self.maker.name}: {fault}" for fault in faults))
        return tools

    async def reset(self, problem: Problem, seed: int) -> dict[str, Any]:
        self.problem = problem
        messages, cut = _checked_messages(await _now(self.environment.reset(problem, seed)), "reset")
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("reset returned messages that do not end with a user turn")
        return {"messages": messages, "tools": self.tools(), "cut": cut}

    async def step(self, said: Mapping[str, Any], seed: int) -> dict[str, Any]:
        action, tools = action_from_json(said), self.tools()
        refused = self._refusals(action.calls, tools) if tools else {}
        fitting = tuple(call for call in action.calls if call.id not in refused)
        step = Step()
        if fitting or not action.calls:
            step = await _now(self.environment.step(replace(action, calls=fitting), seed))
            if not isinstance(step, Step):
                raise TypeError(f"step returned {type(step).__name__}, not a Step")
        said_step, cut = _checked_step(step)
        answers, failures = _answers(action.calls if tools else (), refused, said_step, step.done)
        failure = step.failure or next((failure for failure in failures if failure), None)
        return {**said_step, "messages": answers, "failures": failures, "failure": failure, "cut": cut}

    def _refusals(self, calls: Sequence[Call], tools: Sequence[Tool]) -> dict[str, str]:
        found = {call.id: fault for call in calls if (fault := call_fault(call, tools))}
        for call in calls[self.max_calls :]:
            found.setdefault(call.id, f"error: refused, since a turn may have {self.max_calls} calls at most")
        return found

    async def grade(self, said: Mapping[str, Any]) -> dict[str, Any]:
        grade = await _now(self.environment.grade(self.problem, transcript_from_json(said)))
        return {"grade": grade_as_json(checked(grade))}

    async def close(self) -> dict[str, Any]:
        if self._has("close"):
            await _now(self.environment.close())
        return {}

    def _has(self, name: str) -> bool:
        return callable(getattr(self.environment, name, None))


async def _now(said: Any) -> Any:
    return await said if inspect.isawaitable(said) else said


def _answers(
    calls: Sequence[Call], refused: Mapping[str, str], step: Mapping[str, Any], is_done: bool
) -> tuple[list[dict[str, str]], list[Failure | None]]:
    """Every call's answer, in order, then what is said besides; and what went wrong with each call."""
    by_call = {message.get("tool_call_id"): message for message in step["messages"]}
    own = {call.id for call in calls}
    besides = [message for message in step["messages"] if message.get("tool_call_id") not in own]
    answers: list[dict[str, str]] = []
    failures: list[Failure | None] = []
    for call in calls:
        message = by_call.get(call.id)
        if call.id in refused:
            message = _tool_message(call, refused[call.id], "invalid_call")
        elif message is None and not is_done:
            message = _tool_message(call, NO_RESULT, "tool_error")
        failures.append(cast(Failure | None, (message or {}).get("failure")))
        answers += [] if message is None else [message]
    said = [{key: value for key, value in message.items() if key != "failure"} for message in (*answers, *besides)]
    return said, failures


def _tool_message(call: Call, content: str, failure: Failure) -> dict[str, str]:
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": content, "failure": failure}


def _checked_step(step: Step) -> tuple[dict[str, Any], int]:
    messages, cut = _checked_messages(step.messages, "step")
    if step.failure is not None and step.failure not in FAILURES:
        raise ValueError(f"the failure of a step is {step.failure!r}; it is None or one of {', '.join(FAILURES)}")
    if step.reward is not None and not math.isfinite(step.reward):
        raise ValueError(f"the reward of a step is {step.reward}")
    info = {str(name): float(number) for name, number in step.info.items()}
    reward = None if step.reward is None else float(step.reward)
    history, more_cut = (None, 0) if step.history is None else _checked_history(step.history)
    said = {"messages": messages, "done": bool(step.done), "reward": reward, "info": info, "history": history}
    return said, cut + more_cut


def _checked_history(said: Any) -> tuple[list[dict[str, Any]], int]:
    """As messages; those of the model may have calls, with their arguments as an object."""
    if isinstance(said, str | Mapping) or not isinstance(said, Sequence) or len(said) > _MAX_HISTORY:
        raise TypeError(f"the history of a step is no list of at most {_MAX_HISTORY} messages")
    calls = [message.get("tool_calls") if isinstance(message, Mapping) else None for message in said]
    bare = [
        {key: value for key, value in message.items() if key != "tool_calls"} if made is not None else message
        for message, made in zip(said, calls, strict=True)
    ]
    messages, cut = _checked_messages(bare, "history")
    for message, made in zip(messages, calls, strict=True):
        if made is not None and message["role"] != "assistant":
            raise ValueError(f"a message of history has calls and the role {message['role']!r}; only the model calls")
    if not messages or messages[-1]["role"] not in _ROLES["step"]:
        raise ValueError("the history of a step does not end with what a tool or a user says")
    return [
        message if made is None else {**message, "tool_calls": [_checked_call(call) for call in made]}
        for message, made in zip(messages, calls, strict=True)
    ], cut


def _checked_call(call: Any) -> dict[str, Any]:
    try:
        own, name, arguments = call["id"], call["function"]["name"], call["function"]["arguments"]
    except (KeyError, TypeError):
        raise ValueError("a call of history has no id, function.name and function.arguments") from None
    if not isinstance(own, str) or not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError("a call of history has an id and a name that are text, and arguments that are an object")
    return {"type": "function", "id": own, "function": {"name": name, "arguments": arguments}}


def _checked_messages(said: Any, by: str) -> tuple[list[dict[str, str]], int]:
    """Copies of them, and how many characters were left out of long ones."""
    if isinstance(said, str | Mapping) or not isinstance(said, Sequence):
        raise TypeError(f"{by} returned {type(said).__name__}, not a list of messages")
    messages, cut = [], 0
    for message in said:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES[by]:
            role = message.get("role") if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"a message of {by} has the role {str(role)[:80]!r}; roles are {', '.join(_ROLES[by])}")
        if odd := sorted(str(key) for key in message.keys() - _KEYS):
            raise ValueError(f"a message of {by} has the key {odd[0]!r}; keys are {', '.join(sorted(_KEYS))}")
        if not all(isinstance(value, str) for value in message.values()) or "content" not in message:
            raise TypeError(f"a message of {by} is not made of text alone, or has no content")
        if any(len(value) > _MAX_NAME_CHARACTERS for key, value in message.items() if key != "content"):
            raise ValueError(f"a message of {by} has a name or an id of over {_MAX_NAME_CHARACTERS} characters")
        if message.get("failure", FAILURES[0]) not in FAILURES:
            raise ValueError(f"a message of {by} has a failure that is none of {', '.join(FAILURES)}")
        content, too_many = _within(message["content"])
        messages.append({**message, "content": content})
        cut += too_many
    return messages, cut


def _within(text: str) -> tuple[str, int]:
    """Half a character, as JSON can name, is escaped: no file could hold it."""
    over = len(text) - MAX_CHARACTERS
    if over > 0:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}\n... {over} characters left out ...\n{text[-half:]}"
    return whole_text(text), max(over, 0)


def action_as_json(action: Action) -> dict[str, Any]:
    calls = [[call.name, call.arguments, call.fault, call.id] for call in action.calls]
    return {
        "text": action.text, "token_ids": action.token_ids, "calls": calls, "finish": action.finish, "turn": action.turn
    }  # fmt: skip


def action_from_json(said: Mapping[str, Any]) -> Action:
    calls = tuple(Call(*call) for call in said["calls"])
    return Action(**{**said, "token_ids": tuple(said["token_ids"]), "calls": calls})


def step_from_json(said: Mapping[str, Any]) -> Step:
    return Step(
        messages=tuple(said["messages"]),
        done=said["done"],
        reward=said["reward"],
        failure=said["failure"],
        info=said["info"],
        history=None if said.get("history") is None else tuple(said["history"]),
    )


def transcript_as_json(transcript: Transcript) -> dict[str, Any]:
    turns = [
        {"action": action_as_json(turn.action), "step": None if turn.step is None else _step_as_json(turn.step)}
        for turn in transcript.turns
    ]
    return {"prompt": [dict(message) for message in transcript.prompt], "turns": turns, "ended": transcript.ended}


def transcript_from_json(said: Mapping[str, Any]) -> Transcript:
    turns = tuple(
        Turn(
            action=action_from_json(turn["action"]), step=None if turn["step"] is None else step_from_json(turn["step"])
        )
        for turn in said["turns"]
    )
    return Transcript(prompt=tuple(said["prompt"]), turns=turns, ended=said["ended"])


def _step_as_json(step: Step) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in step.messages],
        "done": step.done,
        "reward": step.reward,
        "failure": step.failure,
        "info": dict(step.info),
        "history": None if step.history is None else [dict(message) for message in step.history],
    }
