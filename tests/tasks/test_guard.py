"""Whatever a grader does, the loop gets a grade for each answer and everything that happened is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.tasks.base import Grade, GraderDown
from opdkit.tasks.guard import GuardedTask, make_task
from opdkit.tasks.options import resolve_task
from opdkit.types import Problem

PROBLEM = Problem(id="p7", task="multiple_choice", messages=(), gold="A")
RIGHT = Grade(score=1.0, verdict="correct", parsed="x")


@dataclass
class Stats:
    num_graded: int = 0
    num_cached: int = 0
    pool: dict[str, int] = field(default_factory=dict)


class Fragile:
    """Does with an answer what the answer says."""

    name = "fragile"

    def __init__(self) -> None:
        self.stats = Stats(pool={"num_timeouts": 0})
        self.num_calls = 0

    def grade(self, items: Sequence[tuple[Problem, str]]) -> Any:
        self.num_calls += 1
        grades: list[Any] = []
        for _, text in items:
            self.stats.num_graded += 1
            self.stats.pool["num_timeouts"] += 2
            if text == "raise":
                raise IndexError("list index out of range")
            if text == "raise half":
                raise ValueError("\ud800 cannot be written")
            if text == "exit":
                raise SystemExit(3)
            if text == "down":
                raise GraderDown("no server")
            if text == "short":
                return []
            bad = {"nan": math.nan, "inf": -math.inf}
            if text in bad:
                grades.append(Grade(score=bad[text], verdict="wrong"))
            elif text == "unknown zero":
                grades.append(Grade(score=None, verdict="wrong"))
            elif text == "number as text":
                grades.append(Grade(score=1.0, verdict="correct", parsed=5))  # type: ignore[arg-type]
            elif text == "not a grade":
                grades.append(1.0)
            else:
                grades.append(RIGHT)
        return grades

    def close(self) -> None:
        raise AssertionError("not called here")


@pytest.fixture
def guarded() -> GuardedTask:
    return GuardedTask(Fragile(), resolve_task("arithmetic"))


def grade(task: GuardedTask, *texts: str) -> list[Grade]:
    return task.grade([(PROBLEM, text) for text in texts])


def numbers(task: GuardedTask) -> dict[str, float | None]:
    return {metric.name.removeprefix("grading/"): metric.value for metric in task.drain()}


@pytest.mark.parametrize(
    "crash", ["raise", "exit", "nan", "inf", "unknown zero", "not a grade", "short", "number as text"]
)
def test_a_crash_costs_its_own_answer(guarded: GuardedTask, crash: str) -> None:
    """Ungraded, not zero; the answers beside it keep their grades; counted, and told once for each kind."""
    grades = grade(guarded, "a", crash, "b")
    assert [g.score for g in grades] == [1.0, None, 1.0]
    assert grades[1].verdict == "error" and grades[1].feedback is not None and "the grader failed" in grades[1].feedback
    assert numbers(guarded)["num_crashes"] == 1 and guarded.num_crashes == 1
    assert len(list(guarded.new_crashes())) == 1
    grade(guarded, crash)
    assert guarded.num_crashes == 2 and not list(guarded.new_crashes())


def test_half_a_character_can_be_written() -> None:
    """A model's JSON may hold "\\ud800", which UTF-8 cannot: what is kept of it is escaped, the rest is as it was."""
    asked = Problem(id="p", task="tool_use", messages=(), gold='[{"name": "f"}]')
    for feedback in ("outcome", "reveal"):
        task = make_task(resolve_task({"name": "tool_use", "feedback": feedback}))
        text = '<tool_call>{"name": "\\ud800é", "arguments": {"\\udfff": "\\ud800"}}</tool_call>'
        (result,) = task.grade([(asked, text)])
        assert result.verdict == "wrong" and result.parsed is not None and result.feedback is not None
        for kept in (result.parsed, result.feedback):
            assert kept.encode("utf-8") and "\\ud800é" in kept


def test_a_crash_says_what_and_where(guarded: GuardedTask) -> None:
    grade(guarded, "raise")
    (sentence,) = guarded.new_crashes()
    assert sentence.startswith("the task arithmetic failed on an answer, which stays ungraded: IndexError: list index")
    assert "(test_guard.py:" in sentence


def test_a_crash_with_half_a_character_can_be_written(guarded: GuardedTask) -> None:
    """Its sentence and the answer's feedback."""
    (result,) = grade(guarded, "raise half")
    for text in (result.feedback or "", *guarded.new_crashes()):
        assert text.encode("utf-8") and "ValueError: \\ud800 cannot be written" in text


def test_a_broken_machine_stops_the_run(guarded: GuardedTask) -> None:
    """Nobody could be graded: going on would cost hours and teach nothing."""
    with pytest.raises(GraderDown, match="no server"):
        grade(guarded, "a", "down")


def test_what_is_counted() -> None:
    """Verdicts, means over the answers that have a number, and what grew of the task's own counts; then afresh."""
    task = make_task(resolve_task("multiple_choice"))
    grade(task, "<answer>A</answer>", "B", "", "<answer>A</answer>")
    counted = numbers(task)
    assert counted.pop("time/grading_s") is not None
    assert counted == {
        "num_correct": 2,
        "num_wrong": 1,
        "num_no_answer": 1,
        "num_timeout": 0,
        "num_error": 0,
        "num_crashes": 0,
        "accuracy": 0.5,
        "incorrect_format": 0.5,
    }
    assert task.drain() == []


def test_the_tasks_own_counts_become_metrics(guarded: GuardedTask) -> None:
    """By step, nested ones with a slash; what is counted here is not counted twice."""
    grade(guarded, "a", "b")
    guarded.drain()
    grade(guarded, "a")
    counted = numbers(guarded)
    assert counted["pool/num_timeouts"] == 2 and counted["num_cached"] == 0 and "num_graded" not in counted


def test_trying_out_refuses_a_grader_that_cannot_take_any_text() -> None:
    """Before the first step, with the place; a grader that works is not noticed."""

    class Last(Fragile):
        def grade(self, items: Sequence[tuple[Problem, str]]) -> Any:
            return [Grade(score=float(text.split()[-1]), verdict="correct") for _, text in items]

    with pytest.raises(UserError, match=r"fails on an empty answer to problem p7: IndexError: .*\(test_guard.py:\d+\)"):
        GuardedTask(Last(), resolve_task("arithmetic")).try_out(PROBLEM)
    make_task(resolve_task("multiple_choice")).try_out(PROBLEM)


def test_an_evaluation_measures_the_main_task() -> None:
    """Of a sum, its first term alone, through the same guard."""
    terms = {
        "right": {"weight": 2.0, "task": "multiple_choice"},
        "form": {"weight": 1.0, "task": {"name": "format", "pieces": ["<answer>"]}},
    }
    task = make_task(resolve_task({"name": "weighted", "terms": terms}))
    answer = "<answer>A</answer>"
    assert [grade(task, answer)[0].score, grade(task.main, answer)[0].score] == [3.0, 1.0]
    assert task.describe()["terms"]["form"]["task"] == {"name": "format", "pieces": ["<answer>"]}
