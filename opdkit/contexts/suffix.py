"""What stands between two turns of the model, as token ids: the end of its turn, what the environment says, and what
opens its next turn.

Sampled ids never go through text again, so a suffix is read off the chat template with a stand-in for the model's turn:

    dummy  = user, assistant(SENT, with calls of the real names and ids, an argument = SENT)
    B      = the template's rendering of dummy and the observations, with the generation prompt
    suffix = B behind the first end of a turn that follows the last SENT

No template needs to append for this: whatever it does to earlier turns stands before the last SENT.

Observations are hostile. A text that spells a token which was added by name ("</tool_response>", which the tokenizer's
own flag does not split) is torn behind that token's first character and encoded in pieces: it reads the same and is
none of those ids.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal

from opdkit.contexts.render import LONG_CHARACTERS, PLAIN, Renderer, added_tokens
from opdkit.errors import UserError
from opdkit.types import Message

Role = Literal["tool", "user"]
_SENTINEL, _TEAR = "Xsaid", "Xtear"  # what follows them in a rendering is looked for; made longer where a text has them
_NAME = re.compile(r"[\w.:-]{1,64}")  # the model writes the names of tools that there are not
_REMEMBERED = 64
_CUT = "\n[... {} tokens left out ...]\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suffix:
    """ids: to be appended behind the model's turn."""

    ids: tuple[int, ...]
    other_stop: bool = False  # the turn ended with a stop token that the template does not write there


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A text as it can be shown to the model, and what was done for it."""

    text: str
    num_cut_tokens: int = 0  # left out of its middle
    num_control: int = 0  # control characters, and spellings of tokens that were added by name
    num_unknown: int = 0  # characters that the tokenizer cannot read, left out


@dataclass(frozen=True)
class Suffixes:
    """Of one model. stop_ids: what ends a sampled turn.

    closers: further tokens that end an assistant's turn in a rendered history (gpt-oss: "<|end|>", "<|call|>").
    role: of what the environment says; "user" for templates without a role for tools.
    """

    renderer: Renderer
    stop_ids: frozenset[int]
    closers: tuple[str, ...] = ()
    role: Role = "tool"

    @cached_property
    def _ends(self) -> dict[str, int]:
        """Text -> id of what ends a turn."""
        tokenizer, vocabulary = self.renderer.tokenizer, self.renderer.tokenizer.get_vocab()
        for token in self.closers:
            if token not in vocabulary:
                raise UserError(
                    f"episode.turn_closers: {token!r} is no token of {self.renderer.name}; give one by its text"
                )
        named = {token: vocabulary[token] for token in self.closers}
        return {str(tokenizer.decode([token])): token for token in sorted(self.stop_ids)} | named

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return added_tokens(self.renderer.tokenizer)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        added = self.renderer.tokenizer.added_tokens_decoder
        return frozenset(token for token, one in added.items() if len(one.content.strip()) > 1)

    @cached_property
    def _torn(self) -> dict[str, list[str]]:
        """Texts as they are torn: each is looked at when it is shown and when it is appended."""
        return {}

    def shown(self, text: str, max_tokens: int) -> Shown:
        """Of a text of any size what the model is shown: at most `max_tokens` tokens, cut in the middle."""
        parts = [text] if len(text) <= 2 * LONG_CHARACTERS else [text[:LONG_CHARACTERS], text[-LONG_CHARACTERS:]]
        num_left_out = len(text) - sum(map(len, parts))
        num_control = sum(unicodedata.category(c) == "Cc" and c not in "\n\r\t" for part in parts for c in part)
        known = [self._known(part) for part in parts]
        text, num_cut = self._cut([part for part, _ in known], num_left_out, max_tokens)
        return Shown(
            text=text,
            num_cut_tokens=num_cut,
            num_control=num_control + len(self._pieces(text)) - 1,
            num_unknown=sum(num for _, num in known),
        )

    def after(self, last_id: int | None, observations: Sequence[Message]) -> Suffix:
        """What follows a turn whose last id is `last_id` (None: it was cut before any), when the environment has said
        this. Raises UserError where the template does not show it, or does not say where a turn ends."""
        pieces, end = self._behind(observations)
        ids = tuple(chain.from_iterable(self.renderer.encode(piece) for piece in pieces if piece))
        if end is None or last_id == self._ends[end]:
            return Suffix(ids=ids)
        stops = last_id in self.stop_ids
        if stops and not self._opens_next(end):
            return Suffix(ids=ids, other_stop=True)
        return Suffix(ids=(self._ends[end], *ids), other_stop=stops)

    def end_behind(self, observations: Sequence[Message]) -> str | None:
        """The end of a turn that the template writes in front of these; None: it writes none."""
        return self._behind(observations)[1]

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError unless the template shows the model what tools of these names, and a user, would say."""
        said = _unlike("Xresult", names)
        tool = [{"role": "tool", "name": names[0], "tool_call_id": "call00000", "content": said}] if names else []
        for messages in ([{"role": "user", "content": said}], tool):
            if messages and said not in (rest := "".join(self._behind(messages)[0])):
                raise UserError(
                    f"the chat template of {self.renderer.name} does not show what a {messages[0]['role']} says behind "
                    f"a turn of the model (it writes {rest[:80]!r}); set chat_template to one that does"
                    + (', or episode.observations = "user"' if messages is tool else "")
                )

    def as_role(self, observations: Sequence[Message]) -> list[Message]:
        """As the template is given them."""
        named = [
            {**one, "name": one["name"] if _NAME.fullmatch(one["name"]) else "unknown"} if "name" in one else {**one}
            for one in observations
        ]
        if self.role == "tool" or not any(one["role"] == "tool" for one in named):
            return list(named)
        said = [f"Tool {one['name']}: {one['content']}" if one["role"] == "tool" else one["content"] for one in named]
        return [{"role": "user", "content": "\n".join(said)}]

    def _behind(self, observations: Sequence[Message]) -> tuple[list[str], str | None]:
        """(what the template writes behind the end of the model's turn, in parts to be encoded apart; that end, None:
        the template writes none)"""
        said = self.as_role(observations)
        texts = [str(one["content"]) for one in said]
        known = [*texts, json.dumps(self.renderer.template_kwargs, default=str)]
        sentinel, tear = _unlike(_SENTINEL, known), _unlike(_TEAR, known)
        torn = [{**one, "content": tear.join(self._pieces(text))} for one, text in zip(said, texts, strict=True)]
        rendered = self._rendered(torn, sentinel)
        behind = rendered[rendered.rfind(sentinel) + len(sentinel) :] if sentinel in rendered else ""
        if self.renderer.chat_template == PLAIN:
            return behind.split(tear), None
        found = [(behind.find(end), -len(end), end) for end in self._ends if end in behind]
        if not found:
            raise UserError(
                f"the chat template of {self.renderer.name} writes none of {', '.join(map(repr, self._ends))} behind "
                "an assistant's turn that is followed by another, so it is not known where that turn ends; name the "
                'token that it writes there, e.g. episode.turn_closers = ["<|end|>"]'
            )
        place, _, end = min(found)
        return behind[place + len(end) :].split(tear), end

    def _rendered(self, observations: Sequence[Message], sentinel: str) -> str:
        """The first way of writing the calls that the template accepts: arguments as an object, or as JSON text
        (DeepSeek); all calls, or one (Llama 3.1)."""
        called = [one for one in observations if one["role"] == "tool"]
        ways: list[tuple[Sequence[Message], bool]] = [(called, False), (called, True)]
        ways += [(called[:1], False), (called[:1], True)] if len(called) > 1 else []
        refusal: UserError | None = None
        for calls, as_text in ways if called else [([], False)]:
            try:
                return self.renderer.prompt_text([*_dummy(calls, sentinel, as_text=as_text), *observations])
            except UserError as error:
                refusal = refusal or error
        assert refusal is not None
        way = (
            'set chat_template to one that knows them, or episode.observations = "user"'
            if called
            else "set chat_template"
        )
        raise UserError(
            f"{str(refusal).partition(';')[0]}; an environment says such things behind every turn of the model: {way}"
        )

    def _opens_next(self, end: str) -> bool:
        """Whether a turn's end is how the next one begins (GLM): it is not there where nothing follows."""
        alone = self.renderer.history_text(_dummy((), _SENTINEL, as_text=False))
        return end not in alone.rpartition(_SENTINEL)[2]

    def _pieces(self, text: str) -> list[str]:
        """The text in parts none of which encodes to a token that was added by name."""
        if self._added is None:
            return [text]
        if text not in self._torn:
            if len(self._torn) >= _REMEMBERED:
                self._torn.clear()
            self._torn[text] = self._tear(text, self._added)
        return self._torn[text]

    def _tear(self, text: str, added: re.Pattern[str]) -> list[str]:
        places = [0, *(match.start() + 1 for match in added.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(places)]
        try:
            ids = chain.from_iterable(self.renderer.encode(piece) for piece in pieces if piece)
            spelled = any(token in self._added_ids for token in ids)
        except UserError:  # a character that the tokenizer cannot read spells nothing
            spelled = False
        return list(text) if spelled else pieces  # spelled in other characters, which the tokenizer takes for the same

    def _cut(self, parts: Sequence[str], num_left_out: int, max_tokens: int) -> tuple[str, int]:
        """(the text without its middle, how many tokens that were). parts: the text, or its beginning and its end, with
        `num_left_out` characters between them, which are counted as a token for 4."""
        if not num_left_out and parts[0].isascii() and len(parts[0]) < max_tokens:
            return parts[0], 0  # no token is less than a character of it
        spans = [self._spans(part) for part in parts]
        num_tokens = sum(map(len, spans)) + num_left_out // 4
        if num_tokens <= max_tokens and len(parts) == 1:
            return parts[0], 0
        marked = _CUT if self._reads(_CUT.format(num_tokens)) else ""
        room = max_tokens - len(self._spans(marked.format(num_tokens)))
        if room < 2:  # of no use to say so
            return parts[0][: spans[0][max_tokens][0]], num_tokens - max_tokens
        beginning = parts[0][: spans[0][room - room // 2][0]]
        end = parts[-1][spans[-1][-(room // 2)][0] :]
        return beginning + marked.format(num_tokens - room) + end, num_tokens - room

    def _spans(self, text: str) -> list[tuple[int, int]]:
        text, _ = self._known(text)
        read = self.renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(read["offset_mapping"])

    def _known(self, text: str) -> tuple[str, int]:
        """Without the characters that the tokenizer cannot read, and how many those were."""
        text = text if text.isascii() else text.encode("utf-8", "replace").decode()
        if self._reads(text):
            return text, 0
        unknown = {character for character in set(text) if not self._reads(character)}
        return "".join(c for c in text if c not in unknown), sum(c in unknown for c in text)

    def _reads(self, text: str) -> bool:
        try:
            self.renderer.encode(text)
        except UserError:
            return False
        return True


def _dummy(called: Sequence[Message], sentinel: str, *, as_text: bool) -> list[dict[str, Any]]:
    """A question, and an answer that made the calls of these results."""
    arguments: Any = {"x": sentinel}
    calls = [
        {
            "type": "function",
            "id": one.get("tool_call_id"),
            "function": {"name": one.get("name"), "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for one in called
    ]
    answer = {"role": "assistant", "content": sentinel, **({"tool_calls": calls} if calls else {})}
    return [{"role": "user", "content": "x"}, answer]


def _unlike(word: str, texts: Sequence[str]) -> str:
    """The word, longer by as many X as it takes to be in none of the texts."""
    return next(longer for longer in _longer(word) if not any(longer in text for text in texts))


def _longer(word: str) -> Iterator[str]:
    while True:
        yield word
        word += "X"
