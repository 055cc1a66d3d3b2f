"""Lessons that teach a tiny model to read demonstrations: the context of privileged and peer methods.

    066+784=                                   the bare problem, of a small pool: a skill it is only half taught
    (6+4+0=10,...:0850)066+784=                right answers stand in round brackets
    (6+4+0=10,...:0850)[6+4+0=11,...:0851]066+784=     wrong ones in square brackets; the lesson is the right answer

What is in brackets stands before the question, in the order of `context.slots`. A recipe shows its peers the same way
with `context.wording` = `WORDING`, and a reference solution with `context.template = "prefix"`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from opdkit.contexts.blocks import Block, Wording
from opdkit.data.readers import load_problems
from opdkit.tasks import arithmetic
from opdkit.types import Problem

Shown = Literal["success", "failure"]

MARKS = "()[]"  # characters a tokenizer needs beside those of the problems
WORDING = Wording(
    layout="{success}{another}{failure}{question}", success="({text})", another="({text})", failure="[{text}]"
)
# Of 16 lessons, how many show what. Those without a right answer to copy are of the small pool.
MIX: Mapping[tuple[Shown, ...], int] = {
    (): 6,
    ("success",): 3,
    ("success", "success"): 2,
    ("success", "failure"): 1,
    ("success", "success", "failure"): 3,
    ("failure",): 1,
}


def demonstration_lessons(
    data: str, *, num: int, pool: int | None, seed: int, mix: Mapping[tuple[Shown, ...], int] = MIX
) -> list[Problem]:
    """`num` arithmetic problems whose question may be preceded by demonstrations; `solution` is what to answer.

    Lessons without a right answer to copy walk `pool` problems again and again (None: all there are), the others are
    ever-new problems, as long as there are some. Raises UserError for other data than arithmetic.
    """
    kinds = [shown for shown, times in mix.items() for _ in range(times)]
    small, fresh = rounds(data, pool, seed), rounds(data, None, seed + 1)
    lessons = []
    for number in range(num):
        shown = kinds[number % len(kinds)]
        _, problem = next(fresh if "success" in shown else small)
        lessons.append(_lesson(problem, shown, number, seed))
    return lessons


def rounds(data: str, limit: int | None, seed: int) -> Iterator[tuple[int, Problem]]:
    """The first `limit` arithmetic problems again and again, each with the number of its round."""
    load_problems(data, task="arithmetic", limit=1)  # refuses other data
    _, variant, split = data.split(":")
    for number in itertools.count():
        for problem in itertools.islice(arithmetic.walk(variant, split, seed), limit):
            yield number, problem


def _lesson(problem: Problem, shown: tuple[Shown, ...], number: int, seed: int) -> Problem:
    blocks = []
    for place, kind in enumerate(shown):
        draw = seed + 1 + number * len(MARKS) + place
        if kind == "success":
            text = arithmetic.random_solution(problem, draw)
            blocks.append(Block(kind="another" if place else "success", text=text))
        else:
            blocks.append(Block(kind="failure", text=arithmetic.wrong_solution(problem, draw)))
    return replace(
        problem,
        id=f"{problem.id}/{number}",
        messages=WORDING.compose(problem.messages, blocks),
        solution=arithmetic.random_solution(problem, seed + number),
    )
