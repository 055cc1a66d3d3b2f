"""One model as it reads and ends, before a weight of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from opdkit.contexts.render import OPENED_THINKING, PLAIN, Renderer, read_chat_template, read_kwargs
from opdkit.engines.load import load_words
from opdkit.engines.tokens.stops import Stops
from opdkit.recipe import Recipe, TeacherSection
from opdkit.types import Message

QUESTION: tuple[Message, ...] = ({"role": "user", "content": "1+1"},)  # rendered, never encoded: any template shows it


_CLOSED_THINKING = re.compile(r"<think\s*>\s*</think\s*>\s*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model as it reads and ends."""

    label: str  # the section of the recipe
    name: str
    renderer: Renderer
    stops: Stops

    def opening(self, messages: Sequence[Message] = QUESTION) -> str:
        """What the template writes behind the last turn's words: the end of the turn, the role, perhaps a think tag."""
        return self.renderer.prompt_text(messages).rpartition(messages[-1]["content"].strip())[2][-120:]

    @property
    def thinking(self) -> str:
        """How an answer begins."""
        opening = self.opening()
        if OPENED_THINKING.search(opening):
            return "inside a thought"
        return "behind an empty thought" if _CLOSED_THINKING.search(opening) else "without a thought"

    @property
    def bos(self) -> str | None:
        """The beginning-of-text token its prompts begin with."""
        bos: str | None = self.renderer.tokenizer.bos_token
        if bos is None:
            return None
        written = self.renderer.prompt_text(QUESTION).startswith(bos)
        return bos if written or (self.renderer.chat_template == PLAIN and self.adds_bos) else None

    @property
    def adds_bos(self) -> bool:
        """Whether its tokenizer puts one in front of every text of its own accord."""
        tokenizer = self.renderer.tokenizer
        return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


class Doubt(NamedTuple):
    """What is wrong or doubtful, and what it is about."""

    topic: Literal["templates", "think tags", "stop tokens", "vocabulary"]
    sentence: str


def student_reading(recipe: Recipe, now: datetime | None) -> dict[str, Any]:
    """How the student's renderer is made (`LanguageModel.renderer`)."""
    section = recipe.model
    return {
        "template_kwargs": section.template_kwargs,
        "close_thinking": section.close_thinking,
        "system": section.system,
        "now": now,
    }


def teacher_reading(recipe: Recipe, section: TeacherSection, bare: Renderer, now: datetime | None) -> dict[str, Any]:
    """How a teacher's renderer is made: what its section does not say is as for the student. bare: without kwargs."""
    model = recipe.model
    kwargs = section.template_kwargs
    return {
        "template_kwargs": read_kwargs(bare, model.template_kwargs) if kwargs is None else kwargs,
        "close_thinking": model.close_thinking if section.close_thinking is None else section.close_thinking,
        "system": model.system if section.system is None else section.system,
        "now": now,
    }


@dataclass(frozen=True, slots=True)
class Words:
    """What a model reads and ends with, without its weights."""

    tokenizer: Any
    generation_config: Any
    chat_template: str | None

    @property
    def bare(self) -> Renderer:
        return Renderer(self.tokenizer, self.chat_template)

    def renderer(self, stops: Stops, reading: Mapping[str, Any]) -> Renderer:
        return Renderer(self.tokenizer, self.chat_template, stop_ids=stops.ids, **reading)


def read_words(path: str, trust_remote_code: bool, chat_template: str | None) -> Words:
    """Raises UserError for a model that is not there."""
    return Words(*load_words(path, trust_remote_code), read_chat_template(chat_template))
