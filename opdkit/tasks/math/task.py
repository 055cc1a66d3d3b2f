r"""The math task: the final answer of a text against a gold answer, as exact mathematical objects.

    text -> last complete \boxed{} (or "Answer:" line) -> canonical spelling -> equal text or equal plain numbers?
         -> else a worker of the pool, which holds sympy and math-verify and can be killed

Every pair (gold, answer) is decided once and remembered, since the answers of one problem repeat.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

from opdkit.errors import UserError
from opdkit.tasks.base import Grade, Option, Verdict
from opdkit.tasks.math.spelling import Unreadable, canonical
from opdkit.tasks.math.text import answer_line, last_boxed, split_top
from opdkit.tasks.math.values import decide, rational
from opdkit.tasks.pool import Outcome, PoolStats, WorkerPool
from opdkit.types import Problem

ANSWER_STYLES = ("boxed", "answer_line")  # problem.meta["answer_style"]

_CACHE_SIZE = 65_536  # pairs
_COMMA = re.compile(r"[,;]")


class _Pair(NamedTuple):
    gold: str  # both canonical
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MathStats:
    """Counts of answers since the task was made; `pool` counts requests, one for each distinct pair that needed one."""

    num_graded: int = 0
    num_correct: int = 0
    num_wrong: int = 0
    num_no_answer: int = 0
    num_timeout: int = 0  # wrong: the comparison ran out of time or memory
    num_error: int = 0  # not graded
    num_unreadable: int = 0  # wrong: too long or too deeply nested
    num_decided_here: int = 0  # without the pool or the cache
    num_cached: int = 0
    pool: PoolStats = field(default_factory=PoolStats)


class MathTask:
    """Grades 1.0 or 0.0. `parsed` is the canonical answer, and for every correct answer the canonical gold, so that
    answers known to be equal have one vote."""

    name = "math"
    needs_gold: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_workers: Annotated[
            int | None, Option("processes that compare; default: one a core, 8 at most", above=0)
        ] = None,
        cpu_s: Annotated[float, Option("CPU seconds of one comparison; over it, an answer is wrong", above=0)] = 2.0,
    ) -> None:
        """An answer over `cpu_s` gets the verdict "timeout"."""
        self._pool = WorkerPool("opdkit.tasks.math.equal", num_workers=num_workers, cpu_s=cpu_s)
        self._known: OrderedDict[_Pair, Verdict] = OrderedDict()
        self._stats = MathStats()

    @property
    def stats(self) -> MathStats:
        return replace(self._stats, pool=self._pool.stats)

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades in order. Nothing a text or a problem holds raises."""
        readings = [_read(problem, text) for problem, text in items]
        pairs = [reading for reading in readings if isinstance(reading, _Pair)]
        known = {pair: self._known[pair] for pair in pairs if pair in self._known}
        num_cached = sum(pair in known for pair in pairs)
        asked = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        feedback: dict[_Pair, str] = {}
        for pair, outcome in zip(asked, self._pool.map(asked) if asked else [], strict=True):
            known[pair] = _verdict(outcome)
            if outcome.status == "crash":
                feedback[pair] = f"the comparison failed: {outcome.value or 'its process died twice'}"
        self._remember(known)
        grades = [
            reading if isinstance(reading, Grade) else _grade(reading, known[reading], feedback.get(reading))
            for reading in readings
        ]
        self._count(grades, num_cached=num_cached, num_decided_here=len(readings) - len(pairs))
        return grades

    def close(self) -> None:
        self._pool.close()

    def _remember(self, verdicts: dict[_Pair, Verdict]) -> None:
        for pair, verdict in verdicts.items():
            if verdict != "error":
                self._known[pair] = verdict
                self._known.move_to_end(pair)
        while len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)

    def _count(self, grades: list[Grade], **increments: int) -> None:
        increments["num_graded"] = len(grades)
        for verdict in ("correct", "wrong", "no_answer", "timeout", "error"):
            increments[f"num_{verdict}"] = sum(grade.verdict == verdict for grade in grades)
        increments["num_unreadable"] = sum(grade.verdict == "wrong" and grade.parsed is None for grade in grades)
        totals = {name: getattr(self._stats, name) + number for name, number in increments.items()}
        self._stats = replace(self._stats, **totals)


def extract_answer(text: str, style: str = "boxed") -> str | None:
    """The final answer as it stands in the text; None if there is none. UserError for an unknown style."""
    if style not in ANSWER_STYLES:
        raise UserError(f"answer_style is {style!r}; choices: {', '.join(ANSWER_STYLES)}")
    return (last_boxed(text) if style == "boxed" else answer_line(text)) or None


def _read(problem: Problem, text: str) -> Grade | _Pair:
    """The grade, if it needs no algebra; else what to compare."""
    if problem.gold is None:
        return Grade(score=None, verdict="error", feedback="the problem has no gold answer")
    try:
        answer = extract_answer(text, problem.meta.get("answer_style", "boxed"))
    except UserError as error:
        return Grade(score=None, verdict="error", feedback=f"problem {problem.id!r} cannot be graded: {error}")
    if answer is None:
        return Grade(score=0.0, verdict="no_answer")
    try:
        gold = _read_gold(problem.gold)
    except ValueError as error:
        return Grade(score=None, verdict="error", feedback=f"the gold answer cannot be used: {error}")
    try:
        pair = _Pair(gold, canonical(answer))
    except Unreadable as error:
        return Grade(score=0.0, verdict="wrong", feedback=str(error))
    if not pair.answer:
        return Grade(score=0.0, verdict="no_answer")
    pair = _read_thousands_alike(pair, problem.gold, answer)
    decision = decide(*pair)
    return _grade(pair, "correct" if decision else "wrong") if isinstance(decision, bool) else pair


@lru_cache(maxsize=8192)
def _read_gold(gold: str, join_thousands: bool = True) -> str:
    answer = last_boxed(gold) if "\\boxed" in gold else gold
    if answer is None:
        raise ValueError("its box never closes")
    result = canonical(answer, join_thousands=join_thousands)
    if not result:
        raise ValueError("it is empty")
    return result


def _read_thousands_alike(pair: _Pair, gold: str, answer: str) -> _Pair:
    """100,200 is one number, unless the other side is a list: then it is one, too."""
    gold_is_list, answer_is_list = (len(split_top(side, _COMMA)) > 1 for side in pair)
    if answer_is_list and not gold_is_list:
        return _Pair(_read_gold(gold, join_thousands=False), pair.answer)
    if gold_is_list and not answer_is_list:
        return _Pair(pair.gold, canonical(answer, join_thousands=False))
    return pair


def _grade(pair: _Pair, verdict: Verdict, feedback: str | None = None) -> Grade:
    if verdict == "error":
        return Grade(score=None, verdict="error", parsed=pair.answer, feedback=feedback)
    if verdict == "correct":
        return Grade(score=1.0, verdict="correct", parsed=_vote(pair.gold))
    return Grade(score=0.0, verdict=verdict, parsed=_vote(pair.answer))


def _vote(answer: str) -> str:
    """One string for all spellings of a plain number."""
    number = rational(answer)
    return answer if number is None else str(number)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.status == "ok":
        return "correct" if outcome.value else "wrong"
    limits: dict[str, Literal["timeout", "error"]] = {"timeout": "timeout", "memory": "timeout", "crash": "error"}
    return limits[outcome.status]
