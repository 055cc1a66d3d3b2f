"""What runs behind the walls. One process does one of five things and never returns:

    script   the program is __main__; what it prints is its answer
    call     a function of the program, or a method of its class Solution, is called once; its result is written as JSON
    serve    that function is called as often as the process at the other end of the link asks; the tests are not here
    cells    pieces of a program, one after the other, in one interpreter that stays (`session.py`)
    judge    the tests run here, and their calls go over the link; the program is not here

Nothing here is trusted by the trainer, except a judge, in which no code of the graded program ever runs.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import importlib
import io
import json
import linecache
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from opdkit.tasks.sandbox import link
from opdkit.tasks.sandbox.values import encode

PROGRAM, TESTS = "solution.py", "tests.py"
_SHOWN = {PROGRAM, TESTS}  # tracebacks begin in these
# LeetCode and LiveCodeBench give these names to a `class Solution` without being asked.
_CUSTOMARY_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
_CUSTOMARY_RECURSION_LIMIT = 50_000
_DEVICES = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_FAILED = 1


def run(task: dict[str, Any]) -> NoReturn:
    """task: mode, source, and by mode: starter, entry_point, args (call)."""
    _tidy()
    try:
        with suppress(SystemExit):
            _MODES[task["mode"]](task)
        _flush()
        os._exit(0)
    except BaseException as error:
        _show(error)
    os._exit(_FAILED)


def _customary_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    modules = [importlib.import_module(name) for name in _CUSTOMARY_MODULES]
    for module in modules:
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        names |= {name: getattr(module, name) for name in public}
    return names | {module.__name__: module for module in modules}


_CUSTOMARY_NAMES = _customary_names()


def _run_script(task: dict[str, Any]) -> None:
    module = _new_module("__main__")
    code = 0
    try:
        _execute(task["source"], PROGRAM, module)
        if threading.active_count() > 1:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for them, as the interpreter does at its end
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException as error:
        _show(error)
        code = _FAILED
    with suppress(BaseException):
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BaseException as error:  # for one, the output is over its limit
        _show(error)
        code = code or _FAILED
    os._exit(code)


def _run_call(task: dict[str, Any]) -> None:
    result_file = os.dup(1)
    os.dup2(2, 1)  # prints do no harm
    sys.setrecursionlimit(_CUSTOMARY_RECURSION_LIMIT)
    module = _new_module("solution")
    vars(module).update(_CUSTOMARY_NAMES)
    vars(module).pop(task["entry_point"], None)  # operator.add must not stand in for the program's own add
    _execute(task["source"], PROGRAM, module)
    result = _find(module, task["entry_point"])(*task["args"])
    _write_all(result_file, json.dumps(_as_json(encode(result))).encode())


def _run_serve(task: dict[str, Any]) -> None:
    module = _new_module("solution")
    _execute(task["starter"], "starter.py", module)
    vars(module).pop(task["entry_point"], None)  # the starter's is empty, and must not stand in for a missing answer
    _execute(task["source"], PROGRAM, module)
    link.serve(_find(module, task["entry_point"]), describe=_describe)


def _run_cells(task: dict[str, Any]) -> None:
    """What a piece prints, the value of its last expression, and its traceback are its output, which the trainer has
    read when it sends the next one."""
    module = _new_module("__main__")
    os.dup2(1, 2)
    for number, source in enumerate(link.pieces()):
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
        name = f"cell_{number + 1}.py"
        _SHOWN.add(name)
        try:
            *statements, last = ast.parse(source, name).body or [ast.Pass()]
            shows = isinstance(last, ast.Expr)
            _execute(source, name, module, ast.Module([*statements, *([] if shows else [last])], []))
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), module.__dict__)
                if value is not None:
                    print(repr(value))
        except BaseException as error:
            _show(error)
        _flush()


def _run_judge(task: dict[str, Any]) -> None:
    result_file = os.dup(1)
    os.dup2(2, 1)
    module = _new_module("tests")
    candidate = link.Candidate(task["entry_point"])
    report: dict[str, Any] = {"verdict": "pass", "detail": None}
    try:
        _execute(task["starter"], "starter.py", module)
        setattr(module, task["entry_point"], candidate)
        _execute(task["source"], TESTS, module)
        if candidate.num_calls == 0:
            report = {"verdict": "broken_test", "detail": f"the test never calls {task['entry_point']}"}
    except BaseException as error:
        if candidate.num_calls == 0 or isinstance(error, link.Unsendable):
            report = {"verdict": "broken_test", "detail": _describe(error)}
        elif error is candidate.last_error:
            report = {"verdict": "runtime_error", "detail": candidate.last_traceback}
        else:
            report = {"verdict": "wrong", "detail": _describe(error)}
    if candidate.is_gone:  # whatever the test made of that
        report = {"verdict": "gone", "detail": None}
    report["call"] = candidate.last_call
    _write_all(result_file, json.dumps(report).encode())


_MODES: dict[str, Callable[[dict[str, Any]], None]] = {
    "script": _run_script,
    "call": _run_call,
    "serve": _run_serve,
    "cells": _run_cells,
    "judge": _run_judge,
}


def _tidy() -> None:
    """An interpreter as a program expects it at its start."""
    sys.argv = [PROGRAM]
    sys.path = []  # what is not loaded by now cannot be
    random.seed(0)  # the same program gets the same verdict
    plain_open = io.open

    def open_device(file: Any, *arguments: Any, **options: Any) -> Any:
        return plain_open(_DEVICES.get(file, file) if isinstance(file, str) else file, *arguments, **options)

    builtins.open = io.open = open_device


def _new_module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def _execute(source: str, name: str, module: ModuleType, tree: ast.Module | None = None) -> None:
    """tree: the part of the source that is run; None: all of it."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    exec(compile(source if tree is None else tree, name, "exec", dont_inherit=True), module.__dict__)


def _find(module: ModuleType, entry_point: str) -> Callable[..., Any]:
    function = getattr(module, entry_point, None)
    if function is None and hasattr(module, "Solution"):
        function = getattr(module.Solution(), entry_point, None)
    if function is None:
        raise NameError(f"the program defines no {entry_point!r}")
    return function


def _as_json(tree: Any) -> Any:
    """An encoded value as LiveCodeBench writes expected outputs: every collection is a list, keys are strings."""
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    if kind == "dict":
        return {k if isinstance(k, str) else json.dumps(_as_json(k)): _as_json(v) for k, v in content}
    if kind in ("set", "frozenset"):
        with suppress(TypeError):
            content = sorted(content)
    if kind in ("list", "tuple", "set", "frozenset", "deque"):
        return [_as_json(item) for item in content]
    if kind == "int":
        return int(content, 16)
    raise TypeError(f"the program returned a value of type {kind}, which has no JSON form")


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    with suppress(BaseException):
        print(error.code, file=sys.stderr)
    return _FAILED


def _show(error: BaseException) -> None:
    with suppress(BaseException):
        sys.stderr.write(_describe(error))
    _flush()


def _describe(error: BaseException) -> str:
    """The traceback from the program's first line on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename not in _SHOWN:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
