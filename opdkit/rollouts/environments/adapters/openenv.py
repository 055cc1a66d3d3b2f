"""OpenEnv: environments behind a server (`pip install openenv-core`).

    environment = { name = "openenv", url = "http://127.0.0.1:8000" }
    environment = { name = "openenv", url = "...", client = "coding_env:CodingEnv", action = "coding_env:CodeAction" }
    environment = { name = "openenv", url = "...", field = "message" }

The fields of an action are the arguments of one tool, `act`, as the server's /schema has them, or the action's class.
With `field` there is no tool: what the model says is put there. An episode is one session; the server makes the
rewards, and their sum is the episode's.
"""

from __future__ import annotations

import importlib
import json
import urllib.request
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters.named import as_text, named, plain
from opdkit.rollouts.environments.base import Action, Grade, Step, Tool, Transcript
from opdkit.rollouts.environments.functions import message_of
from opdkit.tasks.base import Option
from opdkit.tasks.final_text import after_thinking
from opdkit.types import Message, Problem

_TOOL = "act"
_OWN = ("reward", "done", "metadata")  # of an observation: not for the model
_SCHEMA_LIMIT_S = 10.0
_MAX_SCHEMA_BYTES = 1 << 20
_WORDS = ("title", "$defs", "examples")


class OpenEnv:
    """One session of the server an episode. The server's state is not made again where a worker is lost."""

    repeatable = False

    def __init__(
        self,
        url: Annotated[str, Option("of the server")],
        client: Annotated[str, Option("a client's class; it knows the observations' types")] = "",
        action: Annotated[str, Option("an action's class; default: the fields of the server's /schema")] = "",
        field: Annotated[str, Option("of the action, that the model's words are put in; then there is no tool")] = "",
    ) -> None:
        self._url, self._client_class, self._field = url, _client_class(client), field
        made: Any = named(action) if action else None
        self._action = made or dict
        schema = made.model_json_schema() if made else _schema_of(url)
        self.tools: Sequence[Tool] = () if field else (_tool(schema),)
        self._client: Any = None
        self._reward = 0.0

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        self._client = self._client_class(base_url=self._url).sync()
        self._client.connect()
        result = self._client.reset(seed=seed % 2**31, episode_id=f"{problem.id}-{seed}")
        *before, last = problem.messages or ({"role": "user", "content": ""},)
        return (*before, {**last, "content": f"{last['content']}\n\n{_shown(result.observation)}".strip()})

    def step(self, action: Action, seed: int) -> Step:
        if self._field:
            said = after_thinking(action.text).strip()
            result = self._client.step(self._action(**{self._field: said}))
            return self._said([result], [{"role": "user", "content": _shown(result.observation)}])
        if not action.calls:
            return Step(done=True)
        results, messages = [], []
        for call in action.calls:
            results.append(self._client.step(self._action(**(call.arguments or {}))))
            messages.append(message_of(call, _shown(results[-1].observation)))
            if results[-1].done:
                break
        return self._said(results, messages)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def grade(self, problem: Problem, transcript: Transcript) -> Grade:
        """Adds nothing: the rewards of the steps are the episode's."""
        return Grade(score=0.0, verdict="correct" if self._reward >= 1 else "wrong")

    def _said(self, results: Sequence[Any], messages: Sequence[Message]) -> Step:
        rewards = [float(result.reward) for result in results if result.reward is not None]
        self._reward += sum(rewards)
        return Step(messages=tuple(messages), done=bool(results[-1].done), reward=sum(rewards) if rewards else None)


def _client_class(name: str) -> Any:
    if name:
        return named(name)
    try:
        return importlib.import_module("openenv.core.generic_client").GenericEnvClient
    except ImportError as error:
        raise UserError(f"openenv needs the package openenv-core ({error}); pip install openenv-core") from None


@lru_cache(maxsize=16)
def _schema_of(url: str) -> dict[str, Any]:
    place = f"{url.rstrip('/').replace('ws://', 'http://').replace('wss://', 'https://')}/schema"
    try:
        with urllib.request.urlopen(place, timeout=_SCHEMA_LIMIT_S) as reply:
            return dict(json.loads(reply.read(_MAX_SCHEMA_BYTES))["action"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"openenv: {place} does not say what an action is ({error}); is the server up?") from None


def _tool(schema: Mapping[str, Any]) -> Tool:
    """Of an action's schema, without what is the library's own."""
    properties = {name: _bare(part) for name, part in schema.get("properties", {}).items() if name != "metadata"}
    parameters = {"type": "object", "properties": properties, "required": list(schema.get("required", ()))}
    if "$defs" in schema:
        parameters["$defs"] = schema["$defs"]
    words = " ".join(str(schema.get("description") or "Acts in the environment.").split())
    return {"type": "function", "function": {"name": _TOOL, "description": words, "parameters": parameters}}


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in _WORDS}


def _shown(observation: Any) -> str:
    """The one text of an observation; of several fields, all as JSON."""
    value = plain(observation)
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if key not in _OWN}
        if len(value) == 1:
            (value,) = value.values()
    return as_text(value)
