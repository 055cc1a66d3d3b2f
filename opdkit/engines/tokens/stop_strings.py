"""Texts that end an answer ("Observation:"): where, in tokens as they were sampled.

An answer ends with the token that completes one. That token is kept whole, with what it holds behind the text, and
nothing is encoded again. Every engine ends answers by `end` alone, so a string means the same in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SPARE = 16  # tokens without a text of their own (a sentence piece's first space) that may stand in a string


@dataclass(frozen=True, slots=True)
class StopStrings:
    tokenizer: Any
    strings: tuple[str, ...]

    @property
    def reach(self) -> int:
        """So many tokens hold the longest string: one has a byte at least."""
        return max((len(text.encode()) for text in self.strings), default=0) + _SPARE

    def end(self, ids: Sequence[int], begun: int = 0) -> int | None:
        """How many of the ids there are once a string is complete, looking at those behind the first `begun`, in which
        none is; None: none is complete."""
        first = max(0, begun + 1 - self.reach)
        if not self.strings or not self._has(ids[first:]):
            return None
        ends = range(begun + 1, len(ids) + 1)
        return next((end for end in ends if self._has(ids[max(0, end - self.reach) : end])), None)

    def _has(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
