"""The code task: extraction, the three styles, every verdict, comparison, feedback, counts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.tasks import TASKS
from opdkit.tasks.code.feedback import CUT_OFF, MAX_CHARACTERS, NO_PROGRAM
from opdkit.tasks.code.judge import outputs_match, values_match
from opdkit.tasks.code.problem import json_values
from opdkit.tasks.code.task import CodeGrade, CodeTask
from opdkit.tasks.code.text import extract_program
from opdkit.tasks.sandbox import Sandbox
from opdkit.types import Problem

PARITY = Path(__file__).parents[1] / "parity" / "graders.json"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox exists on Linux only")


@pytest.fixture(scope="module")
def task() -> Iterator[CodeTask]:
    task = CodeTask(time_limit_s=1.0, memory_limit_mb=200, sandbox=Sandbox(num_slots=2))
    yield task
    task.close()


def problem(style: str, *tests: Any, **meta: Any) -> Problem:
    return Problem(id="p", task="code", messages=(), meta={"style": style, "tests": list(tests), **meta})


def io(given: str, expected: str) -> dict[str, str]:
    return {"input": given, "output": expected}


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\n"


def grade(task: CodeTask, problem: Problem, program: str) -> CodeGrade:
    (result,) = task.grade([(problem, fenced(program))])
    assert isinstance(result, CodeGrade)
    return result


ECHO = problem("stdin", io("1\n", "1\n"), io("2\n", "2\n"), io("3\n", "3\n"))


# ---- the program in the answer -------------------------------------------------------------------------------------


def parity_rows() -> list[dict[str, Any]]:
    cases = {case["id"]: case for case in json.loads(PARITY.read_text())["cases"]}
    return list(cases["pub.graders.code_extraction"]["rows"])


@pytest.mark.parametrize("row", parity_rows(), ids=lambda row: row["why"])
def test_extraction_agrees_with_careful_readers(row: dict[str, Any]) -> None:
    """All ten published rows, of which the published extractors get at most six."""
    assert extract_program(row["response"]) == row["expected"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\na\n```\nOutput:\n```\n4\n```", "a"),
        ("```\nfirst\n```\n```\nsecond\n```", "second"),
        ("```python\na = 1\n```\nand\n```python\nb = (", "a = 1"),
        ("```python\ndraft = (\nLet me start again.\n```python\nb = 2\n```", "b = 2"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("~~~py\nx\n~~~", "x"),
        ("The program: ```python\nx = 1\n```", "x = 1"),
        ("1. ```python\n   x = 1\n     # y\n   ```", "x = 1\n  # y"),
        ("```python title=a.py\nx\n```", "x"),
        ("```{.python}\nx\n```", "x"),
        ("```python\nreturn 1```", "return 1"),
        ("```python\n\n```", None),
        ("```bash\npip install x\n```", None),
        ("Use ``` in text, and `x`.", None),
        ("```python\nif x:\n    y\n\n    z\n```", "if x:\n    y\n\n    z"),
        ("```python\nx = '''\n   \n'''\n```", "x = '''\n   \n'''"),
        ("", None),
    ],
)
def test_extraction(answer: str, expected: str | None) -> None:
    """Python blocks before untagged ones, the last before earlier ones, whole ones only; text inside is untouched."""
    assert extract_program(answer) == expected


def test_extraction_is_linear_in_hostile_text() -> None:
    """A megabyte of fences, quotes and spaces is read in no time. Does not bound the seconds closely."""
    for text in ("```" * 300_000, "```\n" * 250_000, " " * 1_000_000 + "```", "> - 1. " * 150_000, "`" * 1_000_000):
        extract_program(text)


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("1 2\n3\n", "1 2\n3", None, True),
        ("1 2  \r\n3\t\n\n\n", "1 2\n3\n", None, True),
        ("1  2\n", "1 2\n", None, False),
        (" 1\n", "1\n", None, False),
        ("1\n\n2", "1\n2", None, False),
        ("1 2 3", "1\n2\n3", None, False),
        ("0.1", "0.10", None, False),
        ("0.1", "0.10", 1e-6, True),
        ("1.0000005 x", "1 x", 1e-6, True),
        ("1000000.5", "1000000", 1e-6, True),
        ("1.1", "1", 1e-6, False),
        ("nan", "1", 1e-6, False),
        ("inf", "1e400", 1e-6, False),
        ("1e400", "1", 1e-6, False),
        ("5", "1e400", 1e-6, False),
        ("1_000", "1000", 1e-6, False),
        ("٣", "3", 1e-6, False),
        ("a b", "a c", 1e-6, False),
        ("1 2", "1 2 3", 1e-6, False),
        ("", "", None, True),
        ("", "0", 1e-6, False),
    ],
)
def test_outputs_are_compared_by_lines(printed: str, expected: str, tolerance: float | None, same: bool) -> None:
    """Spaces at line ends and empty lines at the end are nothing; all else counts, numbers within the tolerance."""
    assert outputs_match(printed, expected, tolerance) is same


def test_values_are_compared_as_json() -> None:
    """2 and 2.0 are one number; a tolerance reaches into lists and objects; shapes must agree."""
    assert values_match([2, {"a": [1.0]}], [2.0, {"a": [1]}], None)
    assert not values_match([0.1 + 0.2], [0.3], None)
    assert values_match({"a": [0.1 + 0.2]}, {"a": [0.3]}, 1e-9)
    assert not values_match([1, 2], [2, 1], 1e-9)
    assert not values_match([1], [1, 1], 1e-9)
    assert not values_match("1", 1, 1e-9)
    assert not values_match({"a": 1}, {"b": 1}, 1e-9)
    assert not values_match(float("nan"), 1.0, 1e-9)


def test_arguments_may_span_lines_and_nest() -> None:
    """JSON values one after another, where published code splits at every space."""
    assert json_values('[1, 2,\n [3, "a b"]]\n"x\\ny z"\n\n{"k": null}\n') == [
        [1, 2, [3, "a b"]],
        "x\ny z",
        {"k": None},
    ]
    assert json_values(" \n") == []
    for broken in ("[1", "abc", "1 2 ]"):
        with pytest.raises(ValueError):
            json_values(broken)


# ---- verdicts --------------------------------------------------------------------------------------------------------


@on_linux
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("print(input())", "pass"),
        ("import sys\nsys.stdout.write(sys.stdin.buffer.read().decode())", "pass"),
        ("print(0)", "wrong"),
        ("", "no program"),
        ("pass", "wrong"),
        ("print(input())\nraise ValueError", "runtime_error"),
        ("print(input())\nimport sys\nsys.exit(3)", "runtime_error"),
        ("print(input()", "runtime_error"),
        ("import pandas", "runtime_error"),
        ("while True: pass", "time"),
        ("import time\nprint(input())\ntime.sleep(60)", "time"),
        ("x = bytearray(1 << 30)", "memory"),
        ("raise MemoryError", "memory"),
        ("import sys\nprint(input())\nprint('MemoryError', file=sys.stderr)", "pass"),
        ("while True: print('x' * 10**6)", "output_limit"),
        ("import os\nos.kill(os.getpid(), 11)", "runtime_error"),
        ("print(open('/etc/passwd').read())", "runtime_error"),
    ],
)
def test_each_way_to_end_has_its_verdict(task: CodeTask, program: str, verdict: str) -> None:
    """One test, one verdict; only "pass" scores."""
    result = grade(task, problem("stdin", io("7\n", "7\n"), time_limit_s=0.3), program)
    if verdict == "no program":
        assert (result.verdict, result.score, result.tests) == ("no_answer", 0.0, ())
        return
    assert [test.verdict for test in result.tests] == [verdict]
    assert result.score == float(verdict == "pass")
    assert result.verdict == {"pass": "correct", "time": "timeout"}.get(verdict, "wrong")
    assert result.parsed == program


@on_linux
def test_score_is_all_and_partial_credit_is_apart(task: CodeTask) -> None:
    """Two of three tests are two thirds of credit and no score."""
    result = grade(task, ECHO, "n = int(input())\nprint(n if n < 3 else 0)")
    assert (result.score, result.passed_share) == (0.0, pytest.approx(2 / 3))
    assert [test.verdict for test in result.tests] == ["pass", "pass", "wrong"]
    assert grade(task, ECHO, "print(input())").passed_share == 1.0


@on_linux
def test_functions_and_solutions(task: CodeTask) -> None:
    """LiveCodeBench's functional style: arguments on lines, class Solution or not, prints that do no harm."""
    two = problem("functional", io('[1, 2, 3]\n"a b"', "[6, 3]"), io('[\n  4]\n""', "[4, 0]"), entry_point="solve")
    for program in (
        "class Solution:\n    def solve(self, a: List[int], s: str) -> List[int]:\n        print(a)\n"
        "        return sum(a), len(s)",
        "def solve(a, s): return [sum(a), float(len(s))]",
        "import numpy as np\ndef solve(a, s): return np.array([sum(a), len(s)])",
    ):
        assert grade(task, two, program).score == 1.0
    for program in ("def solve(a, s): return None", "def other(a, s): return [6, 3]", "def solve(a): return [6, 3]"):
        assert grade(task, two, program).passed_share == 0.0
    exact = problem("functional", io("1", "0.3"), entry_point="f")
    near = problem("functional", io("1", "0.3"), entry_point="f", float_tolerance=1e-6)
    assert grade(task, exact, "def f(n): return 0.1 + 0.2").score == 0.0
    assert grade(task, near, "def f(n): return 0.1 + 0.2").score == 1.0


@on_linux
def test_test_programs(task: CodeTask) -> None:
    """MBPP's asserts, one test each; helpers of the starter are there for both sides."""
    starter = "import math\ndef helper(x): return x + 1\ndef f(x):\n    '''To be written.'''\n"
    tests = [{"program": f"assert f({n}) == helper({n}) * 2"} for n in (1, 2)] + [{"program": "assert f(-1) == 0"}]
    asserts = problem("program", *tests, entry_point="f", starter=starter, time_limit_s=0.2)
    assert grade(task, asserts, "def f(x): return math.floor(helper(x) * 2)").score == 1.0
    assert grade(task, asserts, "def f(x): return 4").passed_share == pytest.approx(1 / 3)
    assert grade(task, asserts, "def helper(x): return 2\ndef f(x): return 4").passed_share == pytest.approx(1 / 3)
    assert {test.verdict for test in grade(task, asserts, "def g(x): return 4").tests} == {"runtime_error"}
    assert {test.verdict for test in grade(task, asserts, "def f(x):\n    while True: pass").tests} <= {
        "time",
        "not_run",
    }
    assert {test.verdict for test in grade(task, asserts, "def f(x): return bytearray(1 << 30)").tests} == {"memory"}


@on_linux
def test_a_slow_program_is_not_run_on_every_test(task: CodeTask) -> None:
    """After two tests over the limit the rest is left out, and counted."""
    many = problem("stdin", *[io(str(n), str(n)) for n in range(8)], time_limit_s=0.1)
    before = task.stats
    result = grade(task, many, "while True: pass")
    verdicts = [test.verdict for test in result.tests]
    assert 2 <= verdicts.count("time") <= 3
    assert verdicts.count("not_run") == 8 - verdicts.count("time")
    assert task.stats.num_tests_not_run - before.num_tests_not_run == verdicts.count("not_run")
    assert result.verdict == "timeout"


@on_linux
def test_equal_programs_run_once(task: CodeTask) -> None:
    """In a batch and across batches; the same program on other tests is another matter."""
    other = problem("stdin", io("1\n", "2\n"))
    program = "print(input())  # once"
    before = task.stats
    grades = task.grade([(ECHO, fenced(program)), (other, fenced(program)), (ECHO, "Or so: " + fenced(program))])
    assert [g.score for g in grades] == [1.0, 0.0, 1.0]
    assert grade(task, ECHO, program).score == 1.0
    assert task.stats.num_tests_run - before.num_tests_run == 4
    assert task.stats.num_cached - before.num_cached == 2


@on_linux
@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ({}, "meta.style is None"),
        ({"style": "stdin"}, "meta.tests is not a list"),
        ({"style": "stdin", "tests": []}, "is empty"),
        ({"style": "stdin", "tests": [{"input": "1"}]}, "tests\\[0\\].output is missing"),
        ({"style": "stdin", "tests": [{"input": 1, "output": "1"}]}, "tests\\[0\\].input is missing or not text"),
        ({"style": "functional", "tests": [{"input": "1", "output": "1"}]}, "entry_point is ''"),
        ({"style": "functional", "entry_point": "f", "tests": [{"input": "[1", "output": "1"}]}, "is not JSON"),
        ({"style": "functional", "entry_point": "f", "tests": [{"input": "1", "output": "1 2"}]}, "2 JSON values"),
        ({"style": "stdin", "tests": [{"input": "1", "output": "1"}], "time_limit_s": -1}, "time_limit_s is -1"),
        ({"style": "program", "entry_point": "f", "tests": [{"program": "assert f("}]}, "SyntaxError"),
        ({"style": "program", "entry_point": "f", "tests": [{"program": "x = 1"}]}, "never calls f"),
    ],
)
def test_broken_problems_are_not_graded(task: CodeTask, meta: dict[str, Any], complaint: str) -> None:
    """The answer stays ungraded (None, not zero), is counted, and the feedback says what is wrong with which test."""
    before = task.stats.num_error
    result = grade(task, Problem(id="p", task="code", messages=(), meta=meta), "def f(x): return x")
    assert (result.score, result.verdict, result.passed_share) == (None, "error", None)
    assert result.feedback is not None
    assert re.search(complaint, result.feedback)
    assert task.stats.num_error == before + 1


@on_linux
def test_no_program_is_told_from_a_cut_one(task: CodeTask) -> None:
    """Both score zero; the feedback differs."""
    none, cut = task.grade([(ECHO, "I do not know."), (ECHO, "```python\nprint(1")])
    assert (none.verdict, none.score, none.feedback) == ("no_answer", 0.0, NO_PROGRAM)
    assert (cut.verdict, cut.score, cut.feedback) == ("no_answer", 0.0, CUT_OFF)


@on_linux
def test_feedback_is_short_and_hides_the_expected_output(task: CodeTask) -> None:
    """Input, output and error of what failed, within limits; the expected output only if asked for."""
    long = problem("stdin", io("5\n" * 4000, "the hidden answer"), io("short\n", "another hidden answer"))
    wrong = grade(task, long, "print('mine ' * 2000)")
    assert wrong.feedback is not None and len(wrong.feedback) <= MAX_CHARACTERS
    assert "0 of 2 tests passed." in wrong.feedback and "mine mine" in wrong.feedback and "short" in wrong.feedback
    assert "hidden" not in wrong.feedback
    crash = grade(task, long, "def deep(n): return deep(n + 1)\ndeep(0)")
    assert crash.feedback is not None and "RecursionError" in crash.feedback and len(crash.feedback) <= MAX_CHARACTERS
    slow = grade(task, problem("stdin", io("1\n", "1\n"), time_limit_s=0.1), "while True: pass")
    assert slow.feedback is not None and "time limit" in slow.feedback and "0.1 s" in slow.feedback
    assert grade(task, ECHO, "print(input())").feedback is None
    revealing = CodeTask(feedback="reveal", sandbox=task._sandbox)
    told = grade(revealing, long, "print('mine')")
    assert told.feedback is not None and "Expected:\nthe hidden answer" in told.feedback
    with pytest.raises(UserError, match="code feedback is 'gold'"):
        CodeTask(feedback="gold", sandbox=task._sandbox)  # type: ignore[arg-type]


@on_linux
def test_walls_that_were_run_into_are_counted(task: CodeTask) -> None:
    """A program that tries to read a file is a runtime error, and one more blocked test."""
    before = task.stats.num_tests_blocked
    assert grade(task, ECHO, "print(open('/work/answers').read())").score == 0.0
    assert task.stats.num_tests_blocked == before + 3


@on_linux
def test_the_task_is_known_and_says_what_it_runs_behind(task: CodeTask) -> None:
    """For the run's record; and `close` may be called twice, after which grading goes on."""
    assert TASKS["code"] is CodeTask
    record = task.describe()
    assert record["sandbox"]["tier"] in ("namespaces", "chroot", "landlock", "seccomp")
    assert record["limits"]["cpu_s"] == 1.0
    json.dumps(record)
    task.close()
    task.close()
    assert grade(task, ECHO, "print(input())  # after close").score == 1.0


HALF = "\ud800"  # half a character, as JSON of a model or a data set can name it


@pytest.mark.parametrize(
    ("asked", "program"),
    [
        (problem("stdin", io(f"a{HALF}", f"b{HALF}")), "print(input())"),
        (problem("stdin", io("a", "b")), f"print('{HALF}')"),
        (problem("stdin", io("a", "b")), "raise ValueError('\\ud800')"),
        (problem("functional", io(f'"{HALF}"', '"b"'), entry_point="f"), "def f(x): return x"),
        (problem("functional", io('"a"', f'"{HALF}"'), entry_point="f"), "def f(x): return '\\ud801'"),
        (
            problem("program", {"program": "assert f('a') == 'a', f('b')"}, entry_point="f"),
            "def f(x): return '\\ud800'",
        ),
        (problem("program", {"program": "assert f('\\ud800') == 'a'"}, entry_point="f"), "def f(x): return x"),
        (problem("program", {"program": "f('a')"}, entry_point="f"), "def f(x): raise ValueError('\\ud800')"),
        (problem(f"style {HALF}"), "pass"),
    ],
)
@on_linux
def test_no_text_that_goes_out_holds_half_a_character(task: CodeTask, asked: Problem, program: str) -> None:
    """Feedback, the program, outputs and error texts of tests: all can be written to a file."""
    with_reveal = CodeTask(feedback="reveal", sandbox=task._sandbox)
    for one in (task, with_reveal):
        result = grade(one, asked, program)
        assert result.verdict in ("wrong", "error") and result.feedback
        texts = [
            result.feedback,
            result.parsed or "",
            *(text for test in result.tests for text in (test.output, test.detail)),
        ]
        assert all(text.encode("utf-8") is not None for text in texts)
