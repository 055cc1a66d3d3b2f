"""Look at a data set as the trainer will: what its rows are, what is wrong with them and where, and whether its gold
answers are right by the task's own measure. Nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opdkit.contexts.reference_solution import ReferenceSolution
from opdkit.contexts.render import Renderer
from opdkit.data.files.sources import Row, every_row_column, files_left_out, rows_of
from opdkit.data.files.unusable import Unusable
from opdkit.data.prepare import problem_of
from opdkit.data.prepared import FIELDS, is_prepared
from opdkit.data.repeats import find_repeats
from opdkit.data.schemas.draft import Draft
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.templates import TEMPLATES, UNFILLED_BOX, bare_question
from opdkit.data.sets import raw_set_of
from opdkit.errors import UserError
from opdkit.tasks.base import Task
from opdkit.tasks.guard import task_named
from opdkit.tasks.tool_calls import gold_calls
from opdkit.types import Group, Message, Problem, Rollout

HUGE_CHARACTERS = 1_000_000  # of one row: no context window holds it

# What SDPO's, MOPD's and verl's files call a task.
_QUESTIONS = {
    "prompt": "question",
    "problem": "question",
    "question": "question",
    "messages": "chat messages",
    "conversations": "ShareGPT conversations",
    "instruction": "Alpaca instruction",
}
_TASKS = {"mcq": "multiple_choice", "tooluse": "tool_use", "code": "code"}
Progress = Callable[[int], None]  # is told the number of rows read so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """kind: the same words for all findings of a kind. what: of this one."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """One set of columns, as rows have it."""

    name: str  # what it is known as
    columns: tuple[str, ...]
    num_rows: int
    first: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of one text of every problem that has it."""

    num: int
    least: int
    median: int
    p95: int
    most: int
    longest: str  # where


@dataclass(slots=True)
class Inspection:
    source: str
    task: str
    is_guessed: bool  # nothing in the file says which task
    num_rows: int = 0
    columns: list[Columns] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # of each problem
    given_ids: list[tuple[str, str]] = field(default_factory=list)  # (id, where), of rows that have one
    findings: list[Finding] = field(default_factory=list)


def inspect_data(source: str, *, task: str | None = None, progress: Progress | None = None) -> Inspection:
    """Read all rows, and list every fault with its place instead of stopping at the first.

    task: None takes what the first row says: the task of the raw benchmark it is from, of what it was prepared for, or
    else math if it has an answer, and none if it has not. Raw rows are read as `opdkit data prepare` reads them.
    Raises UserError for a source that cannot be read at all, and for a task that is none.
    """
    findings: list[Finding] = []

    def on_broken(where: str, what: str) -> None:
        findings.append(Finding(kind="cannot be read", where=where, what=what))

    found: Inspection | None = None
    schema = Schema(task="math")
    seen: dict[tuple[str, ...], Columns] = {}
    for where, row in rows_of(source, split=None, keep=every_row_column, on_broken=on_broken):
        if found is None:
            said = task or _task_of(row)
            found = Inspection(source=source, task=said or _guess(row), is_guessed=said is None, findings=findings)
            schema = Schema(task=found.task, require_gold=task_named(found.task, may_be_none=True).needs_gold_or_tests)
        found.num_rows += 1
        if progress is not None:
            progress(found.num_rows)
        columns = tuple(row)
        old = seen.get(columns) or Columns(name=_schema_name(row), columns=columns, num_rows=0, first=where)
        seen[columns] = replace(old, num_rows=old.num_rows + 1)
        _look_at(found, where, row, schema)
    if found is None:
        first = f": {findings[0].where} {findings[0].what}" if findings else ""
        raise UserError(f"{source} holds no row that can be read{first}")
    for sentence in files_left_out(source):
        where, _, what = sentence.partition(" is not read")
        findings.append(Finding(kind="file not read", where=where, what=f"is not read{what}"))
    found.columns = sorted(seen.values(), key=lambda entry: -entry.num_rows)
    for entry in found.columns[1:]:
        what = f"{entry.num_rows} rows with {', '.join(entry.columns)}, unlike the others"
        findings.append(Finding(kind="other columns", where=entry.first, what=what))
    _look_across(found)
    return found


def grade_golds(found: Inspection, task: Task) -> int:
    """Grade every gold answer as if a model had given it; those that are not right become findings.

    Returns how many could be graded: of code, only problems with a solution.
    """
    places, items = [], []
    for place, problem in enumerate(found.problems):
        answer = gold_as_answer(problem)
        if answer is not None:
            places.append(place)
            items.append((problem, answer))
    for place, (problem, _), grade in zip(places, items, task.grade(items), strict=True):
        if grade.score is None or grade.score < 1:
            gold = "its solution" if problem.gold is None else f"the gold {problem.gold[:60]!r}"
            why = f": {grade.feedback[:200]}" if grade.feedback else ""
            what = f"{gold} is {grade.verdict} by the task's own measure{why}"
            found.findings.append(Finding(kind="gold is not right", where=found.where[place], what=what))
    return len(items)


def gold_as_answer(problem: Problem) -> str | None:
    """The gold answer as a model would write it; the solution where the gold is no answer; None if there is neither."""
    gold = problem.gold
    if gold is not None and problem.task == "math":
        return f"Answer: {gold}" if problem.meta.get("answer_style") == "answer_line" else f"\\boxed{{{gold}}}"
    if gold is not None and problem.task == "multiple_choice":
        return f"<answer>{gold}</answer>"
    if gold is not None and problem.task == "tool_use":
        try:
            calls = gold_calls(gold)
        except ValueError:
            return ""  # the task says what is wrong with the gold
        return "\n".join(f"Action: {call.name}\nAction Input: {json.dumps(call.arguments)}" for call in calls)
    return problem.solution


def lengths(found: Inspection, measure: Callable[[Problem], int | None]) -> Lengths | None:
    """measure: the length of what is measured, or None where a problem lacks it. None: all lack it."""
    measured = [
        (length, place) for place, problem in enumerate(found.problems) if (length := measure(problem)) is not None
    ]
    if not measured:
        return None
    values = np.array([length for length, _ in measured])
    most, place = max(measured, key=lambda entry: entry[0])
    return Lengths(
        num=len(measured),
        least=int(values.min()),
        median=int(np.median(values)),
        p95=int(np.percentile(values, 95)),
        most=most,
        longest=found.where[place],
    )


def teacher_messages(problem: Problem, renderer: Renderer | None) -> tuple[Message, ...] | None:
    """What a teacher with the reference solution reads; None if there is no solution."""

    def cut(text: str, max_tokens: int) -> tuple[str, int]:
        return (text, 0) if renderer is None else renderer.cut(text, max_tokens)

    nobody = Rollout(
        problem_id=problem.id,
        sample_id=0,
        policy_version=0,
        prompt_ids=(),
        answer_ids=(),
        answer_logprobs=None,
        answer_mask=np.zeros(0, dtype=np.bool_),
        finish="stop",
    )
    reading = ReferenceSolution().read(Group(problem=problem, rollouts=(nobody,)), nobody, cut)
    return None if reading is None else reading.messages


def _task_of(row: Row) -> str | None:
    if is_prepared(row):
        return str(row["task"])
    if (raw := raw_set_of(row)) is not None:
        return raw.task
    extra, model = row.get("extra_info"), row.get("reward_model")
    if isinstance(extra, dict) and isinstance(extra.get("opdkit"), str):
        try:
            return str(json.loads(extra["opdkit"])["task"])
        except (ValueError, KeyError, TypeError):
            return None
    for name in (row.get("kind"), model.get("style") if isinstance(model, dict) else None):
        if isinstance(name, str) and name in _TASKS:
            return _TASKS[name]
    return "math" if "math" in str(row.get("ability", "")).lower() else None


def _guess(row: Row) -> str:
    schema = Schema(task="math")
    return "none" if schema.given_answer(row) is None and "solution" not in row else "math"


def _schema_name(row: Row) -> str:
    if is_prepared(row) and set(FIELDS) <= set(row):
        return "opdkit data prepare"
    if isinstance(row.get("reward_model"), dict):
        own = isinstance(row.get("extra_info"), dict) and "opdkit" in row["extra_info"]
        return "verl, by opdkit data prepare" if own else "verl"
    if {"kind", "dataset", "description"} <= set(row):
        return "SDPO and MOPD, before preprocessing"
    if (raw := raw_set_of(row)) is not None:
        return f"raw, read as opdkit data prepare {raw.name} does"
    question = next((name for name in _QUESTIONS if row.get(name)), None)
    kind = _QUESTIONS.get(question or "", "question")
    if question == "prompt" and isinstance(row["prompt"], list):
        kind = "chat prompt"
    return f"{kind} and answer" if Schema(task="math").given_answer(row) is not None else kind


def _look_at(found: Inspection, where: str, row: Row, schema: Schema) -> None:
    size = sum(map(_num_characters, row.values()))
    if size > HUGE_CHARACTERS:
        what = f"{size:,} characters: no context window holds them, unless they are tests"
        found.findings.append(Finding(kind="huge row", where=where, what=what))
    try:
        problem = _read(row, schema)
    except Unusable as error:
        found.findings.append(Finding(kind="cannot be used", where=where, what=str(error)))
        return
    given = schema.given_answer(row)
    if given is not None and not isinstance(given, str):
        what = f"the answer is {type(given).__name__}, and is read as the text {str(problem.gold)[:60]!r}"
        found.findings.append(Finding(kind="answer is no text", where=where, what=what))
    if UNFILLED_BOX in problem.messages[-1]["content"]:
        what = "the prompt asks for a literal \\boxed{{}}; opdkit data prepare mends it"
        found.findings.append(Finding(kind="unfilled box", where=where, what=what))
    given_id = schema.given_id(row)
    if given_id is not None:
        found.given_ids.append((given_id, where))
    found.problems.append(problem)
    found.where.append(where)


def _read(row: Row, schema: Schema) -> Problem:
    """Raises Unusable."""
    raw = raw_set_of(row)
    if raw is None or raw.task != schema.task:
        return schema.problem(row)
    draft = raw.read(row)
    if draft is None:
        raise Unusable(f"opdkit data prepare {raw.name} leaves it out as published (another level or kind)")
    return problem_of(draft, raw, TEMPLATES[raw.template])


def _look_across(found: Inspection) -> None:
    first: dict[str, str] = {}
    for id, where in found.given_ids:
        if id in first:
            what = f"the id {id!r} is also that of {first[id]}"
            found.findings.append(Finding(kind="id comes again", where=where, what=what))
        first.setdefault(id, where)
    drafts = [
        Draft(question=bare_question(problem.messages[-1]["content"]).question, gold=problem.gold)
        for problem in found.problems
    ]
    repeats = find_repeats(drafts, found.task)
    if repeats.num_rows:
        what = f"{repeats.num_rows} rows have a question that came before; this is the first of them"
        where = found.where[min(repeats.later_places)]
        found.findings.append(Finding(kind="questions come again", where=where, what=what))
    for entry in repeats.contradictions:
        golds = " and ".join(repr(gold) for gold in dict.fromkeys(entry.golds))
        places = ", ".join(found.where[place] for place in entry.places[1:])
        what = f"the same question as {places}, with other answers: {golds}"
        found.findings.append(Finding(kind="answers contradict", where=found.where[entry.places[0]], what=what))


def _num_characters(value: Any) -> int:
    """Without recursion: a row may be nested deeper than Python's calls may."""
    total, parts = 0, [value]
    while parts:
        part = parts.pop()
        if isinstance(part, dict | list):
            parts.extend(part.values() if isinstance(part, dict) else part)
        else:
            total += len(part) if isinstance(part, str | bytes) else 1
    return total


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.kind, []).append(finding)
    return grouped
