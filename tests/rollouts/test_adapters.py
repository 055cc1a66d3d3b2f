"""Environments of other libraries. OpenEnv and verifiers are tried with the real packages where they are installed
(`pip install openenv-core`, `"verifiers<0.2"`); else with recorded ones: classes that answer as theirs were seen to."""

import asyncio
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters import openenv
from opdkit.rollouts.environments.adapters.trl import Trl
from opdkit.rollouts.environments.adapters.verl import Verl
from opdkit.rollouts.environments.base import Action, Call, Step, Transcript
from opdkit.rollouts.environments.held import Held, maker_of
from opdkit.rollouts.environments.options import resolve_environment
from opdkit.rollouts.environments.schema import tool_faults
from opdkit.types import Problem

PROBLEM = Problem(
    id="p", task="none", messages=({"role": "user", "content": "Play."},), gold="7", row={"secret": 7, "other": 1}
)
OVER = Transcript(prompt=(), turns=(), ended="answer")


def held(made: Any, **options: Any) -> Held:
    return Held(maker_of(made, made.__name__), options, 4)


def acted(environment: Held, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    said = [[name, arguments, None, f"c{place}"] for place, (name, arguments) in enumerate(calls)]
    action = {"text": "", "token_ids": [], "calls": said, "finish": "stop", "turn": 0}
    return asyncio.run(environment.step(action, 0))


WORDLE = '''
class Wordle:
    def __init__(self):
        self.reward = 0.0

    def reset(self, secret, **row):
        self.secret = secret
        return f" The number has one digit; {len(row)} columns besides."

    def guess(self, number: int) -> str:
        """Guesses.

        Args:
            number: The guess.
        """
        self.reward = float(number == self.secret)
        return "right" if self.reward else "wrong"

    def _hidden(self): ...
'''


def test_trl_environment_factory(tmp_path: Path) -> None:
    """Public methods are tools; reset gets the row, and what it says stands behind the last user turn."""
    file = tmp_path / "wordle.py"
    file.write_text(WORDLE)
    environment = held(Trl, factory=f"{file}:Wordle")
    assert [tool["function"]["name"] for tool in environment.tools()] == ["guess"]
    prompt = asyncio.run(environment.reset(PROBLEM, 0))["messages"]
    assert prompt == [{"role": "user", "content": "Play. The number has one digit; 4 columns besides."}]
    said = acted(environment, ("guess", {"number": 3}), ("guess", {"number": "x"}), ("guess", {"number": 7}))
    contents = [message["content"] for message in said["messages"]]
    assert contents[::2] == ["wrong", "right"] and "must be an integer" in contents[1]
    assert acted(environment)["done"] is True
    assert environment.environment.grade(PROBLEM, OVER).score == 1.0
    chosen = resolve_environment({"name": "trl", "factory": f"{file}:Wordle"})
    assert chosen.columns_asked == ("*",) and list(chosen.user_files) == [f"trl factory {file}"]
    with pytest.raises(UserError, match="there is no file"):
        Trl(factory=str(tmp_path / "none.py:Wordle"))


class _Tool:
    """As verl's BaseTool was read to be (1dda039): create, execute, release, asynchronous."""

    log: ClassVar[list[str]] = []

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        self.config, self.tool_schema, self.name = config, tool_schema, tool_schema.said["function"]["name"]

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        self.log.append(f"create {kwargs['create_kwargs']}")
        return "one", SimpleNamespace(text=None)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        if parameters["answer"] == "?":
            raise ValueError("no number")
        self.log.append(f"execute {instance_id} {parameters}")
        reward = 0.0 if parameters["answer"] == "8" else -0.05
        return SimpleNamespace(text=f"said {parameters['answer']}"), reward, {"tries": 1}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append(f"release {instance_id}")


def test_verl_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One instance an episode, however many calls; a call that raises is told to the model."""

    class Schema:
        def __init__(self, said: Any) -> None:
            self.said = said

        @classmethod
        def model_validate(cls, said: Any) -> "Schema":
            return cls(said)

        def model_dump(self, exclude_none: bool) -> Any:
            return self.said

    schemas, tools = ModuleType("verl.tools.schemas"), ModuleType("my_verl_tools")
    schemas.OpenAIFunctionToolSchema, tools.Check = Schema, _Tool  # type: ignore[attr-defined]
    for name, module in (("verl", ModuleType("verl")), ("verl.tools", ModuleType("verl.tools"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "verl.tools.schemas", schemas)
    monkeypatch.setitem(sys.modules, "my_verl_tools", tools)
    parameters = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    schema = {"type": "function", "function": {"name": "check", "description": "Checks.", "parameters": parameters}}
    config = tmp_path / "tools.yaml"
    config.write_text(json.dumps({"tools": [{"class_name": "my_verl_tools.Check", "tool_schema": schema}]}))
    environment = held(Verl, config=str(config))
    kwargs = {"tools_kwargs": {"check": {"create_kwargs": {"ground_truth": "7"}}}}
    problem = Problem(id="p", task="none", messages=PROBLEM.messages, row={"extra_info": kwargs})
    asyncio.run(environment.reset(problem, 0))
    said = acted(environment, ("check", {"answer": "7"}), ("check", {"answer": "?"}))
    assert [message["content"] for message in said["messages"]] == ["said 7", "error: ValueError: no number"]
    assert said["failures"] == [None, "tool_error"] and said["reward"] == -0.05 and said["info"] == {"tries": 1.0}
    assert acted(environment, ("check", {"answer": "8"}))["reward"] == 0.0  # which is not: no reward
    asyncio.run(environment.close())
    assert [line.split()[0] for line in _Tool.log] == ["create", "execute", "execute", "release"]
    assert _Tool.log[0] == "create {'ground_truth': '7'}"
    config.write_text("tools: 3")
    with pytest.raises(UserError, match="is no YAML of tools"):
        Verl(str(config))


class _Client:
    """As openenv-core 0.3.0's synchronous client answers: `make test-agents` tries the real one and a server."""

    def __init__(self, base_url: str) -> None:
        self.closed = False

    def sync(self) -> "_Client":
        return self

    def connect(self) -> None: ...

    def reset(self, seed: int, episode_id: str) -> Any:
        self.secret = seed % 10
        return SimpleNamespace(observation={"text": "Guess.", "done": False}, reward=None, done=False)

    def step(self, action: dict[str, Any]) -> Any:
        right = action["number"] == self.secret
        said = {"text": "right" if right else "wrong", "tries": 1} if right else {"text": "wrong"}
        return SimpleNamespace(observation=said, reward=1.0 if right else -0.25, done=right)

    def close(self) -> None:
        self.closed = True


def test_openenv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of an action are a tool's arguments; rewards are the server's; what is done is not asked further."""
    number = {"type": "integer", "title": "Number"}
    schema = {"properties": {"metadata": {"type": "object"}, "number": number}, "required": ["number"]}
    monkeypatch.setattr(openenv, "_schema_of", lambda url: schema)
    monkeypatch.setattr(openenv, "_client_class", lambda name: _Client)
    environment = held(openenv.OpenEnv, url="http://127.0.0.1:1")
    assert environment.described["grades"] and not environment.described["repeatable"]
    (tool,) = environment.tools()
    assert list(tool_faults([tool])) == [] and list(tool["function"]["parameters"]["properties"]) == ["number"]
    prompt = asyncio.run(environment.reset(PROBLEM, 13))["messages"]
    assert prompt[-1]["content"] == "Play.\n\nGuess."
    first = acted(environment, ("act", {"number": 5}), ("act", {"number": 3}), ("act", {"number": 4}))
    assert [message["content"] for message in first["messages"]] == ["wrong", '{"text": "right", "tries": 1}']
    assert first["done"] and first["reward"] == 0.75
    assert environment.environment.grade(PROBLEM, OVER).score == 0.0  # an episode's reward is the sum of both
    spoken = openenv.OpenEnv(url="", field="number")
    spoken.reset(PROBLEM, 13)
    said = spoken.step(Action(text="<think>5</think>3"), 0)
    assert spoken.tools == () and isinstance(said, Step) and said.messages[0]["role"] == "user"
    spoken.close()
    assert spoken._client.closed
    assert Call("act", {}).fault is None
