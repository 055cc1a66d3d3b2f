"""HumanEval through the code task: every canonical solution passes, systematic mutants of them fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdkit.tasks.code.task import CodeTask
from opdkit.tasks.sandbox import Sandbox
from opdkit.types import Problem

HUMANEVAL = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval" / "test.jsonl"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox exists on Linux only")


@pytest.fixture(scope="module")
def task() -> Iterator[CodeTask]:
    task = CodeTask(sandbox=Sandbox(num_slots=2))
    yield task
    task.close()


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def humaneval() -> list[tuple[Problem, dict[str, str]]]:
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL.parent} is absent: the data sets are not part of the repository")
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
    return [
        (
            Problem(
                id=row["task_id"],
                task="code",
                messages=({"role": "user", "content": row["prompt"]},),
                meta={
                    "style": "program",
                    "entry_point": row["entry_point"],
                    "starter": row["prompt"],
                    "tests": [{"program": f"{row['test']}\ncheck({row['entry_point']})"}],
                },
            ),
            row,
        )
        for row in rows
    ]


def test_all_canonical_solutions_pass(task: CodeTask) -> None:
    """82 of 82, each with the dataset's own test program."""
    pairs = humaneval()
    grades = task.grade([(p, fenced(row["prompt"] + row["canonical_solution"])) for p, row in pairs])
    assert {p.id: g for (p, _), g in zip(pairs, grades, strict=True) if g.score != 1.0} == {}
    assert len(grades) == 82


_NEIGHBOUR = """
def neighbour(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, (list, tuple)): return type(value)([*value, None])
    if isinstance(value, dict): return {**value, "x": None}
    return object()
"""
# Each is put behind a right solution NAME and must make it fail.
MUTANTS = {
    "returns nothing": "def NAME(*a): return None",
    "raises": "def NAME(*a): raise ValueError",
    "returns a neighbour": _NEIGHBOUR + "def NAME(*a, _right=NAME): return neighbour(_right(*a))",
    "is wrong the first time": _NEIGHBOUR
    + """
calls = []
def NAME(*a, _right=NAME):
    calls.append(a)
    return neighbour(_right(*a)) if len(calls) == 1 else _right(*a)""",
    "wraps the answer": "def NAME(*a, _right=NAME): return {'answer': _right(*a)}",
    "equals everything": """
class Equal:
    __eq__ = __le__ = __lt__ = __ge__ = __gt__ = lambda self, other: True
    __hash__ = lambda self: 0
def NAME(*a): return Equal()""",
    "leaves with success": "import sys\ndef NAME(*a): sys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_canonical_solutions_fail(task: CodeTask, mutant: str) -> None:
    """None of 82 wrong programs passes. Says nothing about errors that the dataset's tests do not look for."""
    items = []
    for p, row in humaneval():
        behind = MUTANTS[mutant].replace("NAME", row["entry_point"])
        items.append((p, fenced(row["prompt"] + row["canonical_solution"] + "\n" + behind)))
    survivors = [p.id for (p, _), g in zip(items, task.grade(items), strict=True) if g.score != 0.0]
    assert survivors == []
