"""verifiers, version 0: environments made of `MultiTurnEnv` (`pip install "verifiers<0.2"`).

    environment = { name = "verifiers", environment = "my_env.py:load_environment", args = { max_turns = 4 } }
    environment = { name = "verifiers", environment = "vf-wordle" }        an environment that is installed

`rollout` is theirs and final, with a model of its own; so its hooks are driven here: setup_state, env_response, stop
conditions, the rubric. The problems are data.train's: `load_environment().get_dataset().to_json("train.jsonl")` writes
those that come with an environment (columns prompt, answer, info).

Version 1 owns the loop and has no such hooks: `verifiers_v1.py`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters.named import graded, named, row_of, words_of
from opdkit.rollouts.environments.base import Action, Grade, Step, Tool, Transcript
from opdkit.tasks.base import Option
from opdkit.types import Message, Problem


class Verifiers:
    """One state of the environment an episode."""

    asks_columns = ("*",)

    def __init__(
        self,
        environment: Annotated[str, Option('what makes it, "my_env.py:load_environment", or its installed name')],
        args: Annotated[Mapping[str, Any], Option("given to what makes it")] = {},  # never changed
    ) -> None:
        self._env = _loaded(environment, json.dumps(dict(args), sort_keys=True))
        self.tools: Sequence[Tool] = [_schema(tool) for tool in self._env.tool_defs or ()]
        self._state: Any = None

    async def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        row = row_of(problem)
        prompt = [dict(message) for message in problem.messages]
        if self._env.system_prompt and not any(message["role"] == "system" for message in prompt):
            prompt.insert(0, {"role": "system", "content": self._env.system_prompt})
        given = {"prompt": prompt, "answer": problem.gold or "", "info": row.get("info") or {}, "example_id": 0}
        self._state = await self._env.init_state(given, _nobody(), "policy")
        await self._env.setup_state(self._state)
        self.tools = [_schema(tool) for tool in self._state["tool_defs"] or ()]
        self._read = list(await self._env.get_prompt_messages(self._state))
        return [_message(message, {}) for message in self._read]

    async def step(self, action: Action, seed: int) -> Step:
        types, state = importlib.import_module("verifiers.types"), self._state
        calls = [
            types.ToolCall(id=call.id, name=call.name, arguments=json.dumps(call.arguments or {}))
            for call in action.calls
        ]
        content = words_of(action.text) if calls else action.text
        said = types.AssistantMessage(content=content, tool_calls=calls or None)
        await self._env.add_trajectory_step(
            state,
            {
                "prompt": self._read,
                "completion": [said],
                "response": None,
                "tokens": None,
                "reward": None,
                "advantage": None,
                "is_truncated": action.finish == "length",
                "trajectory_id": state["trajectory_id"],
                "extras": {},
            },
        )
        if await self._env.is_completed(state):
            return Step(done=True)
        read = list(await self._env.get_prompt_messages(state))
        names = {call.id: call.name for call in action.calls}
        new = tuple(_message(message, names) for message in read[len(self._read) + 1 :])
        self._read = read
        is_over = state.get("final_env_response") is not None
        return Step(messages=() if is_over else new, done=is_over)

    async def grade(self, problem: Problem, transcript: Transcript) -> Grade:
        """The rubric's reward: the sum of its functions by their weights."""
        await self._env.render_completion(self._state)
        await self._env.rubric.score_rollout(self._state)
        return graded(self._state["reward"])

    async def close(self) -> None:
        if self._state is not None:
            await self._env.cleanup(self._state)
            await self._env.rubric.cleanup(self._state)


@lru_cache(maxsize=8)  # one for all episodes of a worker: what differs is in their states
def _loaded(environment: str, args: str) -> Any:
    try:
        verifiers = importlib.import_module("verifiers")
    except ImportError as error:
        raise UserError(f'verifiers: the package is missing ({error}); pip install "verifiers<0.2"') from None
    if not hasattr(verifiers, "MultiTurnEnv"):
        version = getattr(verifiers, "__version__", "1")
        raise UserError(f'verifiers {version} has no MultiTurnEnv: install "verifiers<0.2"')
    given = json.loads(args)
    is_named = ":" in environment or environment.endswith(".py")
    made = named(environment)(**given) if is_named else verifiers.load_environment(environment, **given)
    if not isinstance(made, verifiers.MultiTurnEnv):
        raise UserError(f"verifiers: {environment} makes {type(made).__name__}, which is no MultiTurnEnv (environment)")
    if made.requires_group_rollouts:
        raise UserError(f"verifiers: the rubric of {environment} compares episodes of a group, which are apart here")
    return made


@lru_cache(maxsize=1)
def _nobody() -> Any:
    """The client that a state must have. It is never asked: the model is ours."""
    client = importlib.import_module("verifiers.clients").Client
    made = type("Nobody", (client,), {"__init__": lambda self: None})
    made.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return made()


def _schema(tool: Any) -> Tool:
    function = {"name": tool.name, "description": tool.description, "parameters": _without_titles(tool.parameters)}
    return {"type": "function", "function": function}


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        kept = {key: part for key, part in schema.items() if not (key == "title" and isinstance(part, str))}
        return {key: _without_titles(part) for key, part in kept.items()}
    return [_without_titles(part) for part in schema] if isinstance(schema, list) else schema


def _message(message: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Text alone; names: of the calls that tools answer, by id."""
    content = message.content
    if not isinstance(content, str):
        content = "".join(str(getattr(part, "text", "") or "") for part in content or ())
    said = {"role": str(message.role), "content": content}
    if said["role"] == "tool":
        said |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "unknown")}
    return said
