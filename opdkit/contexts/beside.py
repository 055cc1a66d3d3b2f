"""What contexts share that show one text beside the problem: where it stands, and how much of it is read."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opdkit.contexts.base import Context, Cut, Reading
from opdkit.types import Message, Problem

LAYOUT = "{text}\n\n{question}"
_PLACE = re.compile(r"\{text\}|\{question\}")


class Beside(Context):
    # "user": laid out with the question, in its turn. "system": a system turn of its own, above the problem's own words
    # there. Only {text} and {question} of a layout are places; every other brace is text.
    role: Literal["user", "system"] = "user"
    layout: str = LAYOUT  # of role "user"
    max_tokens: Annotated[int, Field(gt=0)] = 8192  # of the text; what is longer loses its end, and is counted

    @model_validator(mode="after")
    def _each_place_once(self) -> Self:
        if sorted(_PLACE.findall(self.layout)) != ["{question}", "{text}"]:
            raise ValueError(
                f"context.layout = {self.layout!r} must have {{text}} and {{question}} once each: where the text "
                "stands, and where the problem"
            )
        if self.role == "system" and self.layout != LAYOUT:
            raise ValueError('context.layout is not read with context.role = "system"; remove one of the two')
        return self

    def beside(self, problem: Problem, text: str, cut: Cut) -> Reading:
        """The problem with the text."""
        shown, num_cut = cut(text, self.max_tokens)
        turns = self._with_system(problem, shown) if self.role == "system" else self._laid_out(problem, shown)
        return Reading(messages=turns, num_truncated_tokens=num_cut, shown=(self.kind,))

    def _laid_out(self, problem: Problem, text: str) -> tuple[Message, ...]:
        *earlier, last = problem.messages
        places = {"{text}": text, "{question}": last["content"]}
        return (*earlier, {**last, "content": _PLACE.sub(lambda place: places[place[0]], self.layout)})

    def _with_system(self, problem: Problem, text: str) -> tuple[Message, ...]:
        own = [turn["content"] for turn in problem.messages if turn["role"] == "system"]
        others = [turn for turn in problem.messages if turn["role"] != "system"]
        return ({"role": "system", "content": "\n\n".join([text, *own])}, *others)
