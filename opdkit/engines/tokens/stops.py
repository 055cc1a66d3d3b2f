"""Which tokens end an answer. Read from a tokenizer, a generation config and a chat template; no weights, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.contexts.render import Renderer
from opdkit.errors import UserError


@dataclass(frozen=True, slots=True)
class Stops:
    """ids: any of them ends an answer. end: what closes an answer that is written down (a data set's solution)."""

    ids: frozenset[int]
    end: int


def find_stops(
    renderer: Renderer, generation_config: Any, chosen: Sequence[str | int] | None = None, *, name: str
) -> Stops:
    """The end of the chat template's assistant turn, the tokenizer's end of text, and the generation config's ids.

    A base model names its end of text alone, and a teacher taught it to chat ends turns by another token of the same
    vocabulary: a student that did not stop there would learn to write it and go on. `chosen` (tokens by their text or
    id) takes the place of all three. Raises UserError if no token would end an answer, or a chosen one is no token.
    """
    tokenizer = renderer.tokenizer
    own = [renderer.end_of_turn(), tokenizer.eos_token_id]
    configured = getattr(generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    named = [*own, *several] if chosen is None else _chosen(tokenizer, chosen, name)
    ids = [int(token) for token in named if token is not None]
    if not ids:
        raise UserError(
            f"{name} names no end-of-text token, so no answer could ever end; set model.stop_tokens, eos_token in its "
            "tokenizer_config.json, or eos_token_id in its generation_config.json."
        )
    return Stops(frozenset(ids), end=next((token for token in own if token in ids), ids[0]))


def texts_of(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as a recipe names them, in the order of their ids."""
    return ", ".join(f'"{tokenizer.convert_ids_to_tokens(token)}"' for token in sorted(ids))


def _chosen(tokenizer: Any, chosen: Sequence[str | int], name: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    ids = []
    for token in chosen:
        token_id = vocabulary.get(token) if isinstance(token, str) else token
        if token_id not in known:
            near = difflib.get_close_matches(str(token), [*tokenizer.added_tokens_encoder], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else "; give one token, by its text or its id"
            raise UserError(f"model.stop_tokens: {token!r} is no token of {name}{hint}")
        ids.append(int(token_id))
    return ids
