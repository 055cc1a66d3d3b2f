"""What one test says about a program: its output, seen from outside, against what was expected. Runs in the trainer.

The outputs are hostile text: they are decoded, split and compared, and JSON is parsed; nothing else is done with them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opdkit.tasks.base import whole_text
from opdkit.tasks.code.problem import CodeProblem, json_values
from opdkit.tasks.sandbox import Done, End

TestVerdict = Literal["pass", "wrong", "runtime_error", "time", "memory", "output_limit", "not_run", "error"]

_MAX_KEPT = 1000  # characters of an output or error text that outlive the comparison
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_ROOM_FOR_SPACE_BYTES = 1 << 20
_BLOCKED = re.compile(r"^(?:PermissionError|BlockingIOError)\b|Operation not permitted", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """error: the test or the sandbox failed, which says nothing about the program."""

    __test__ = False  # pytest: not a test

    verdict: TestVerdict
    output: str = ""  # the beginning of what it printed or returned
    detail: str = ""  # the end of its error text, or what the test program says
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("output", "detail"):
            object.__setattr__(self, name, whole_text(getattr(self, name)))

    @property
    def is_blocked(self) -> bool:
        """Whether it failed on a wall of the sandbox. A rising share of these is reward hacking."""
        return self.verdict == "runtime_error" and _BLOCKED.search(self.detail) is not None


def judge(problem: CodeProblem, index: int, done: Done) -> TestResult:
    if done.error is not None:
        return TestResult(verdict="error", detail=done.error[-_MAX_KEPT:])
    if problem.style == "program":
        return _judge_test_program(*done.ends)
    (end,) = done.ends
    verdict = _how_it_ended(end)
    if verdict is None:
        expected = problem.tests[index]["output"]
        verdict = _compare(problem, end, expected)
    return TestResult(
        verdict=verdict,
        output=end.stdout[: 4 * _MAX_KEPT].decode(errors="replace")[:_MAX_KEPT],
        detail=end.stderr[-_MAX_KEPT:],
        cpu_s=end.cpu_s,
    )


def outputs_match(printed: str, expected: str, float_tolerance: float | None) -> bool:
    """Line by line; spaces at line ends and empty lines at the end do not count.

    float_tolerance: numbers that differ by at most tolerance * max(1, |expected|) are equal, too.
    """
    printed_lines, expected_lines = _lines(printed), _lines(expected)
    if printed_lines == expected_lines:
        return True
    if float_tolerance is None or len(printed_lines) != len(expected_lines):
        return False
    return all(
        _tokens_match(a.split(), b.split(), float_tolerance) for a, b in zip(printed_lines, expected_lines, strict=True)
    )


def values_match(value: Any, expected: Any, float_tolerance: float | None) -> bool:
    """Equal as JSON values; numbers as numbers (2 and 2.0), within the tolerance."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(
            values_match(a, b, float_tolerance) for a, b in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            values_match(value[key], expected[key], float_tolerance) for key in expected
        )
    if isinstance(value, int | float) and isinstance(expected, int | float) and float_tolerance is not None:
        return value == expected or _close(float(value), float(expected), float_tolerance)
    return bool(value == expected)


def _compare(problem: CodeProblem, end: End, expected: str) -> TestVerdict:
    if problem.style == "functional" and not end.stdout:
        return "runtime_error"  # it left without an answer
    if len(end.stdout) > 4 * len(expected.encode(errors="replace")) + _ROOM_FOR_SPACE_BYTES:
        return "wrong"  # too long to be right, and to be taken apart here
    if problem.style == "stdin":
        matches = outputs_match(end.stdout.decode(errors="replace"), expected, problem.float_tolerance)
    else:
        try:
            matches = values_match(json.loads(end.stdout), json_values(expected)[0], problem.float_tolerance)
        except (ValueError, RecursionError, OverflowError):
            matches = False
    return "pass" if matches else "wrong"


def _how_it_ended(end: End) -> TestVerdict | None:
    """The verdict, if the way it ended decides it."""
    if end.reason in ("cpu", "wall"):
        return "time"
    if end.reason == "memory" or (end.code != 0 and _last_line(end.stderr).startswith("MemoryError")):
        return "memory"
    if end.is_output_full:
        return "output_limit"
    if end.reason != "exit" or end.code != 0:
        return "runtime_error"
    return None


def _judge_test_program(tests: End, program: End) -> TestResult:
    """`tests` ran only code of the data set, so what it wrote is believed; `program` is seen from outside."""
    report: dict[str, Any] = json.loads(tests.stdout) if tests.stdout and tests.code == 0 else {"verdict": "gone"}
    detail = report.get("detail") or ""
    verdict: TestVerdict
    if report["verdict"] == "broken_test":
        verdict = "error"
    elif report["verdict"] == "runtime_error":
        verdict = "memory" if _last_line(detail).startswith("MemoryError") else "runtime_error"
    elif report["verdict"] == "gone":
        # It was stopped if the tests ended first: then it is they that ran out of time, waiting for it.
        verdict = _how_it_ended(tests if program.reason == "stopped" else program) or "runtime_error"
        detail = program.stderr or "the program ended before its tests did"
    else:
        verdict = report["verdict"]
    return TestResult(
        verdict=verdict,
        output=(report.get("call") or "")[:_MAX_KEPT],
        detail=detail[-_MAX_KEPT:],
        cpu_s=program.cpu_s,
    )


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _tokens_match(printed: Sequence[str], expected: Sequence[str], tolerance: float) -> bool:
    return len(printed) == len(expected) and all(
        a == b or (_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b) and _close(float(a), float(b), tolerance))
        for a, b in zip(printed, expected, strict=True)
    )


def _close(value: float, expected: float, tolerance: float) -> bool:
    return (
        math.isfinite(value)
        and math.isfinite(expected)
        and abs(value - expected) <= tolerance * max(1.0, abs(expected))
    )


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
