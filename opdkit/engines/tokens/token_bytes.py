"""What each token of a vocabulary adds to a text, as exact bytes. No torch, and no decoding of single tokens.

A token that is decoded alone loses what two tokens share of a character (it gives U+FFFD), and a space in front. The
bytes are read off the vocabulary as the tokenizer writes it instead; three ways of writing are known:

    byte-level      every byte is a printable character (GPT-2's table): Qwen, Llama 3, DeepSeek, gpt-oss
    SentencePiece   U+2581 is a space, <0x0A> is a byte: Gemma, Llama 2, Mistral
    plain           a token is its own text, and a text is its tokens joined

A token that was added by name is its own text. All of them but white space are markup (ends of turns, roles, tools,
tags): they are never compared by their bytes, and readers of the text do not see the special ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from opdkit.errors import UserError

SPACE = "\u2581"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # these bytes stand for themselves
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]  # these for the characters from U+0100 on
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + place): b for place, b in enumerate(_OTHERS)}
# What a tokenizer must give back to be known: spaces, line breaks, capitals, digits, characters of several bytes. All
# are their own normal forms (NFC, NFKC), so a normaliser alone refuses nobody.
_PROBES = ("The End", "a  b", "x = 12345;\n\ty", "0123456789+-*=", "\u4e2d\u6587 \u00e9", "\U0001f600\U0001f680")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """Of one tokenizer.

    bytes_V  by id, what a reader of the text sees of the token; None: nothing (it is special), or that is not known
    markup   ids that are never compared by their bytes: added by name, or not known
    id_of    the id that encoding writes for these bytes, of the ids that are compared
    names    {id: text} of the tokens that were added by name
    """

    bytes_V: Sequence[bytes | None]
    markup: frozenset[int]
    id_of: Mapping[bytes, int]
    names: Mapping[int, str]

    @property
    def num_compared(self) -> int:
        """Ids that are compared by their bytes; more than there are in `id_of` where several have the same."""
        return sum(token not in self.markup for token in range(len(self.bytes_V)))


def token_bytes(tokenizer: Any, name: str) -> TokenBytes:
    """name: of the model, for errors. Raises UserError for a tokenizer whose tokens' bytes cannot be known exactly."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(name, f"it is no fast tokenizer ({type(tokenizer).__name__}), so its vocabulary cannot be read")
    style, vocabulary = _style(backend, name), tokenizer.get_vocab()
    bytes_V: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    last_choice: set[int] = set()  # ids that encoding writes only for what has no other
    for token, index in vocabulary.items():
        bytes_V[index] = style(token)
        if style is _sentencepiece and _BYTE.fullmatch(token):
            last_choice.add(index)
    added = tokenizer.added_tokens_decoder
    for index, token in added.items():
        text = token.content.replace(SPACE, " ") if style is _sentencepiece else token.content
        bytes_V[index] = None if token.special else text.encode()
        last_choice.discard(index)
    if (unknown := tokenizer.unk_token_id) is not None:
        bytes_V[unknown] = None
    markup = {i for i, piece in enumerate(bytes_V) if not piece or (i in added and piece.strip())}
    compared = [i for i in range(len(bytes_V)) if i not in markup]
    id_of: dict[bytes, int] = {}
    for index in sorted(compared, key=lambda i: (i in last_choice, i)):
        piece = bytes_V[index]
        assert piece is not None
        id_of.setdefault(piece, index)
    found = TokenBytes(
        bytes_V=bytes_V,
        markup=frozenset(markup),
        id_of=id_of,
        names={index: token.content for index, token in added.items()},
    )
    _prove(found, tokenizer, name)
    return found


def encode_plainly(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a text in which nothing is a special token, whatever it spells: no answer can forge the end of a turn.

    Raises what the tokenizer raises for a character that it does not know.
    """
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _style(backend: Any, name: str) -> Callable[[str], bytes | None]:
    """What a token's spelling in the vocabulary stands for."""
    model, decoder = backend.model, backend.decoder
    kind = type(model).__name__
    decoders = [*_flat(None if decoder is None else json.loads(decoder.__getstate__()))]
    kinds = {part["type"] for part in decoders}
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if getattr(model, key, None)]
    if kind not in ("BPE", "Unigram", "WordLevel") or marks:
        raise _unknown(name, f"its model is {kind}" + (f" with {' and '.join(marks)}" if marks else ""))
    if "ByteLevel" in kinds:
        return _byte_level
    spaced = [d for d in decoders if d["type"] == "Replace" and d.get("pattern") == {"String": SPACE}]
    if spaced or "Metaspace" in kinds:
        others = kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not others and all(d["content"] == " " for d in spaced):
            return _sentencepiece
    if kinds == {"Fuse"}:
        return str.encode
    raise _unknown(name, f"its decoder ({', '.join(sorted(kinds)) or 'none'}) is not one that we know")


def _flat(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A decoder's parts, and theirs."""
    if decoder is None or decoder["type"] != "Sequence":
        yield from [decoder] if decoder else []
        return
    for part in decoder["decoders"]:
        yield from _flat(part)


def _byte_level(token: str) -> bytes | None:
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return None


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _prove(found: TokenBytes, tokenizer: Any, name: str) -> None:
    """Texts must come back; those with characters that the tokenizer does not know prove nothing. One at least must:
    the last is made of the tokenizer's own tokens."""
    is_proven = False
    for text in (*_PROBES, _own_text(found)):
        try:
            ids = encode_plainly(tokenizer, text)
        except Exception:  # tokenizers raises plain Exception for an unknown character
            continue
        pieces = [found.bytes_V[token] for token in ids]
        if any(piece is None for piece in pieces):
            continue
        joined = b"".join(piece for piece in pieces if piece is not None)
        if text.encode() not in (joined, joined.removeprefix(b" ")):  # some put a space in front of every text
            raise _unknown(name, f"{text!r} comes back as {joined!r}")
        is_proven |= bool(text)
    if not is_proven:
        raise _unknown(name, "it reads none of the texts that would prove them, not even one of its own tokens")


def _own_text(found: TokenBytes) -> str:
    """Of the first tokens that are whole characters; "" where there are none."""
    texts = (piece.decode(errors="ignore") for piece in found.id_of)
    return "".join(islice((text for text in texts if text.strip() and text.encode() in found.id_of), 32))


def _unknown(name: str, why: str) -> UserError:
    return UserError(
        f'teacher.tokens = "align" compares the bytes of tokens, and those of {name} cannot be known exactly: {why}; '
        'use models with byte-level or SentencePiece tokenizers, or a teacher of one family with tokens = "same"'
    )
