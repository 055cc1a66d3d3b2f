"""What a failed program is told: which tests failed and how, within limits, so that it fits into a context.

At most two tests, chosen as a person would: the first crash, else the first that ran out of time or memory, else the
two wrong answers with the shortest inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.tasks.base import whole_text
from opdkit.tasks.code.judge import TestResult
from opdkit.tasks.code.problem import CodeProblem

MAX_CHARACTERS = 2000
_MAX_FIELD_CHARACTERS = 250
_MAX_FIELD_LINES = 8
_MAX_ERROR_LINES = 10
_NUM_WRONG_SHOWN = 2

NO_PROGRAM = "No program was found. Put the whole program into one block that begins with ```python and ends with ```."
CUT_OFF = "The answer ends inside a code block, so it seems to have been cut off. " + NO_PROGRAM
_TITLES = {
    "wrong": "wrong answer",
    "runtime_error": "runtime error",
    "time": "time limit exceeded",
    "memory": "memory limit exceeded",
    "output_limit": "output limit exceeded",
}


def feedback(problem: CodeProblem, results: Sequence[TestResult], *, reveal: bool) -> str | None:
    """None if all tests passed. reveal: what was expected is told, too, which gives the hidden tests away."""
    shown = _chosen(problem, results)
    if not shown:
        return None
    num_passed = sum(result.verdict == "pass" for result in results)
    num_not_run = sum(result.verdict == "not_run" for result in results)
    not_run = f", {num_not_run} not run" if num_not_run else ""
    parts = [f"{num_passed} of {len(results)} tests passed{not_run}."]
    parts += [_describe(problem, index, results[index], reveal=reveal) for index in shown]
    text = whole_text("\n\n".join(parts))
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 4] + " ..."


def _chosen(problem: CodeProblem, results: Sequence[TestResult]) -> list[int]:
    by_verdict: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        by_verdict.setdefault(result.verdict, []).append(index)
    for verdict in ("runtime_error", "time", "memory", "output_limit"):
        if verdict in by_verdict:
            return by_verdict[verdict][:1]
    wrong = by_verdict.get("wrong", [])
    return sorted(sorted(wrong, key=lambda index: len(_input(problem, index)))[:_NUM_WRONG_SHOWN])


def _describe(problem: CodeProblem, index: int, result: TestResult, *, reveal: bool) -> str:
    lines = [f"Test {index + 1}: {_TITLES[result.verdict]}."]
    if problem.style == "program":
        lines += _field("Last call", result.output)
    else:
        lines += _field("Input", _input(problem, index))
        if result.verdict in ("wrong", "output_limit"):
            title = "Your function returned" if problem.style == "functional" else "Your program printed"
            lines += _field(title, result.output or "(nothing)")
    if result.verdict == "runtime_error":
        lines += _field("Error", _last_lines(result.detail))
    if result.verdict == "time":
        lines.append(f"It used over {problem.limits.cpu_s:g} s.")
    if reveal and result.verdict == "wrong":
        expected = result.detail if problem.style == "program" else problem.tests[index]["output"]
        lines += _field("Failed check" if problem.style == "program" else "Expected", expected)
    return "\n".join(lines)


def _input(problem: CodeProblem, index: int) -> str:
    return problem.tests[index].get("input", "")


def _field(title: str, text: str) -> list[str]:
    lines = text.strip("\n").split("\n")
    short = "\n".join(lines[:_MAX_FIELD_LINES])
    if title in ("Error", "Failed check"):
        short = "\n".join(lines[-_MAX_ERROR_LINES:])
        cut = short if len(short) <= _MAX_FIELD_CHARACTERS else "... " + short[-_MAX_FIELD_CHARACTERS:]
        return [f"{title}:", cut]
    is_whole = len(lines) <= _MAX_FIELD_LINES and len(short) <= _MAX_FIELD_CHARACTERS
    return [f"{title}:", short if is_whole else short[:_MAX_FIELD_CHARACTERS] + " ..."]


def _last_lines(text: str) -> str:
    return "\n".join(text.rstrip().split("\n")[-_MAX_ERROR_LINES:]) or "(no error text)"
