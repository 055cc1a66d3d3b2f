"""What an option of an adapter names: a class or function in a file or a module, as `environment` itself names one."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Grade
from opdkit.tasks.user._worker import import_named
from opdkit.types import Problem

_CALLS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|^\s*\{(?=\s*\"name\")|<\|channel\|>commentary")


@lru_cache(maxsize=64)  # once for all episodes of a worker
def named(reference: str) -> Any:
    """Raises UserError where there is none."""
    module_name = reference.partition(":")[0]
    path = content = None
    if module_name.endswith(".py"):
        file = Path(module_name).expanduser()
        if not file.is_file():
            raise UserError(f"there is no file {file} (looked up from {Path.cwd()})")
        path, content = str(file.resolve()), base64.b64encode(file.read_bytes()).decode()
    return import_named(reference, path, content, lambda module: "", "name behind a colon, file.py:NAME")[2]


def row_of(problem: Problem) -> dict[str, Any]:
    """The row of the data as other libraries hand it to an environment: its columns, and what a problem has besides."""
    own = {"id": problem.id, "prompt": [dict(message) for message in problem.messages]}
    own |= {"answer": problem.gold} if problem.gold is not None else {}
    return {**own, **problem.meta, **problem.columns, **problem.row}


def plain(value: Any) -> Any:
    """A pydantic object, or a table of some, as JSON has it."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def graded(score: float) -> Grade:
    """A reward as a grade: from 1 on it is right."""
    return Grade(score=float(score), verdict="correct" if score >= 1 else "wrong")


def words_of(text: str) -> str:
    """What a turn says in front of its calls."""
    return _CALLS.split(text)[0].strip()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def as_text(value: Any) -> str:
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
