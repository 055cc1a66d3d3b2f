"""The far side of `workers.py`: a process in which environments are imported and made, and many episodes live.

    import -> what it defines and takes -> make, with the options -> batches of: reset, step, grade, close

It does one thing after the other; where an environment's methods are `async def`, its episodes wait side by side.
Requests and replies are frames of JSON (`tasks/_worker.py`). It has the trainer's rights and environment, since
it is the user's code; what it prints goes to the trainer's standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.held import Held, Maker, is_environment, maker_of
from opdkit.tasks._worker import receive_frame, send_frame
from opdkit.tasks.arguments import argument_as_json, option_arguments, value_from_json
from opdkit.tasks.base import place_and_fault
from opdkit.tasks.user._worker import end_with, files_of, import_named
from opdkit.types import Problem


def serve(descriptor: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # when memory runs out, this process goes before the trainer
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    asyncio.run(_Served(socket.socket(fileno=descriptor)).run())


class _Raised(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _told_apart(asked: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """What the environment raises is told apart from what waiting for it does."""
    try:
        return await asked
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        raise _Raised(error) from None


class _Served:
    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._own_pid = channel, os.getpid()
        self._maker: Maker | None = None
        self._options: dict[str, Any] = {}
        self._max_calls = 0
        self._episodes: dict[int, Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_read, args=(self._channel, loop, frames), daemon=True).start()
        while (frame := await frames.get()) is not None:
            request = json.loads(frame)
            if "do" in request:
                self._send(await self._asked(request))
                continue
            for item in request["items"]:
                task = loop.create_task(self._item(item))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        number, does = request.pop("number"), getattr(self, f"_{request.pop('do')}")
        try:
            reply = {"number": number, **(await does(**request))}
            json.dumps(reply)
        except UserError as error:
            reply = {"number": number, "fault": "user", "said": str(error)}
        except BaseException as error:
            reply = {"number": number, "fault": "failed", "said": place_and_fault(error, skip=__file__)}
        return reply

    async def _import(self, reference: str, path: str | None, content: str | None) -> dict[str, Any]:
        wanted = "one class of an environment, nor TOOLS"
        module, chosen, found = import_named(reference, path, content, _default_name, wanted)
        self._maker = maker_of(found, chosen)
        return {
            "columns": list(getattr(found, "asks_columns", ())),
            "arguments": [argument_as_json(argument) for argument in option_arguments(self._maker.make)],
            "files": files_of(module, None if path is None else Path(path)),
        }

    async def _make(self, options: Any, max_calls: int) -> dict[str, Any]:
        """Makes one, to see whether it can be made and what it is."""
        assert self._maker is not None
        self._options, self._max_calls = value_from_json(options), max_calls
        held = Held(self._maker, self._options, max_calls)
        return held.described

    async def _item(self, item: dict[str, Any]) -> None:
        started_s, limit_s = time.monotonic(), item.get("limit_s")
        try:
            asked = _told_apart(self._does(item))
            said = await (asked if limit_s is None else asyncio.wait_for(asked, limit_s))
            json.dumps(said)
        except TimeoutError:  # not the environment's own: that is told apart
            said = {"fault": "timeout", "said": f"no result within {limit_s:g} s"}
        except _Raised as raised:
            said = {"fault": "crash", "said": place_and_fault(raised.error, skip=__file__)}
        except (TypeError, ValueError, RecursionError) as error:
            said = {"fault": "crash", "said": f"what it said cannot be sent: {error}"}
        if os.getpid() != self._own_pid:
            os._exit(0)  # a process that the environment forked came back here as well
        now_s = time.monotonic()
        # At once: what is asked next may never end, and must not be taken for this.
        self._send({"number": item["number"], **said, "seconds": now_s - started_s, "at": now_s})

    async def _does(self, item: dict[str, Any]) -> dict[str, Any]:
        episode, what = item["episode"], item["what"]
        if what == "reset":
            assert self._maker is not None
            said = item["problem"]
            problem = Problem(**{**said, "messages": tuple(said["messages"])})
            held = self._episodes[episode] = Held(self._maker, self._options, self._max_calls)
            return await held.reset(problem, item["seed"])
        if what == "close":
            held_or_none = self._episodes.pop(episode, None)
            return {} if held_or_none is None else await held_or_none.close()
        held = self._episodes[episode]
        return await (held.step(item["action"], item["seed"]) if what == "step" else held.grade(item["transcript"]))

    def _send(self, said: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone, and this process goes with it
            send_frame(self._channel, json.dumps(said).encode())


def _read(channel: socket.socket, loop: asyncio.AbstractEventLoop, frames: asyncio.Queue[bytes | None]) -> None:
    while True:
        try:
            frame = receive_frame(channel)
        except (EOFError, OSError):
            frame = None
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(frames.put_nowait, frame)
        if frame is None:
            os._exit(0)  # whatever an environment may still be doing


def _default_name(module: ModuleType) -> str:
    fitting = [name for name, found in vars(module).items() if is_environment(found, module.__name__)]
    return fitting[0] if len(fitting) == 1 else "TOOLS" if hasattr(module, "TOOLS") else ""
