"""The far side of `user_task.py`: a process of its own in which a user's file is imported, makes its task, and grades.

    import -> what it defines and takes -> make, with the options -> for every request: grade, describe, or close

Requests and replies are frames of JSON (`_worker.py`). It has the trainer's environment, folder and rights, since it is
the user's code; what it prints goes to the trainer's standard error.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks._worker import receive_frame, send_frame
from opdkit.tasks.arguments import argument_as_json, option_arguments, value_from_json
from opdkit.tasks.base import Grade, GraderDown, checked, place_and_fault
from opdkit.tasks.guard import numbers_of
from opdkit.tasks.user.rewards import RewardTask, asked_columns, is_reward_function, reward_faults
from opdkit.types import Problem

DEFAULT_NAMES = ("grade", "Task")
TIME_LIMIT_S = 30.0  # of one answer, where the task says nothing

_FAILURES = (Exception, SystemExit)
_ORPHAN_CHECK_S = 0.5
_INSTALLED = {"site-packages", "dist-packages"}


def serve(descriptor: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # when memory runs out, this process goes before the trainer
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    channel, own_pid, served = socket.socket(fileno=descriptor), os.getpid(), _Served()
    while True:
        try:
            request = json.loads(receive_frame(channel))
        except (EOFError, OSError):
            return
        number = request.pop("number")
        try:
            reply = served.answer(request)
            json.dumps(reply)
        except GraderDown as error:
            reply = {"fault": "down", "said": str(error)}
        except UserError as error:
            reply = {"fault": "user", "said": str(error)}
        except BaseException as error:
            reply = {"fault": "failed", "said": place_and_fault(error, skip=__file__)}
        if os.getpid() != own_pid:
            os._exit(0)  # a process that the grader forked came back here as well
        send_frame(channel, json.dumps({**reply, "number": number}).encode())


class _Served:
    """The user's code, once it is there."""

    found: Any
    task: Any

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        does: Callable[..., dict[str, Any]] = getattr(self, f"_{request.pop('do')}")
        return does(**request)

    def _import(self, reference: str, path: str | None, content: str | None) -> dict[str, Any]:
        """content: of the file, in base64. It is what runs, whatever the file holds by now."""
        module, chosen, found = import_named(reference, path, content, _default_name, " or ".join(DEFAULT_NAMES))
        if inspect.isclass(found):
            if not callable(getattr(found, "grade", None)):
                raise UserError(f"the class {chosen} has no method grade(self, items)")
        elif is_reward_function(found):
            if fault := reward_faults(found, chosen):
                raise UserError(fault)
        elif not callable(found) or not _takes_two(found):
            raise UserError(f"{chosen} is neither a function of (problem, text) nor a class, nor of completions")
        self.found, rewards = found, is_reward_function(found)
        limit = getattr(found, "time_limit_s", TIME_LIMIT_S)
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < float("inf"):
            raise UserError(f"time_limit_s of {chosen} is {limit!r}; give seconds, above 0")
        return {
            "arguments": [] if rewards else [argument_as_json(argument) for argument in option_arguments(found)],
            "columns": asked_columns(found) if rewards else [],
            "needs_gold": bool(getattr(found, "needs_gold", False)),
            "takes_batches": inspect.isclass(found) or rewards,
            "time_limit_s": float(limit),
            "files": files_of(module, None if path is None else Path(path)),
        }

    def _make(self, options: Any) -> dict[str, Any]:
        plain = value_from_json(options)
        if is_reward_function(self.found):
            self.task = RewardTask(self.found, self.found.__name__)
        else:
            self.task = self.found(**plain) if inspect.isclass(self.found) else _FunctionTask(self.found, plain)
        return {name: hasattr(self.task, name) for name in ("describe", "main")}

    def _grade(self, problems: list[dict[str, Any]], items: list[tuple[int, str]], main: bool) -> dict[str, Any]:
        """items: place in `problems`, and text."""
        known = [Problem(**{**said, "messages": tuple(said["messages"])}) for said in problems]
        task = self.task.main if main else self.task
        grades = list(task.grade([(known[place], text) for place, text in items]))
        if len(grades) != len(items):
            raise ValueError(f"{len(grades)} grades for {len(items)} answers")
        return {"grades": [grade_as_json(checked(grade)) for grade in grades], "stats": numbers_of(self.task)}

    def _describe(self) -> dict[str, Any]:
        return {"said": json.loads(json.dumps(self.task.describe(), default=str))}

    def _close(self) -> dict[str, Any]:
        close = getattr(self.task, "close", None)
        if close is not None:
            close()
        return {}


class _FunctionTask:
    """A function of one answer as a task."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function, self._options = function, options

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [_as_grade(self._function(problem, text, **self._options), text) for problem, text in items]


def _as_grade(said: Any, text: str) -> Grade:
    """A number is a score, and the whole text the answer."""
    if isinstance(said, Grade):
        return said
    if not isinstance(said, Real):
        raise TypeError(f"grade returned {type(said).__name__}, neither a Grade nor a number")
    score = float(said)
    return Grade(score=score, verdict="correct" if score >= 1 else "wrong", parsed=text.strip())


def grade_as_json(grade: Grade) -> dict[str, Any]:
    """As `grade_from_json` reads it."""
    return {
        "score": None if grade.score is None else float(grade.score),
        "verdict": grade.verdict,
        "parsed": grade.parsed,
        "feedback": grade.feedback,
        "said_accuracy": None if grade.accuracy is None else float(grade.accuracy),
        "said_numbers": {str(name): float(number) for name, number in grade.numbers.items()},
    }


def import_named(
    reference: str, path: str | None, content: str | None, default: Callable[[ModuleType], str], wanted: str
) -> tuple[ModuleType, str, Any]:
    """The module, a name in it and what has that name. default: the name where the reference has none ("": nothing
    fits); wanted: what it is then called in the sentence of the UserError. content: of the file, in base64."""
    module_name, _, name = reference.partition(":")
    if path is not None and content is not None:
        module, shown = from_file(Path(path), base64.b64decode(content)), module_name
    else:
        module, name = from_module(module_name, name)
        shown = module.__name__
    chosen = name or default(module)
    found: Any = getattr(module, chosen, None) if chosen else None
    if found is None:
        has = ", ".join(public_names(module)) or "nothing"
        raise UserError(f"{shown} has no {name or wanted}; it defines {has}")
    return module, chosen, found


def _default_name(module: ModuleType) -> str:
    return next((name for name in DEFAULT_NAMES if hasattr(module, name)), "")


def from_file(path: Path, content: bytes) -> ModuleType:
    """The module that the content is, as of this path. Raises UserError where it cannot be imported."""
    spec = importlib.util.spec_from_file_location(f"opdkit_user_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    _also_look_in(path.parent)
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except _FAILURES as error:
        raise UserError(f"{path} cannot be imported: {place_and_fault(error, skip=__file__)}") from error
    return module


def from_module(module_name: str, name: str) -> tuple[ModuleType, str]:
    """The module and the name in it; "package.thing" is a module, or the name of something in a package."""
    _also_look_in(Path.cwd())
    try:
        return importlib.import_module(module_name), name
    except ModuleNotFoundError as error:
        parent, _, last = module_name.rpartition(".")
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise UserError(f"{module_name} cannot be imported: {place_and_fault(error)}") from error
        if name or not parent or error.name != module_name:
            raise UserError(f"there is no module {error.name} (looked up in {Path.cwd()} as well)") from None
        return from_module(parent, "grade")[0], last
    except _FAILURES as error:
        raise UserError(f"{module_name} cannot be imported: {place_and_fault(error)}") from error


def _also_look_in(folder: Path) -> None:
    """Last: nothing that is installed is hidden by it."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def files_of(module: ModuleType, path: Path | None) -> dict[str, list[str]]:
    """{"": of the task, " imports NAME": of what it imports from its own folder or package}: path, and sha256."""
    own = Path(getattr(module, "__file__", None) or "") if path is None else path
    package = module.__name__.partition(".")[0] if path is None else ""
    first = getattr(sys.modules.get(package), "__file__", None) or own
    folder = Path(first).parent
    found = {"": own} if own.name else {}
    for other in list(sys.modules.values()):
        file = Path(getattr(other, "__file__", None) or "")
        if file.suffix == ".py" and file.is_relative_to(folder) and file != own and file.is_file():
            part = file.relative_to(folder)
            if not _INSTALLED & set(part.parts) and not other.__name__.startswith("opdkit."):
                found[f" imports {part}"] = file
    return {key: [str(file), hashlib.sha256(file.read_bytes()).hexdigest()] for key, file in sorted(found.items())}


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it can be called with a problem and a text."""
    try:
        inspect.signature(function).bind_partial(None, "")
    except (TypeError, ValueError):
        return False
    return True


def public_names(module: ModuleType) -> list[str]:
    names = [name for name in vars(module) if not name.startswith("_")]
    return [name for name in names if getattr(vars(module)[name], "__module__", "") == module.__name__][:8]


def end_with(parent: int) -> None:
    """The trainer may be killed in the middle of a grade; nothing outlives it."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_CHECK_S)
    os.killpg(0, signal.SIGKILL)
