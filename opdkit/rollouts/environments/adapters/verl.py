"""verl's tools: the YAML that `actor_rollout_ref.rollout.multi_turn.tool_config_path` names. Needs verl beside opdkit.

    environment = { name = "verl", config = "gsm8k_tool_config.yaml" }

    tools:
      - class_name: verl.tools.gsm8k_tool.Gsm8kTool
        config: { type: native }
        tool_schema: { type: function, function: { name: calc_gsm8k_reward, ... } }

create -> execute -> ... -> release: here once an episode, and not for every call. What `create` is given stands in the
data's column `extra_info`, under tools_kwargs. A file of functions (`function_tool_path`) needs no adapter:
environment = "my_tools.py:TOOLS".
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters.named import as_text, row_of
from opdkit.rollouts.environments.base import Action, Step, Tool
from opdkit.rollouts.environments.functions import error_text, message_of
from opdkit.tasks.base import Option
from opdkit.types import Message, Problem

_MAX_CONFIG_BYTES = 1 << 20


class Verl:
    """The tools of a YAML; data.task grades the answer."""

    asks_columns = ("extra_info",)

    def __init__(self, config: Annotated[str, Option("the YAML with the tools")]) -> None:
        path = Path(config).expanduser().resolve()
        self._tools = _tools_of(path, path.stat().st_mtime_ns if path.is_file() else 0)
        self.tools: Sequence[Tool] = [_schema(tool) for tool in self._tools.values()]
        self._instances: dict[str, Any] = {}
        self._given: Mapping[str, Any] = {}

    async def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        extra = row_of(problem).get("extra_info") or {}
        self._given = extra.get("tools_kwargs") or {} if isinstance(extra, Mapping) else {}
        return problem.messages

    async def step(self, action: Action, seed: int) -> Step:
        if not action.calls:
            return Step(done=True)
        messages, rewards, info = [], [], dict[str, float]()
        for call in action.calls:
            try:
                response, reward, metrics = await self._execute(call.name, dict(call.arguments or {}))
            except Exception as error:
                messages.append(message_of(call, error_text(error), "tool_error"))
                continue
            messages.append(message_of(call, as_text(getattr(response, "text", None) or "")))
            rewards += [] if reward is None else [float(reward)]
            info |= {str(key): float(value) for key, value in (metrics or {}).items() if isinstance(value, int | float)}
        return Step(messages=tuple(messages), reward=sum(rewards) if rewards else None, info=info)

    async def close(self) -> None:
        for name, instance in self._instances.items():
            await self._tools[name].release(instance, **self._kwargs(name, "release_kwargs"))
        self._instances.clear()

    async def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        tool = self._tools[name]
        if name not in self._instances:
            said = await tool.create(create_kwargs=self._kwargs(name, "create_kwargs"))
            self._instances[name] = said[0] if isinstance(said, tuple) else said  # older ones return the id alone
        return await tool.execute(self._instances[name], arguments, **self._kwargs(name, "execute_kwargs"))

    def _kwargs(self, name: str, which: str) -> dict[str, Any]:
        return dict((self._given.get(name) or {}).get(which) or {})


@lru_cache(maxsize=8)
def _tools_of(path: Path, changed_ns: int) -> Mapping[str, Any]:
    """By name. Raises UserError for a file that holds no tools, or without verl."""
    if not path.is_file():
        raise UserError(f"verl: there is no file {path} (config)")
    try:
        said = yaml.safe_load(path.read_bytes()[:_MAX_CONFIG_BYTES])
        entries = [(one["class_name"], one.get("config") or {}, one.get("tool_schema")) for one in said["tools"]]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"verl: {path} is no YAML of tools with class_name and config ({error})") from None
    found = {}
    for class_name, config, schema in entries:
        try:
            module, _, name = str(class_name).rpartition(".")
            made = getattr(importlib.import_module(module), name)
            schemas = importlib.import_module("verl.tools.schemas")
            tool = made(config, None if schema is None else schemas.OpenAIFunctionToolSchema.model_validate(schema))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"verl: the tool {class_name} of {path} cannot be made: {error}") from None
        found[tool.name] = tool
    return found


def _schema(tool: Any) -> Tool:
    """Without the fields that verl leaves empty."""
    said: dict[str, Any] = tool.tool_schema.model_dump(exclude_none=True)
    return said
