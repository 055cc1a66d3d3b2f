"""Python as a tool, in the sandbox of `opdkit/tasks/sandbox/`: no file, no network, no other process.

state = false: every call is a program of its own. state = true: an episode has one interpreter, which keeps what calls
defined, and is ended with the episode; one that runs too long, or is over its memory, is ended too, and the next call
begins anew, which the model is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from opdkit.rollouts.environments.base import Action, Call, Failure, Step
from opdkit.rollouts.environments.functions import message_of
from opdkit.tasks.base import Option
from opdkit.tasks.sandbox import DEFAULT_PRELOAD, Limits
from opdkit.tasks.sandbox.session import Interpreter, Interpreters, Ran
from opdkit.types import Message, Problem

_MAX_OUTPUT_BYTES = 64_000  # the recipe's limit in tokens is the one that is felt
_EPISODE_S = 24 * 3600.0  # an interpreter waits for its model longer than it runs
_AT_ONCE = 32  # calls of a worker that run at one time
_shared: dict[tuple[int, float], Interpreters] = {}  # of this worker process: one fork server for all its episodes
_threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="python-tool")


class Python:
    """One tool, `python(code)`."""

    def __init__(
        self,
        state: Annotated[bool, Option("keep one interpreter an episode; false: a new one for every call")] = False,
        time_limit_s: Annotated[float, Option("wall time of a call", above=0)] = 6.0,
        memory_limit_mb: Annotated[int, Option("beyond an idle interpreter", at_least=1)] = 512,
        cpu_limit_s: Annotated[float, Option("CPU time of an interpreter: of all its calls", above=0)] = 60.0,
    ) -> None:
        self._state, self._time_limit_s = state, time_limit_s
        self._limits = (memory_limit_mb, cpu_limit_s)
        self._interpreter: Interpreter | None = None
        kept = "What was defined before is still there." if state else "Every call starts anew."
        description = f"Runs Python and returns what it prints, or the value of the last line. {kept}"
        argument = {"type": "string", "description": "the program"}
        parameters = {"type": "object", "properties": {"code": argument}, "required": ["code"]}
        function = {"name": "python", "description": description, "parameters": parameters}
        self.tools = [{"type": "function", "function": function}]

    def reset(self, problem: Problem, seed: int) -> Sequence[Message]:
        return problem.messages

    async def step(self, action: Action, seed: int) -> Step:
        if not action.calls:
            return Step(done=True)
        messages = []
        for call in action.calls:
            code = str((call.arguments or {})["code"])
            ran = await asyncio.get_running_loop().run_in_executor(_threads, self._run, code)
            messages.append(_said(call, ran, self._state))
        return Step(messages=tuple(messages))

    def close(self) -> None:
        if self._interpreter is not None:
            self._interpreter.close()
            self._interpreter = None

    def _run(self, code: str) -> Ran:
        if self._interpreter is None:
            self._interpreter = _interpreters(*self._limits).open()
        ran = self._interpreter.run(code, limit_s=self._time_limit_s, max_bytes=_MAX_OUTPUT_BYTES)
        if ran.over is not None or not self._state:
            self.close()
        return ran


def _interpreters(memory_mb: int, cpu_s: float) -> Interpreters:
    key = (memory_mb, cpu_s)
    if key not in _shared:
        limits = Limits(cpu_s=cpu_s, wall_s=_EPISODE_S, memory_mb=memory_mb)
        _shared[key] = Interpreters(limits=limits, preload=DEFAULT_PRELOAD)
    return _shared[key]


def _said(call: Call, ran: Ran, state: bool) -> dict[str, str]:
    text = ran.output.decode(errors="replace").rstrip("\n")
    if ran.over is None:
        return message_of(call, text)
    failure: Failure = "timeout" if ran.over.startswith("it ran longer") else "tool_error"
    lost = "; what was defined is lost" if state else ""
    return message_of(call, f"{text}\nerror: {ran.over}{lost}".lstrip("\n"), failure)
