"""The adapter of verifiers 1 with the package itself, in an environment that has it: `make test-agents`."""

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Call, Transcript, Turn
from opdkit.rollouts.environments.options import resolve_environment
from opdkit.rollouts.environments.workers import Pool, Reply
from opdkit.types import Problem

pytestmark = pytest.mark.agents
if importlib.util.find_spec("verifiers") is None or importlib.util.find_spec("verifiers.v1") is None:
    pytest.skip("needs verifiers 1", allow_module_level=True)

# A taskset with a harness of its own, which talks to the endpoint as a program does. `forget`: from the second tool
# result on it leaves out the turns before the last one, as harnesses do that keep a context short.
TASKS = """
import json
import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult

class Data(vf.TaskData):
    answer: str

class Product(vf.Task[Data]):
    @vf.reward
    async def correct(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

class Products(vf.Taskset[Product, vf.TasksetConfig]):
    def load(self):
        yield Product(Data(prompt="17*23?", answer="391"), self.config.task)

class Config(vf.HarnessConfig):
    forget: bool = False
    other: bool = False
    extra: dict = {}

TOOL = {"type": "function", "function": {"name": "multiply", "description": "Multiplies.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}

class Loop(vf.Harness[Config]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **given):
        messages = [{"role": "user", "content": data.prompt}]
        while True:
            async with httpx.AsyncClient(timeout=60) as client:
                reply = await client.post(f"{endpoint}/chat/completions", headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages, "tools": [TOOL], **self.config.extra})
            if reply.status_code != 200:
                return ProgramResult(exit_code=1, stdout="", stderr=reply.text)
            said = reply.json()["choices"][0]["message"]
            messages.append(said)
            if not said.get("tool_calls"):
                return ProgramResult(exit_code=0, stdout="", stderr="")
            for call in said["tool_calls"]:
                result = eval("{a}*{b}".format(**json.loads(call["function"]["arguments"])))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(result)})
            if self.config.forget and len(messages) > 3:
                messages = [messages[0], *messages[-2:]]
            if self.config.other and len(messages) > 3:
                messages = [{"role": "user", "content": "Somebody asked for a product."}]

__all__ = ["Products", "Loop"]
"""
QUESTION = Problem(id="p", task="none", messages=({"role": "user", "content": "17*23?"},), row={"answer": "391"})


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "opd_products.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "opd_products"
    sys.modules.pop("opd_products", None)


def chosen(**options: Any) -> Any:
    return resolve_environment({"name": "verifiers_v1", "taskset": "opd_products", **options})


def harness(**options: Any) -> dict[str, Any]:
    return {"agent": {"harness": {"id": "opd_products", **options}}}


def last(pool: Pool) -> Reply:
    (reply,) = pool.replies(120)
    return reply


def call(number: int, **arguments: Any) -> Action:
    return Action(text="Let me see. <tool_call>", calls=(Call("multiply", arguments, None, f"c0000000{number}"),))


def begun(pool: Pool) -> Reply:
    pool.reset(0, QUESTION, 1)
    return last(pool)


def test_an_episode_is_a_run_of_the_harness(tasks: str) -> None:
    pool = Pool(chosen(), workers=1, tool_timeout_s=60)
    assert pool.grades and pool.rewrites_history
    started = begun(pool)
    assert started.crash is None and started.prompt == ({"role": "user", "content": "17*23?"},)
    assert [tool["function"]["name"] for tool in started.tools] == ["multiply"]
    pool.step(0, call(1, a=17, b=23), 1)
    said = last(pool).step
    assert said is not None and said.history is None and not said.done
    assert [(m["name"], m["tool_call_id"], m["content"]) for m in said.messages] == [("multiply", "c00000001", "391")]
    pool.step(0, Action(text="It is 391."), 1)
    assert (ended := last(pool).step) is not None and ended.done
    pool.grade(0, Transcript(prompt=(), turns=(), ended="done"))
    assert (grade := last(pool).grade) is not None and grade.score == 1.0
    pool.close_episode(0)
    pool.close()


def test_a_limit_of_ours_ends_the_run_and_it_is_graded(tasks: str) -> None:
    pool = Pool(chosen(), workers=1, tool_timeout_s=60)
    begun(pool)
    pool.step(0, call(1, a=17, b=23), 1)
    last(pool)
    pool.grade(0, Transcript(prompt=(), turns=(), ended="turn_limit"))
    assert (grade := last(pool).grade) is not None and grade.score == 0.0  # the last reply has no 391
    pool.close()


@pytest.mark.parametrize("forget", [False, True])
def test_rows_are_the_branches_of_the_trace(tasks: str, forget: bool) -> None:
    """What a row's prompt and turns say is what the trace's branch says, message for message."""
    from opdkit.rollouts.environments.adapters.verifiers_v1 import VerifiersV1

    async def run() -> tuple[list[list[Any]], list[list[Any]]]:
        made = VerifiersV1("opd_products", harness(forget=forget))
        rows = [list(await made.reset(QUESTION, 1))]
        for action in (call(1, a=17, b=23), call(2, a=391, b=2), call(3, a=782, b=2), Action(text="391")):
            words = action.text.partition("<tool_call>")[0].strip()
            rows[-1].append({"role": "assistant", "content": words})
            step = await made.step(action, 1)
            if step.history is not None:
                rows.append([*QUESTION.messages, *step.history])
            rows[-1] += step.messages
        assert step.done and (await made.grade(QUESTION, Transcript(prompt=(), turns=(), ended="done"))).score == 1.0
        branches = [branch.messages for branch in made._trace.branches]
        await made.close()
        return rows, branches

    rows, branches = asyncio.run(run())
    assert len(rows) == len(branches) == (3 if forget else 1)
    for row, branch in zip(rows, branches, strict=True):
        assert [(m["role"], m["content"]) for m in row] == [(m.role, m.content or "") for m in branch]


def test_what_is_no_row_of_one_prompt_is_a_failure(tasks: str) -> None:
    pool = Pool(chosen(env=harness(other=True)), workers=1, tool_timeout_s=60)
    begun(pool)
    pool.step(0, call(1, a=17, b=23), 1)
    last(pool)
    pool.step(0, call(2, a=17, b=23), 1)
    reply = last(pool)
    assert reply.step is not None and reply.step.failure == "crash" and "another conversation" in str(reply.crash)
    pool.close()


def test_a_request_for_what_the_sampler_does_not_do(tasks: str) -> None:
    pool = Pool(chosen(env=harness(extra={"stop": ["\n"]})), workers=1, tool_timeout_s=60)
    assert "the sampler of the run does not do stop" in str(begun(pool).crash)
    pool.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"taskset": "no_such_tasks"}, "no_such_tasks"),
        ({"env": {"agent": {"max_total_tokens": 10}}}, "env.agent.max_total_tokens is not known here"),
        ({"env": {"agent": {"client": {"type": "eval"}}}}, "has 0 agents that are the student"),
        ({"env": {"taskset": {"id": "other"}}}, "leave the first out"),
        ({"env": {"agent": {"harness": {"id": "opd_products", "forgett": True}}}}, "forgett"),
    ],
)
def test_an_environment_that_cannot_be_made(tasks: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Pool(chosen(**options), workers=1)


def test_the_harness_that_comes_with_verifiers(tasks: str) -> None:
    """Its chat loop, a program of its own that uv installs; with no tool it ends at the first answer."""
    if shutil.which("uv") is None and importlib.util.find_spec("uv") is None:
        pytest.skip("the harness's program needs uv")
    pool = Pool(chosen(env={"agent": {"harness": {"id": "null"}}}), workers=1, tool_timeout_s=300)
    started = begun(pool)
    assert started.crash is None and json.loads(json.dumps(started.prompt))[-1]["content"] == "17*23?"
    pool.step(0, Action(text="391"), 1)
    assert (ended := last(pool).step) is not None and ended.done
    pool.grade(0, Transcript(prompt=(), turns=(Turn(action=Action(text="391")),), ended="done"))
    assert (grade := last(pool).grade) is not None and grade.score == 1.0
    pool.close()
