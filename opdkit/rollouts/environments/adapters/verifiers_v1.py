"""verifiers, version 1: tasksets and harnesses (`pip install "verifiers>=0.4"`, whose `verifiers.v1` it is).

    environment = { name = "verifiers_v1", taskset = "my_tasks" }      a module here, or an installed taskset
    environment = { name = "verifiers_v1", taskset = "gsm8k", env = { agent = { harness = { id = "null" } } } }

The harness owns the loop and asks a model behind an endpoint. That endpoint is here, one an episode, on loopback: what
a harness sends is the next prompt, what the student writes is the answer. Where a request goes on from the last one,
what is new is appended; where it does not (turns left out, thoughts taken away), a new row begins, as a branch of the
trace does: the rows of an episode are the branches of its `Trace`, in the order of their last turns.

The problems are data.train's, a `TaskData` a line:

    import verifiers.v1 as vf
    for task in vf.load_taskset(vf.taskset_config_type("my_tasks")(id="my_tasks")):
        print(task.data.model_dump_json())

`env` is the [env] block of a verifiers run. An agent's program runs in a process here unless it names a runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.adapters.named import graded, one_line, row_of, words_of
from opdkit.rollouts.environments.base import Action, Grade, Step, Tool, Transcript
from opdkit.tasks.base import Option
from opdkit.types import Message, Problem

_MODEL = "policy"
_MAX_REQUEST_BYTES = 64 << 20
_CAPS = ("max_input_tokens", "max_output_tokens", "max_total_tokens")
# What a request may ask of a sampler that is not asked for here: the answer would not be what the harness wanted.
_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ((), []),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
}
_LIMITS = {"turn_limit": "max_turns", "token_limit": "max_total_tokens"}


class VerifiersV1:
    """One run of one agent an episode."""

    asks_columns = ("*",)
    repeatable = False
    rewrites_history = True
    tools: Sequence[Tool] = ()

    def __init__(
        self,
        taskset: Annotated[str, Option("a taskset's id: a module of the current folder, or an installed one")],
        env: Annotated[Mapping[str, Any], Option("the [env] block of a verifiers run, without the taskset's id")] = {},
    ) -> None:
        self._config = _config_of(taskset, json.dumps(dict(env), sort_keys=True))
        self._endpoint = _Endpoint()
        self._played: asyncio.Task[Any] | None = None
        self._trace: Any = None
        self._prompt: list[Message] = []
        self._read: list[Message] = []  # all that the model has read and written, as the harness tells it

    async def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        await self._endpoint.open()
        self._played = asyncio.create_task(self._play(_task_of(self._config, row_of(problem))))
        request = await self._next()
        if request is None:
            raise RuntimeError("the harness ended before it asked the model for anything")
        self.tools = [_bare(tool) for tool in request.get("tools") or ()]
        self._prompt = self._read = _messages(request)
        return self._prompt

    async def step(self, action: Action, seed: int) -> Step:
        said = _said(action)
        self._endpoint.answer(said, "tool_calls" if action.calls else action.finish)
        before, request = [*self._read, _message(said, {})], await self._next()
        if request is None:
            return Step(done=True)
        if [_bare(tool) for tool in request.get("tools") or ()] != self.tools:
            raise RuntimeError("the harness offers other tools than it began with, which stand in the prompt")
        self._read = now = _messages(request)
        new = now[len(before) :]
        if _same(now[: len(before)], before) and new and all(m["role"] in ("tool", "user") for m in new):
            return Step(messages=tuple(new))
        if not _same(now[: len(self._prompt)], self._prompt) or len(now) == len(self._prompt):
            raise RuntimeError(
                "the harness began another conversation (of another agent, or a summary in place of the task), and the "
                "rows of an episode have one prompt"
            )
        return Step(history=tuple(now[len(self._prompt) :]))

    async def grade(self, problem: Problem, transcript: Transcript) -> Grade:
        """The taskset's rewards of the run. One that a limit ended here ends there as by a limit of theirs."""
        assert self._played is not None
        if not self._played.done():
            self._trace.stop(_LIMITS.get(transcript.ended, transcript.ended))
            self._endpoint.refuse(f"rollout stopped: {self._trace.stop_condition}")
        trace = _trace_of(await self._played)
        missing = [name for name, reward in trace.rewards.items() if reward is None]
        if missing or not trace.rewards:
            raise RuntimeError(f"the taskset gave no reward {', '.join(missing)}".rstrip())
        return graded(trace.reward)

    async def close(self) -> None:
        if self._played is not None:
            self._played.cancel()
            await asyncio.wait([self._played])
        await self._endpoint.close()

    async def _play(self, task: Any) -> Any:
        v1 = _verifiers()
        client = v1.EvalClientConfig(base_url=self._endpoint.url, api_key_var=_MODEL)
        environment = v1.load_environment(self._config)
        async with environment.serving():
            context = v1.ModelContext(model=_MODEL, client=client)
            return await environment.run_episode(task, context, on_trace=self._began)

    def _began(self, trace: Any) -> None:
        if self._trace is not None:
            raise RuntimeError("the environment runs an agent twice in an episode; one run of one agent is a row")
        self._trace = trace

    async def _next(self) -> dict[str, Any] | None:
        """What the harness asks next; None: it asks no more."""
        assert self._played is not None
        asked = asyncio.create_task(self._endpoint.asked())
        await asyncio.wait([asked, self._played], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.cancel()
        _trace_of(self._played.result())
        return None


class _Endpoint:
    """Chat completions on loopback, behind a path that nobody can guess. One request at a time is answered."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[tuple[int, dict[str, Any]]]]]
        self._waiting: asyncio.Future[tuple[int, dict[str, Any]]] | None = None
        self._runner: Any = None
        self.url = ""

    async def open(self) -> None:
        web = importlib.import_module("aiohttp.web")  # verifiers brings it along
        self._requests, path = asyncio.Queue(), f"/{secrets.token_urlsafe(16)}"

        async def serve(request: Any) -> Any:
            body = await request.json()
            if odd := _refusal(body):
                return web.json_response({"error": {"message": odd}}, status=400)
            future: asyncio.Future[tuple[int, dict[str, Any]]] = asyncio.get_running_loop().create_future()
            self._requests.put_nowait((body, future))
            status, said = await future
            if status == 200 and body.get("stream"):
                text = "".join(f"data: {part}\n\n" for part in _as_stream(said))
                return web.Response(text=text, content_type="text/event-stream")
            return web.json_response(said, status=status)

        application = web.Application(client_max_size=_MAX_REQUEST_BYTES)
        application.router.add_post(f"{path}/chat/completions", serve)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}{path}"

    async def asked(self) -> dict[str, Any]:
        while True:
            body, future = await self._requests.get()
            if not future.done():  # whoever asked is still there
                self._waiting = future
                return body

    def answer(self, message: Mapping[str, Any], finish: str) -> None:
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        self._reply(
            200,
            {
                "id": secrets.token_hex(8),
                "object": "chat.completion",
                "created": 0,
                "model": _MODEL,
                "choices": [choice],
            },
        )

    def refuse(self, why: str) -> None:
        self._reply(400, {"error": {"message": why, "type": "invalid_request_error"}})

    def _reply(self, status: int, said: dict[str, Any]) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result((status, said))
        self._waiting = None

    async def close(self) -> None:
        self.refuse("the episode is over")
        if self._runner is not None:
            with contextlib.suppress(OSError):
                await self._runner.cleanup()


def _as_stream(said: Mapping[str, Any]) -> list[str]:
    """An answer that is there already, as the chunks of one that is being written."""
    (choice,) = said["choices"]
    calls = [{"index": at, **call} for at, call in enumerate(choice["message"].get("tool_calls") or ())]
    delta = {**choice["message"], **({"tool_calls": calls} if calls else {})}
    parts = ({"delta": delta, "finish_reason": None}, {"delta": {}, "finish_reason": choice["finish_reason"]})
    chunk = {**said, "object": "chat.completion.chunk"}
    return [*(json.dumps({**chunk, "choices": [{"index": 0, **part}]}) for part in parts), "[DONE]"]


def _verifiers() -> Any:
    try:
        return importlib.import_module("verifiers.v1")
    except ImportError as error:
        raise UserError(f'verifiers_v1: verifiers.v1 is missing ({error}); pip install "verifiers>=0.4"') from None


@lru_cache(maxsize=8)
def _config_of(taskset: str, given: str) -> Any:
    """Raises UserError for an environment that cannot be made, or is not of one agent that is the student."""
    v1, env = _verifiers(), json.loads(given)
    own = env.get("taskset") or {}
    if own.get("id", taskset) != taskset:
        raise UserError(f"verifiers_v1: env.taskset.id is {own['id']!r} and taskset {taskset!r}; leave the first out")
    try:
        kind = v1.env_config_type(taskset, env.get("id", ""))
        seats = [name for name, field in kind.model_fields.items() if isinstance(field.default, v1.AgentConfig)]
        local = {name: {"runtime": {"type": "subprocess"}, **(env.get(name) or {})} for name in seats}
        config = v1.resolve_env_config({**env, **local, "taskset": {**own, "id": taskset}})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"verifiers_v1: the environment of {taskset} cannot be made: {one_line(error)}") from None
    students = [name for name in seats if getattr(config, name).client is None]
    if len(students) != 1:
        raise UserError(
            f"verifiers_v1: the environment of {taskset} has {len(students)} agents that are the student "
            f"({', '.join(students)}), and an episode is one run of one; give the others a client of their own (env)"
        )
    (student,) = (getattr(config, name) for name in students)
    if capped := [f"env.{students[0]}.{name}" for name in _CAPS if getattr(student, name) is not None]:
        raise UserError(f"verifiers_v1: {capped[0]} is not known here; limits in tokens are those of [episode]")
    return config


def _task_of(config: Any, row: Mapping[str, Any]) -> Any:
    """Raises ValueError where the row is none of the taskset's."""
    kind = _verifiers().task_type(config.taskset.id)
    fields = kind.data_type().model_fields
    given = {name: row[name] for name in fields if name in row}
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].get("role") == "user":
        given["prompt"] = prompt[0]["content"]  # as most tasks have it; a harness may take text alone
    return kind(kind.data_type().model_validate(given), config.taskset.task)


def _trace_of(episode: Any) -> Any:
    """The one run. Raises RuntimeError where it failed: that says nothing of the model."""
    failed = [error for one in (episode, *episode.traces) for error in one.errors]
    if failed or len(episode.traces) != 1:
        said = f"{failed[-1].type}: {failed[-1].message}" if failed else f"{len(episode.traces)} runs of an agent"
        raise RuntimeError(said)
    return episode.traces[0]


def _refusal(body: Any) -> str | None:
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
        return "a request has messages"
    asked = [key for key, fine in _NOT_DONE.items() if body.get(key) is not None and body[key] not in fine]
    return f"the sampler of the run does not do {asked[0]}; see [sampling] and [episode]" if asked else None


def _bare(tool: Mapping[str, Any]) -> Tool:
    return {"type": "function", "function": {key: value for key, value in tool["function"].items() if key != "strict"}}


def _said(action: Action) -> dict[str, Any]:
    """A turn as a server would say it: its calls apart from its words."""
    if not action.calls:
        return {"role": "assistant", "content": action.text}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for call in action.calls
    ]
    return {"role": "assistant", "content": words_of(action.text), "tool_calls": calls}


def _messages(request: Mapping[str, Any]) -> list[Message]:
    names: dict[str, str] = {}
    return [_message(message, names) for message in request["messages"]]


def _message(message: Mapping[str, Any], names: dict[str, str]) -> Message:
    """Text alone. names: of the calls so far, by id. Raises ValueError for what is no text."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        if odd := [part.get("type") for part in content if part.get("type") != "text"]:
            raise ValueError(f"a message of the harness has a part of type {odd[0]!r}; the student reads text alone")
        content = "\n".join(part["text"] for part in content)
    said: dict[str, Any] = {"role": str(message["role"]), "content": content}
    if said["role"] == "tool":
        own = str(message.get("tool_call_id"))
        said |= {"tool_call_id": own, "name": names.get(own, "unknown")}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [_call(call) for call in calls]
        names.update({call["id"]: call["function"]["name"] for call in said["tool_calls"]})
    return said


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.loads(function["arguments"] or "{}")
    return {"type": "function", "id": str(call["id"]), "function": {"name": function["name"], "arguments": arguments}}


def _same(left: Sequence[Message], right: Sequence[Message]) -> bool:
    """Whether they say the same: a harness may strip the words of the model."""
    return [_stripped(message) for message in left] == [_stripped(message) for message in right]


def _stripped(message: Message) -> Message:
    return {**message, "content": message["content"].strip()} if message["role"] == "assistant" else message
