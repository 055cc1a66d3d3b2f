"""Questions that come more than once, and those of them whose answers contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opdkit.data.schemas.draft import Draft
from opdkit.data.schemas.templates import spaceless
from opdkit.tasks.math.task import MathTask
from opdkit.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    question: str
    places: tuple[int, ...]  # of its rows
    golds: tuple[str, ...]  # in the order of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Questions are the same if they differ in white space only.

    num_rows: rows whose question came before. num_questions: questions that come more than once.
    """

    num_rows: int
    num_questions: int
    contradictions: tuple[Contradiction, ...]
    later_places: tuple[int, ...]  # of the rows counted in num_rows


def find_repeats(drafts: Sequence[Draft], task: str) -> Repeats:
    """In mathematics two golds contradict each other if the math task says that they differ (`1/2` and `0.5` do not);
    elsewhere, if their texts do."""
    places: dict[bytes, list[int]] = {}
    for place, draft in enumerate(drafts):
        places.setdefault(spaceless(draft.question), []).append(place)
    repeated = [group for group in places.values() if len(group) > 1]
    doubtful = [group for group in repeated if len({drafts[place].gold for place in group}) > 1]
    if task == "math" and doubtful:
        doubtful = _differing(doubtful, drafts)
    return Repeats(
        num_rows=sum(len(group) - 1 for group in repeated),
        num_questions=len(repeated),
        contradictions=tuple(
            Contradiction(
                question=drafts[group[0]].question,
                places=tuple(group),
                golds=tuple(str(drafts[place].gold) for place in group),
            )
            for group in doubtful
        ),
        later_places=tuple(place for group in repeated for place in group[1:]),
    )


def without_repeats(drafts: Sequence[Draft], repeats: Repeats) -> list[Draft]:
    """The first row of each repeated question; none of a question whose golds contradict each other."""
    out = set(repeats.later_places) | {place for found in repeats.contradictions for place in found.places}
    return [draft for place, draft in enumerate(drafts) if place not in out]


def _differing(groups: Sequence[list[int]], drafts: Sequence[Draft]) -> list[list[int]]:
    task = MathTask(num_workers=1)
    try:
        return [group for group in groups if not _all_equal(group, drafts, task)]
    finally:
        task.close()


def _all_equal(group: Sequence[int], drafts: Sequence[Draft], task: MathTask) -> bool:
    first = Problem(id="first", task="math", messages=(), gold=drafts[group[0]].gold)
    grades = task.grade([(first, f"\\boxed{{{drafts[place].gold}}}") for place in group[1:]])
    return all(grade.score == 1.0 for grade in grades)
