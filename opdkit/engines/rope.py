"""Position encodings whose factors depend on the length of what is read: which rows may share a pass.

longrope (Phi-3 and Phi-4-mini, arXiv:2402.13753) encodes a pass with one list of factors if its longest row has at most
`original_max_position_embeddings` tokens, and with another list beyond: a short row beside a long one would be read
with the wrong factors, and keys that were cached before the switch fit no query behind it. So a state is defined as
the model defines it when it writes: the state that predicts the token after n others is the one of a pass over these n.

`dynamic` NTK scaling changes its factors with every length beyond `max_position_embeddings`; such rows are refused as
too long (`max_length`), and up to there its factors are constant. YaRN, Llama 3's and linear scaling
do not look at lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """States `start` to `end - 1` of a row, to be taken from a pass over its first `end` tokens."""

    row: int
    start: int
    end: int


def switch_length(config: Any) -> int | None:
    """The longest row that is read with the short factors; None for a model that has one list of factors."""
    text = config.get_text_config(decoder=True)
    for rope in _rope_parameters(text):
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):  # "su": Phi-3's first name for it
            length = rope.get("original_max_position_embeddings") or text.original_max_position_embeddings
            return int(length)
    return None


def max_length(config: Any) -> int | None:
    """The longest row the model reads as it was trained, whatever stands beside it; None: no limit known.

    Llama 4 scales queries by the column of the batch, not by the row's position, from `floor_scale` on: padding on the
    left would move the scale.
    """
    text = config.get_text_config(decoder=True)
    bounds = [getattr(text, "max_position_embeddings", None)]
    if getattr(text, "attn_temperature_tuning", False):
        bounds.append(text.floor_scale - 1)
    return min((bound for bound in bounds if bound is not None), default=None)


def sides_of_switch(spans: Sequence[Span], switch: int | None) -> list[list[Span]]:
    """The spans in passes that may be read together: those with the short factors, those with the long ones.

    A span that crosses the switch is cut there, and its row is read twice.
    """
    if switch is None:
        return [list(spans)]
    short = [Span(row, start, min(end, switch)) for row, start, end in spans if start < switch]
    long = [Span(row, max(start, switch), end) for row, start, end in spans if end > switch]
    return [part for part in (short, long) if part]


def _rope_parameters(text: Any) -> Iterator[Mapping[str, Any]]:
    """The config's tables of rope parameters: one, or one for each type of layer. Remote code uses the older name."""
    for name in ("rope_parameters", "rope_scaling"):
        table = getattr(text, name, None)
        if isinstance(table, Mapping):
            yield from (entry for entry in (table, *table.values()) if isinstance(entry, Mapping))
