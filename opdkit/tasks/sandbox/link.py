"""The two ends of a test that runs apart from the program it tests: calls one way, results the other, as JSON.

    request  {"args": [...], "kwargs": {...}}
    reply    {"result": value, "args": [...] or null if unchanged}
             or {"error": type name, "message": ..., "traceback": ...}

The serving end is hostile: it may send anything at any time. The judging end takes only plain values from it.
"""

from __future__ import annotations

import builtins
import json
import os
import reprlib
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opdkit.tasks.sandbox.values import decode, encode

LINK = 3  # descriptor
MAX_FRAME_BYTES = 1 << 24
_LENGTH = struct.Struct("!I")
_MAX_TRACEBACK = 4000
# How values stand in a report: the cost must not grow with them.
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = _SHORT.maxdeque = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
# These would end a loop over map(...) in the tests as if there were nothing more to check.
_NEVER_RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit")


class CandidateGone(BaseException):
    """The other process has ended or talks nonsense. Not an Exception, so that no test takes it for one of its own."""


class Unsendable(BaseException):
    """The test passes an argument that has no plain form; it cannot be run apart from the program."""


class CandidateError(Exception):
    """The function raised an exception that is no plain built-in one."""


class Candidate:
    """Stands for the tested function among the tests."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.num_calls = 0
        self.is_gone = False
        self.last_call: str | None = None
        self.last_error: Exception | None = None
        self.last_traceback: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        shown = [_SHORT.repr(value) for value in args] + [f"{n}={_SHORT.repr(value)}" for n, value in kwargs.items()]
        self.last_call = f"{self.__name__}({', '.join(shown)})"
        try:
            request = {"args": [encode(value) for value in args], "kwargs": {k: encode(v) for k, v in kwargs.items()}}
        except TypeError as error:
            raise Unsendable(str(error)) from error
        try:
            _send(request)
            reply = _receive()
            if "error" in reply:
                self.last_traceback = str(reply["traceback"])[-_MAX_TRACEBACK:]
                self.last_error = _exception(str(reply["error"]), str(reply["message"]))
            else:
                result = decode(reply["result"])
                if reply["args"] is not None:
                    _change_in_place(args, [decode(value) for value in reply["args"]])
        except (EOFError, OSError, ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
            self.is_gone = True
            raise CandidateGone from error
        if "error" in reply:
            assert self.last_error is not None
            raise self.last_error
        self.last_call += f" -> {_SHORT.repr(result)}"
        return result


def serve(function: Callable[..., Any], describe: Callable[[BaseException], str]) -> None:
    """Answers calls until the judge hangs up."""
    while True:
        try:
            request = _receive()
        except EOFError:
            return
        try:
            args = [decode(value) for value in request["args"]]
            result = function(*args, **{name: decode(value) for name, value in request["kwargs"].items()})
            changed = [encode(value) for value in args]
            reply = {"result": encode(result), "args": changed if changed != request["args"] else None}
            message = json.dumps(reply).encode()
            if len(message) > MAX_FRAME_BYTES:
                raise ValueError(f"the result is over {MAX_FRAME_BYTES:,} bytes")
        except Exception as error:
            reply = {"error": type(error).__name__, "message": str(error)[:1000]}
            reply["traceback"] = describe(error)[-_MAX_TRACEBACK:]
            message = json.dumps(reply).encode()
        _send_bytes(message)


def pieces() -> Iterator[str]:
    """What the trainer sends to be run, one by one; each has been run when the next is asked for."""
    while True:
        try:
            request = _receive()
        except EOFError:
            return
        yield str(request["source"])
        _send({"done": True})


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in _NEVER_RAISED:
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want five arguments
            pass
    return CandidateError(f"{name}: {message}")


def _change_in_place(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """What the function did to its arguments is done to the test's objects."""
    for mine, other in zip(ours, theirs, strict=True):
        if type(mine) is not type(other):
            continue
        if isinstance(mine, list | bytearray):
            mine[:] = other
        elif isinstance(mine, dict | set):
            mine.clear()
            mine.update(other)
        elif isinstance(mine, deque):
            mine.clear()
            mine.extend(other)


def _send(message: dict[str, Any]) -> None:
    _send_bytes(json.dumps(message).encode())


def _send_bytes(message: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(message)) + message)
    while view:
        view = view[os.write(LINK, view) :]


def _receive() -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_receive_exactly(_LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {length:,} bytes")
    message = json.loads(_receive_exactly(length))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _receive_exactly(num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        data = os.read(LINK, min(1 << 20, num_bytes - len(received)))
        if not data:
            raise EOFError("the other end is closed")
        received += data
    return bytes(received)
