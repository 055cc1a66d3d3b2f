"""A text to ids, without what a tokenizer's call does besides: for short texts four fifths of its time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of the text as it stands, no special token in front or behind. Raises what the tokenizer raises."""
    if _only_wraps(type(tokenizer)):  # type: ignore[arg-type]  # mypy: of any class, which might not be hashable
        backend = tokenizer.backend_tokenizer
        is_bare = backend.truncation is None and backend.padding is None
        if is_bare and backend.encode_special_tokens == tokenizer.split_special_tokens:
            return tuple(backend.encode(text, add_special_tokens=False).ids)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=16)
def _only_wraps(kind: type) -> bool:
    """Whether its calls end in the library's `encode` and change nothing before or behind it."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    steps = ("_encode_plus", "_batch_encode_plus")
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and all(getattr(kind, one, None) is getattr(PreTrainedTokenizerFast, one, None) for one in steps)
    )
