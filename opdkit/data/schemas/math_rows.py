"""Rows of the mathematical sets, raw or in verl's schema -> drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opdkit.data.files.sources import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.draft import Draft, Read, without_prompt
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.templates import bare_question


def math_rows(columns: Mapping[str, tuple[str, ...]] | None = None, adapt: Callable[[Row], Row] | None = None) -> Read:
    """columns: where this set's raw rows keep things, if not where `schema.py` looks. adapt: mends a raw row first."""
    schema = Schema(task="math", instruction="none", columns=columns)

    def read(row: Row) -> Draft:
        row = row if adapt is None else adapt(row)
        problem = schema.problem(row)
        if len(problem.messages) > 1:
            raise Unusable(f"the prompt has {len(problem.messages)} turns where the published rows have one")
        bare = bare_question(problem.messages[0]["content"])
        return Draft(
            id=schema.given_id(row),
            question=bare.question,
            gold=problem.gold,
            solution=problem.solution,
            meta=without_prompt(problem.meta),
            template=bare.template,
            was_unfilled=bare.was_unfilled,
        )

    return read


def first_solution(row: Row) -> Row:
    """OlympiadBench lists its solutions; the first is taken."""
    solutions = row.get("solution")
    return {**row, "solution": solutions[0] if solutions else None} if isinstance(solutions, list) else row
