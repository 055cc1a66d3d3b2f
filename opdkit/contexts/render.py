"""Messages to prompt ids through the tokenizer's chat template, and answer ids back to text. No torch.

The template writes every special token itself, so the rendered text is tokenised without adding any: no second
beginning-of-text token, which the published code has on Llama-type tokenizers. Token ids are what the model reads; text
is made from answer ids for graders and peers only, and never turned back into the ids of the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkit.errors import UserError
from opdkit.types import Message

# At the end of a rendered prompt only, so that no message's own text is taken for it.
OPENED_THINKING = re.compile(r"<think\s*>\s*\Z")

PLAIN = "plain"  # chat_template = "plain": message contents and no chat markup, for models without chat training


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompt:
    """A prompt over the limit; whoever asked decides whether to drop the problem or to stop."""

    problem_id: str
    num_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Renderer:
    """How one model reads and writes. `template_kwargs` go to the template (`enable_thinking`, ...).

    Student and teacher have one each, with their own tokenizer, template and kwargs.
    """

    tokenizer: Any
    chat_template: str | None = None  # None: the tokenizer's own; "plain"; or jinja text
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    close_thinking: bool = False  # a template that opens <think> in every prompt: close it, so that the answer follows

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the messages, followed by what opens the assistant's answer.

        Raises UserError if there is no chat template, or the template refuses the messages.
        """
        ids = self.encode(self.prompt_text(messages))
        return (*self._beginning(), *ids) if self.chat_template == PLAIN else ids

    def prompt_text(self, messages: Sequence[Message]) -> str:
        if self.chat_template == PLAIN:
            return "\n\n".join([*(message["content"] for message in messages), ""])
        template = self.chat_template or self.tokenizer.chat_template
        if template is None:
            name = self.tokenizer.name_or_path or "the model"
            raise UserError(
                f"the tokenizer of {name} has no chat template, so no prompt can be rendered; "
                f'set chat_template to the path of a jinja file, or to "{PLAIN}" for a base model.'
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # a template is a program: besides jinja's errors it may raise any of Python's
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses messages with the roles {roles} ({error or type(error).__name__}); "
                "change the messages or set chat_template to another template."
            ) from error
        if not text.strip():
            raise UserError(
                "the chat template renders messages to nothing, so there is no prompt to answer; set chat_template to "
                "another template."
            )
        return f"{text}</think>\n\n" if self.close_thinking and OPENED_THINKING.search(text) else text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it stands: no special token is added in front or behind."""
        try:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # tokenizers raises plain Exception, e.g. for a character a tokenizer does not know
            name = self.tokenizer.name_or_path or "the model"
            raise UserError(
                f"the tokenizer of {name} cannot read the text {text[:60]!r}... ({error}); use a model that knows its "
                "characters"
            ) from error

    def _beginning(self) -> tuple[int, ...]:
        """The beginning-of-text id, where the tokenizer puts one in front of every text; a template writes its own."""
        bos = self.tokenizer.bos_token_id
        added = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        return (bos,) if added else ()

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        """The beginning of `text` that `max_tokens` tokens cover, and how many tokens were cut off its end."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        num_cut = len(encoded["input_ids"]) - max_tokens
        if num_cut <= 0:
            return text, 0
        end = encoded["offset_mapping"][max_tokens][0]  # where the first dropped token begins: half a character is none
        return text[:end], num_cut

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        """The text a grader reads: special tokens (end of text, chat markup) are left out, nothing is tidied up."""
        return self.tokenizer.decode(answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read_chat_template(value: str | None) -> str | None:
    """The `chat_template` of a recipe: None and "plain" stay, anything else is the path of a jinja file, which is read.

    Raises UserError if there is no such file.
    """
    if value is None or value == PLAIN:
        return value
    try:
        if not Path(value).is_file():
            raise FileNotFoundError(2, "no such file")
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f'chat_template = "{value[:200]}" is not a readable file ({reason}); give the path of a jinja file, or '
            f'"{PLAIN}".'
        ) from error


def long_prompts(prompts: Iterable[tuple[str, Sequence[int]]], limit: int) -> list[LongPrompt]:
    """Which of the (problem id, prompt ids) have more than `limit` tokens. Nothing is cut or dropped here."""
    return [
        LongPrompt(problem_id=problem_id, num_tokens=len(ids), limit=limit)
        for problem_id, ids in prompts
        if len(ids) > limit
    ]
