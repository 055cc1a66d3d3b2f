"""Rows of the multiple-choice sets -> drafts. The options are part of the question, a lettered line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.data.files.sources import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.draft import Draft, Read
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.templates import bare_question
from opdkit.tasks.multiple_choice import LETTERS, options_of
from opdkit.types import Problem, seed_from

# SDPO's and MOPD's filter.
_LEVEL = "L3"
_TYPES = ("mcq-4-choices", "mcq-2-choices")
_GPQA_SEED = 42


def sciknoweval_rows(domain: str) -> Read:
    """domain: as SciKnowEval spells it. Reads its raw rows, and rows of SDPO's and MOPD's files (which are split)."""

    def read(row: Row) -> Draft | None:
        if "choices" not in row:
            return _published(row)
        details = row.get("details")
        level = details.get("level") if isinstance(details, dict) else None
        if row.get("domain") != domain or level != _LEVEL or row.get("type") not in _TYPES:
            return None
        choices = row["choices"]
        if not isinstance(choices, dict) or len(choices.get("text") or ()) != len(choices.get("label") or ()):
            raise Unusable("choices is not a list of texts with as many labels")
        options = dict(zip(choices["label"], choices["text"], strict=True))
        return _draft(row.get("question"), options, row.get("answerKey"), is_unsplit=True)

    return read


def gpqa_rows(row: Row) -> Draft:
    """GPQA's raw rows name the right answer first, so the options are put in an order drawn for each question."""
    if "Correct Answer" not in row:
        return _published(row)
    answers = [row.get(name) for name in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise Unusable("one of its four answers is missing")
    name = str(row.get("Record ID") or row.get("Question"))
    order = sorted(range(4), key=lambda place: seed_from(_GPQA_SEED, name, place, "gpqa options"))
    options = {letter: str(answers[place]).strip() for letter, place in zip("ABCD", order, strict=True)}
    gold = LETTERS[order.index(0)]
    return _draft(row.get("Question"), options, gold, id=row.get("Record ID"))


def _draft(
    question: Any, options: Mapping[str, str], gold: Any, *, id: str | None = None, is_unsplit: bool = False
) -> Draft:
    if not isinstance(question, str) or not question.strip():
        raise Unusable("no question")
    if gold not in options:
        raise Unusable(f"the answer {gold!r} is none of the options {', '.join(map(str, options)) or '(none)'}")
    lines = "\n".join(f"{letter}: {text}" for letter, text in options.items())
    return Draft(
        id=id, question=f"{question}\n\n{lines}", gold=gold, meta={"options": dict(options)}, is_unsplit=is_unsplit
    )


_SCHEMA = Schema(task="multiple_choice", instruction="none")


def _published(row: Row) -> Draft:
    """A prompt with its options in it, and a letter."""
    problem = _SCHEMA.problem(row)
    bare = bare_question(problem.messages[-1]["content"])
    options = options_of(
        Problem(id=problem.id, task=problem.task, messages=({"role": "user", "content": bare.question},))
    )
    if any(text is None for text in options.values()):
        raise Unusable("the prompt has no lettered options, each on a line of its own")
    if problem.gold not in options:
        raise Unusable(f"the answer {problem.gold!r} is none of the options {', '.join(options)}")
    return Draft(
        id=_SCHEMA.given_id(row),
        question=bare.question,
        gold=problem.gold,
        meta={"options": options},
        template=bare.template,
    )
