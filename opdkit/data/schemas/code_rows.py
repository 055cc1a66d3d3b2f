"""Rows of the programming sets -> drafts. Their tests go to `meta` (`code_tests.py`)."""

from __future__ import annotations

import re

from opdkit.data.files.sources import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.code_tests import livecodebench_tests, program_tests, tested_function
from opdkit.data.schemas.draft import Draft, without_prompt
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.templates import bare_question

_SCHEMA = Schema(task="code", instruction="none")
_DEF = re.compile(r"^[ \t]*(def [^\n]+)", re.MULTILINE)
_SIGNATURE = "\n\nYour solution should have the following signature: ```python\n{}\n```"
_SHOWN = ("platform", "difficulty", "contest_date", "question_title")


def livecodebench_rows(row: Row) -> Draft:
    """LiveCodeBench's raw rows, and rows of SDPO's and MOPD's files (which are split). `self` leaves the signature, as
    published."""
    if "question_content" not in row:
        return _published(row)
    question = _text(row, "question_content").strip()
    starter = row.get("starter_code") or ""
    meta = livecodebench_tests(row)
    if meta["style"] == "functional":
        signature = _DEF.search(starter)
        if signature is None:
            raise Unusable("a function is to be written, and starter_code does not show how it is called")
        question += _SIGNATURE.format(signature[1].rstrip()).replace("(self, ", "(")
    about = {name: str(row[name]) for name in _SHOWN if row.get(name) is not None}
    return Draft(id=_text(row, "question_id"), question=question, gold=None, meta=meta | about, is_unsplit=True)


def contest_date(row: Row) -> str | None:
    """YYYY-MM-DD of a raw LiveCodeBench row."""
    date = row.get("contest_date")
    return None if date is None else str(date)[:10]


def humaneval_rows(row: Row) -> Draft:
    if "entry_point" not in row:
        return _published(row)
    prompt, name = _text(row, "prompt"), _text(row, "entry_point")
    meta = program_tests([f"{_text(row, 'test')}\ncheck({name})"], name, prompt)
    solution = row.get("canonical_solution")
    return Draft(
        id=_text(row, "task_id"),
        question=prompt.strip(),
        gold=None,
        solution=None if not solution else fenced(prompt + solution),
        meta=meta,
    )


def mbpp_rows(row: Row) -> Draft:
    """Of both configurations, `full` and `sanitized`. The asserts are shown, since nothing else names the function."""
    if "test_list" not in row:
        return _published(row)
    asserts, code = row["test_list"], _text(row, "code")
    if not isinstance(asserts, list) or not asserts or not all(isinstance(line, str) for line in asserts):
        raise Unusable("test_list is empty, or not a list of asserts")
    imports = row.get("test_imports") or []
    set_up = "\n".join([*imports, row.get("test_setup_code") or ""]).strip()
    meta = program_tests(asserts, tested_function(asserts, code), f"{set_up}\n" if set_up else "")
    task = _text(row, "text" if row.get("text") else "prompt").strip()
    return Draft(
        id=str(row.get("task_id")) if row.get("task_id") is not None else None,
        question=task + "\n\nYour code should pass these tests:\n\n" + "\n".join(asserts),
        gold=None,
        solution=fenced(code),
        meta=meta,
    )


def fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _published(row: Row) -> Draft:
    """A prompt, and tests in the shape of SDPO's and MOPD's files; or what we wrote ourselves."""
    problem = _SCHEMA.problem(row)
    bare = bare_question(problem.messages[-1]["content"])
    return Draft(
        id=_SCHEMA.given_id(row),
        question=bare.question,
        template=bare.template,
        gold=None,
        solution=problem.solution,
        meta=without_prompt(problem.meta),
    )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"no {name}" if value is None else f"{name} is not a text, or is blank")
    return value
