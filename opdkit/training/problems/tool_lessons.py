"""Lessons that teach a tiny model to use a calculator: each is one turn of an episode, with what went before it.

    17*23=                              the lesson is the call
    17*23=, the call, 391               the lesson is what the tool has said
    (a peer's transcript)17*23= ...     both again, behind a right peer: the context of peer methods

A peer stands in brackets before the question, as in `demonstrations.py`, whose wording shows it in a recipe.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from transformers import PreTrainedTokenizerFast

from opdkit.contexts.blocks import Block
from opdkit.engines.scratch import CALL_END, TRANSCRIPT, call_opening, tool_tokenizer
from opdkit.rollouts.environments.calculator import Calculator
from opdkit.tasks import arithmetic
from opdkit.training.problems.demonstrations import MARKS, WORDING, rounds
from opdkit.types import Message, Problem

TOOL, ARGUMENT = "calculator", "expression"
_ROUND = 4  # lessons, so many of which have a peer


def calculator_tokenizer() -> PreTrainedTokenizerFast:
    """Of models that learn from these lessons."""
    alphabet = arithmetic.ALPHABET + arithmetic.MULTIPLIED + MARKS
    return tool_tokenizer(alphabet, tools=[TOOL], arguments=[ARGUMENT])


def tool_lessons(data: str, *, num: int, seed: int, with_peer: int = 1) -> list[Problem]:
    """`num` lessons of problems that are new as long as there are some. data: "arithmetic:multiply-K:SPLIT".
    with_peer: how many of four lessons have a peer."""
    found = enumerate(islice(rounds(data, None, seed), num))
    return [_lesson(problem, number, shows_peer=number % _ROUND < with_peer) for number, (_, problem) in found]


def direct_lessons(data: str, *, num: int, seed: int) -> list[Problem]:
    """`num` lessons whose answer is the product: what a model without tools is taught."""
    found = islice(rounds(data, None, seed), num)
    return [replace(_offered(problem), id=f"{problem.id}/{number}") for number, (_, problem) in enumerate(found)]


def _lesson(problem: Problem, number: int, *, shows_peer: bool) -> Problem:
    call = f"{call_opening(TOOL, ARGUMENT)}{problem.meta['question'].rstrip('=')}{CALL_END}"
    messages, answer = problem.messages, call
    if shows_peer:
        transcript = f"{TRANSCRIPT[0]}{call}\nTool {TOOL}: {problem.gold}{TRANSCRIPT[1]}{problem.gold}"
        messages = WORDING.compose(messages, [Block(kind="success", text=transcript)])
    if number // _ROUND % 2:
        said: list[Message] = [{"role": "assistant", "content": call}, {"role": "tool", "content": str(problem.gold)}]
        messages, answer = (*messages, *said), str(problem.gold)
    return replace(_offered(problem), id=f"{problem.id}/{number}", messages=tuple(messages), solution=answer)


def _offered(problem: Problem) -> Problem:
    return replace(problem, tools=tuple(Calculator().tools))
