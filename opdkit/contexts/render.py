"""Messages to prompt ids through the tokenizer's chat template, and answer ids back to text. No torch.

The template writes every special token itself, so the rendered text is tokenised without adding any: no second
beginning-of-text token, which the published code has on Llama-type tokenizers. Token ids are what the model reads; text
is made from answer ids for graders and peers only, and never turned back into the ids of the same answer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from opdkit.contexts.encoding import plain_ids
from opdkit.contexts.template_text import Variables, reads_clock, variables_of, with_date
from opdkit.errors import UserError
from opdkit.tasks.final_text import HARMONY_CHANNEL, final_channel
from opdkit.types import Message, Problem

# At the end of a rendered prompt only, so that no message's own text is taken for it.
OPENED_THINKING = re.compile(r"<think\s*>\s*\Z")

_ASKED, _SAID = "Xasked", "Xsaid"  # words that no template writes itself

LONG_CHARACTERS = 100_000  # from here on a text is not tokenised whole before it is known to be needed whole
PLAIN = "plain"  # chat_template = "plain": message contents and no chat markup, for models without chat training


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompt:
    """A prompt over the limit; whoever asked decides whether to drop the problem or to stop.

    num_tokens: at least so many, where the prompt was not tokenised whole (`prompt_ids_within`)."""

    problem_id: str
    num_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Renderer:
    """How one model reads and writes. `template_kwargs` go to the template (`enable_thinking`, ...).

    Student and teacher have one each, with their own tokenizer, template and kwargs. Raises UserError for a keyword
    that the template does not read: jinja would swallow it.
    """

    tokenizer: Any
    chat_template: str | None = None  # None: the tokenizer's own; "plain"; or jinja text
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    close_thinking: bool = False  # a template that opens <think> in every prompt: close it, so that the answer follows
    system: str | None = None  # takes the place of the messages' own system turn; None or "": theirs stays
    now: datetime | None = None  # what the clock says to a template that prints the date; None: the real one
    stop_ids: frozenset[int] = frozenset()  # left out of answers' texts, where the tokenizer does not call them special

    def __post_init__(self) -> None:
        unread = sorted(self.template_kwargs.keys() - read_kwargs(self, self.template_kwargs).keys())
        if unread and self.template is None and self.chat_template is None:
            return  # nothing can be rendered at all, which rendering says better
        if unread:
            known = variables_of(self.template) if self.template else Variables(frozenset(), frozenset())
            near = difflib.get_close_matches(unread[0], known.read, n=1)
            listed = ", ".join(sorted(known.settings)) or "none"
            hint = f'did you mean "{near[0]}"?' if near else f"it reads {listed}"
            raise UserError(
                f"template_kwargs: the chat template of {self.name} reads no {', '.join(unread)} ({hint}), so it would "
                "change nothing; correct or remove it"
            )

    @property
    def name(self) -> str:
        return str(self.tokenizer.name_or_path or "the model")

    @property
    def template(self) -> str | None:
        """Its jinja text; None: there is none, or it is "plain"."""
        if self.chat_template is not None:
            return None if self.chat_template == PLAIN else self.chat_template
        own = self.tokenizer.chat_template
        if not isinstance(own, dict):
            return None if own is None else str(own)
        chosen = own.get("tool_use" if "tools" in self.template_kwargs else "default", own.get("default"))
        if chosen is None:
            raise UserError(
                f"the tokenizer of {self.name} has the chat templates {', '.join(own)} and none named default; set "
                "chat_template to the path of a jinja file"
            )
        return str(chosen)

    @property
    def reads_clock(self) -> bool:
        """Whether prompts hold today's date."""
        return self.template is not None and reads_clock(self.template)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the messages, followed by what opens the assistant's answer.

        Raises UserError if there is no chat template, or the template refuses the messages or drops a system turn.
        """
        ids = self.encode(self.prompt_text(messages))
        return (*self._beginning(), *ids) if self.chat_template == PLAIN else ids

    def prompt_ids_within(self, messages: Sequence[Message], limit: int | None) -> tuple[int, ...]:
        """`prompt_ids`; of a prompt that cannot have as few as `limit` tokens, more than `limit` from its beginning.

        To tokenise 50 MB whole takes minutes and gigabytes, to learn that they are too long.
        """
        text = self.prompt_text(messages)
        if limit is not None and len(text) > max(LONG_CHARACTERS, limit):
            return self.encode(self.beginning_of(text, limit))
        return self.prompt_ids(messages)

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Renderer:
        """The same, whose prompts offer these tools (schemas of functions). Raises UserError if the chat template has
        no place for any, so that no model would know of them."""
        if not tools:
            return self
        offered = {**self.template_kwargs, "tools": [*tools]}
        if "tools" not in read_kwargs(replace(self, template_kwargs={}), offered):
            raise UserError(
                f"the chat template of {self.name} reads no tools, so the model would not hear of any; set "
                'chat_template to one that does, or episode.show_tools = "no" where the prompt itself tells of them'
            )
        return replace(self, template_kwargs=offered)

    def asked_ids(self, problem: Problem, history: Sequence[Message] = ()) -> tuple[int, ...]:
        """The problem as a model is asked it, with its tools; history: what was said since."""
        return self.with_tools(problem.tools).prompt_ids([*problem.messages, *history])

    def prompt_text(self, messages: Sequence[Message]) -> str:
        text = self._rendered(self._turns(messages), add_generation_prompt=True)
        return f"{text}</think>\n\n" if self.close_thinking and OPENED_THINKING.search(text) else text

    def history_text(self, messages: Sequence[Message]) -> str:
        """The messages with nothing behind them."""
        return self._rendered(self._turns(messages), add_generation_prompt=False)

    def end_of_turn(self) -> int | None:
        """The id that the chat template writes behind an assistant's words, read off a rendered turn.

        Of several side by side (Cohere) the last. None: it writes none (GLM), or there is no template.
        """
        if self.template is None:
            return None
        turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
        try:
            rendered = self.history_text(turns)
        except UserError:
            return None  # a template without assistant turns says nothing of their end
        behind = rendered.rpartition(_SAID)[2] if _SAID in rendered else ""
        runs = groupby(self.encode(behind), self._is_markup)
        return next((list(ids)[-1] for is_markup, ids in runs if is_markup), None)

    def _is_markup(self, token: int) -> bool:
        """Whether it is one that was added to the vocabulary by name; Gemma's runs of line breaks are none."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and bool(added.content.strip())

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        turns = [dict(message) for message in messages]
        if not self.system:
            return turns
        return [{"role": "system", "content": self.system}, *(turn for turn in turns if turn["role"] != "system")]

    def _rendered(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self.chat_template == PLAIN:
            return "\n\n".join([*(turn["content"] for turn in turns), ""])
        template = self.template
        if template is None:
            raise UserError(
                f"the tokenizer of {self.name} has no chat template, so no prompt can be rendered; "
                f'set chat_template to the path of a jinja file, or to "{PLAIN}" for a base model.'
            )
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    list(turns),
                    chat_template=with_date(template, self.now) if self.now and self.reads_clock else template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **self.template_kwargs,
                )
            )
        except Exception as error:  # a template is a program of somebody else's: it raises anything
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the chat template refuses messages with the roles {roles} ({error or type(error).__name__}); "
                "change the messages or set chat_template to another template."
            ) from error
        if not text.strip():
            raise UserError(
                f"the chat template of {self.name} renders messages to nothing, so there is no prompt to answer; set "
                "chat_template to another template."
            )
        for role in ("system", "user"):
            if any(turn["role"] == role and turn["content"].strip() not in text for turn in turns):
                raise UserError(
                    f"the chat template of {self.name} drops the {role} turn or changes its words; change the messages "
                    "or set chat_template to another template."
                )
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it stands: no special token is added in front or behind."""
        try:
            return plain_ids(self.tokenizer, text)
        except Exception as error:  # tokenizers raises plain Exception, e.g. for a character a tokenizer does not know
            name = self.tokenizer.name_or_path or "the model"
            raise UserError(
                f"the tokenizer of {name} cannot read the text {text[:60]!r}... ({error}); use a model that knows its "
                "characters"
            ) from error

    def beginning_of(self, text: str, num_tokens: int) -> str:
        """As much of a long text as surely has more than `num_tokens` tokens."""
        if len(text) <= LONG_CHARACTERS:
            return text
        longest = max(map(len, self.tokenizer.get_vocab()))
        return text[: max(LONG_CHARACTERS, (num_tokens + 1) * longest)]

    def _beginning(self) -> tuple[int, ...]:
        """The beginning-of-text id, where the tokenizer puts one in front of every text; a template writes its own."""
        bos = self.tokenizer.bos_token_id
        added = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        return (bos,) if added else ()

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        """The beginning of `text` that `max_tokens` tokens cover, and how many tokens were cut off its end (at least so
        many, where the text is too long to be tokenised whole)."""
        encoded = self.tokenizer(
            self.beginning_of(text, max_tokens), add_special_tokens=False, return_offsets_mapping=True
        )
        num_cut = len(encoded["input_ids"]) - max_tokens
        if num_cut <= 0:
            return text, 0
        end = encoded["offset_mapping"][max_tokens][0]  # where the first dropped token begins: half a character is none
        return text[:end], num_cut

    def torn(self, text: str) -> str:
        """The text, in which what spells a token that was added by name has a space behind its first character: what a
        model or a tool wrote is shown in a prompt, and ends no turn of it."""
        added = added_tokens(self.tokenizer)
        return text if added is None else added.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        """The text a grader reads: special tokens (end of text, chat markup) are left out, nothing is tidied up.

        Of an answer in gpt-oss's format, the message on its channel `final`.
        """
        ids = [token for token in answer_ids if token not in self.stop_ids]
        decode, plain = self.tokenizer.decode, {"clean_up_tokenization_spaces": False}
        if self.tokenizer.convert_tokens_to_ids(HARMONY_CHANNEL) in ids:
            text = decode(ids, skip_special_tokens=False, **plain)
            if HARMONY_CHANNEL in text:  # not another token of a tokenizer that does not know it
                return final_channel(text)
        return str(decode(ids, skip_special_tokens=True, **plain))


def added_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Spellings of the tokens that were added by name; white space and single characters end no turn."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def read_kwargs(renderer: Renderer, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that a renderer's template reads."""
    if not kwargs:
        return {}
    read = variables_of(renderer.template).read if renderer.template else frozenset()
    return {name: value for name, value in kwargs.items() if name in read}


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
