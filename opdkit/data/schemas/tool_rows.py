"""Rows of tool use (ToolAlpaca style, as SDPO and MOPD publish it) -> drafts. The prompt is kept to the letter."""

from __future__ import annotations

from opdkit.data.files.sources import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.draft import Draft
from opdkit.data.schemas.schema import Schema
from opdkit.tasks.tool_calls import Unreadable, gold_calls

_SCHEMA = Schema(task="tool_use", instruction="none")


def tool_rows(row: Row) -> Draft:
    problem = _SCHEMA.problem(row)
    assert problem.gold is not None
    try:
        gold_calls(problem.gold)
    except Unreadable as error:
        raise Unusable(f"the answer is no list of calls: {error}") from None
    if len(problem.messages) > 1:
        raise Unusable(f"the prompt has {len(problem.messages)} turns where the published rows have one")
    return Draft(id=_SCHEMA.given_id(row), question=problem.messages[0]["content"], gold=problem.gold)
