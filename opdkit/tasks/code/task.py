"""The code task: the program in an answer, run on every test of the problem behind the walls of `sandbox/`.

    answer -> last fenced program -> one sandboxed process per test -> verdict of each test -> score = all passed

A problem says how it is tested in `problem.meta` (`problem.gold` is not read):

    style            "stdin"       the program reads standard input and prints        LiveCodeBench, AtCoder, Codeforces
                     "functional"  a function, or a method of `class Solution`        LiveCodeBench, LeetCode
                     "program"     a test program calls the function                  HumanEval, MBPP
    tests            a list, never empty, of objects whose values are all text:
                     stdin         {"input", "output"}
                     functional    {"input", "output"}: the arguments as JSON values one after another (a line each in
                                   LiveCodeBench, but they may span lines), and the result as one JSON value
                     program       {"program"}: a program that calls `entry_point` and raises if it is wrong, like
                                   HumanEval's `test` + "\\ncheck(NAME)", or MBPP's asserts
    entry_point      functional, program: the name of the function
    starter          program, optional: code to begin with on both sides (HumanEval's prompt, MBPP's set-up code)
    time_limit_s     optional: CPU seconds per test (default: the task's)
    memory_limit_mb  optional: beyond an idle interpreter with numpy (default: the task's)
    float_tolerance  optional, stdin and functional: see code_judge.outputs_match (default: the task's)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from opdkit.errors import UserError
from opdkit.tasks.base import Grade, Option, Verdict
from opdkit.tasks.code.feedback import CUT_OFF, NO_PROGRAM, feedback
from opdkit.tasks.code.judge import TestResult, judge
from opdkit.tasks.code.problem import BrokenProblem, CodeProblem, read_problem
from opdkit.tasks.code.text import extract_program, is_cut_off
from opdkit.tasks.sandbox import Job, Limits, Sandbox
from opdkit.types import Problem

FEEDBACK_MODES = ("outcome", "reveal")

_CACHE_SIZE = 2048  # programs
_Key = tuple[str, str]  # digest of the problem's tests, program


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrade(Grade):
    """`parsed` is the program. passed_share: partial credit; tests that were not run count as not passed. None: the
    answer has no program, or was not graded."""

    passed_share: float | None = None
    tests: tuple[TestResult, ...] = ()

    @property
    def numbers(self) -> Mapping[str, float]:
        return {} if self.passed_share is None else {"passed_share": self.passed_share}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeStats:
    """Counts since the task was made."""

    num_graded: int = 0
    num_correct: int = 0
    num_wrong: int = 0
    num_no_answer: int = 0
    num_timeout: int = 0  # the first failed test ran out of time
    num_error: int = 0  # not graded
    num_cached: int = 0  # answers whose program was known from this batch or an earlier one
    num_tests_run: int = 0
    num_tests_not_run: int = 0  # after `max_slow_tests`
    num_tests_blocked: int = 0  # failed on a wall of the sandbox
    num_restarts: int = 0  # fork servers that died


@dataclass(slots=True)
class _Run:
    """One program on one problem's tests."""

    problem: CodeProblem
    program: str
    results: list[TestResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.results = [TestResult(verdict="not_run")] * len(self.problem.tests)


class CodeTask:
    """Scores 1.0 if every test passes, else 0.0; `CodeGrade.passed_share` is the partial credit.

    time_limit_s, memory_limit_mb, float_tolerance: where the problem names none. max_slow_tests: after so many tests
    over the time limit, the program's other tests are not run. feedback: "outcome" tells input, output and error of
    failed tests; "reveal" also what was expected. sandbox: default, one that starts now.
    Raises SandboxUnavailable where no wall holds.
    """

    name = "code"
    needs_tests: ClassVar[bool] = True

    def __init__(
        self,
        *,
        time_limit_s: Annotated[float, Option("CPU seconds of one test", above=0)] = 6.0,
        memory_limit_mb: Annotated[int, Option("of one test, beyond an idle interpreter", above=0)] = 1024,
        float_tolerance: Annotated[
            float | None, Option("numbers within this * max(1, |expected|) are equal; default: exact", at_least=0)
        ] = None,
        max_slow_tests: Annotated[int, Option("after so many over their time, the rest is not run", above=0)] = 2,
        feedback: Annotated[
            Literal["outcome", "reveal"], Option('"reveal" also tells what tests expected, as published')
        ] = "outcome",
        sandbox: Sandbox | None = None,
    ) -> None:
        if feedback not in FEEDBACK_MODES:
            raise UserError(f"code feedback is {feedback!r}; choices: {', '.join(FEEDBACK_MODES)}")
        if time_limit_s <= 0 or memory_limit_mb <= 0 or max_slow_tests < 1:
            raise UserError("code time_limit_s, memory_limit_mb and max_slow_tests must be positive")
        self._limits = Limits(cpu_s=time_limit_s, memory_mb=memory_limit_mb)
        self._float_tolerance = float_tolerance
        self._max_slow_tests = max_slow_tests
        self._reveal = feedback == "reveal"
        self._sandbox = Sandbox() if sandbox is None else sandbox
        self._known: OrderedDict[_Key, CodeGrade] = OrderedDict()
        self._stats = CodeStats()
        self._sandbox.describe()  # refuse now, not in the middle of a run

    @staticmethod
    def warnings(options: Mapping[str, Any]) -> list[str]:
        if options["feedback"] != "reveal":
            return []
        return [
            'feedback = "reveal" tells what hidden tests expect, so a context that shows it gives them away '
            "(published leak)"
        ]

    @property
    def stats(self) -> CodeStats:
        return replace(self._stats, num_restarts=self._sandbox.num_restarts)

    def describe(self) -> dict[str, Any]:
        """What the programs run behind, for the run's record: {"sandbox": {"tier", "landlock_abi", ...}, "limits"}."""
        return {"sandbox": self._sandbox.describe(), "limits": self._limits.as_message()}

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades in order; equal programs on equal tests run once. Nothing a text or a problem holds raises."""
        problems = {id(problem): self._read(problem) for problem, _ in items}
        readings = [_read_answer(problems[id(problem)], text) for problem, text in items]
        keys = [reading for reading in readings if not isinstance(reading, CodeGrade)]
        by_digest = {problem.digest: problem for problem in problems.values() if isinstance(problem, CodeProblem)}
        known = {key: self._known[key] for key in keys if key in self._known}
        runs = {key: _Run(by_digest[key[0]], key[1]) for key in dict.fromkeys(keys) if key not in known}
        if runs:
            for done in self._sandbox.run(self._jobs(list(runs.values()))):
                run, index = done.job.tag
                run.results[index] = judge(run.problem, index, done)
        known |= {key: self._grade(run) for key, run in runs.items()}
        self._remember(known)
        grades = [reading if isinstance(reading, CodeGrade) else known[reading] for reading in readings]
        self._count(grades, list(runs.values()), num_cached=len(keys) - len(runs))
        return list(grades)

    def close(self) -> None:
        self._sandbox.close()

    def _read(self, problem: Problem) -> CodeProblem | CodeGrade:
        try:
            return read_problem(problem.meta, self._limits, self._float_tolerance)
        except BrokenProblem as error:
            return CodeGrade(score=None, verdict="error", feedback=f"problem {problem.id!r} cannot be graded: {error}")

    def _jobs(self, runs: Sequence[_Run]) -> Iterator[Job]:
        """All first tests, then all second tests, ...: so a slow program is known before most of its tests are run."""
        for index in range(max((len(run.results) for run in runs), default=0)):
            for run in runs:
                num_slow = sum(result.verdict == "time" for result in run.results)
                if index < len(run.results) and num_slow < self._max_slow_tests:
                    yield run.problem.job(run.program, index, tag=(run, index))

    def _grade(self, run: _Run) -> CodeGrade:
        verdicts = [result.verdict for result in run.results]
        failed = [verdict for verdict in verdicts if verdict not in ("pass", "not_run", "error")]
        if "error" in verdicts and not failed:
            reason = run.results[verdicts.index("error")].detail
            return CodeGrade(
                score=None, verdict="error", parsed=run.program, feedback=f"a test cannot be run: {reason}"
            )
        verdict: Verdict = "correct" if not failed else "timeout" if failed[0] == "time" else "wrong"
        return CodeGrade(
            score=0.0 if failed else 1.0,
            verdict=verdict,
            parsed=run.program,
            feedback=feedback(run.problem, run.results, reveal=self._reveal),
            passed_share=verdicts.count("pass") / len(verdicts),
            tests=tuple(run.results),
        )

    def _remember(self, grades: dict[_Key, CodeGrade]) -> None:
        for key, grade in grades.items():
            if grade.verdict != "error":
                self._known[key] = grade
                self._known.move_to_end(key)
        while len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)

    def _count(self, grades: Sequence[CodeGrade], runs: Sequence[_Run], num_cached: int) -> None:
        verdicts = Counter(f"num_{grade.verdict}" for grade in grades)
        results = [result for run in runs for result in run.results]
        num_not_run = sum(result.verdict == "not_run" for result in results)
        increments = {
            **verdicts,
            "num_graded": len(grades),
            "num_cached": num_cached,
            "num_tests_run": len(results) - num_not_run,
            "num_tests_not_run": num_not_run,
            "num_tests_blocked": sum(result.is_blocked for result in results),
        }
        totals = {name: getattr(self._stats, name) + number for name, number in increments.items()}
        self._stats = replace(self._stats, **totals)


def _read_answer(problem: CodeProblem | CodeGrade, text: str) -> CodeGrade | _Key:
    """The grade, if nothing has to be run; else what to run."""
    if isinstance(problem, CodeGrade):
        return problem
    program = extract_program(text)
    if program is None:
        reason = CUT_OFF if is_cut_off(text) else NO_PROGRAM
        return CodeGrade(score=0.0, verdict="no_answer", feedback=reason)
    return problem.digest, program
