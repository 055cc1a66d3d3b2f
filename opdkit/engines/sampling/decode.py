"""The transformer's side of sampling: rows read together, one token of each at a time.

A batch has read every token of its rows but the last, which `advance` reads: so rows whose prompt was just read, and
rows in the middle of their answer, are in the same state and can be put into one batch.

Letters: B rows in the batch, U different texts, T positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from opdkit.engines.causal import CausalModel, Ids
from opdkit.engines.sampling.cache import (
    STATES,
    GrowingLayer,
    cache_name,
    new_cache,
    num_bytes,
    put_together,
    takes_rows,
)

READ_TOKENS = 16384  # of texts in one pass; longer ones are read in several, where the cache allows it
MASK_ENTRIES = 1 << 28  # of the mask of such a pass: [rows, columns, positions]
SPARE = 256  # columns that the mask is made ahead for


class Batch:
    """Cache, mask and positions of some rows, which all end at the last of `width` columns.

    firsts: the column of each row's first token, so that `width - first` is its length. The mask hides what is before,
    and positions are those of the row alone, 0 at its first token.
    """

    def __init__(
        self, model: CausalModel, cache: DynamicCache, width: int, firsts: Sequence[int], last_positions: Sequence[int]
    ) -> None:
        """last_positions: those of the last tokens that rows read. Rows that have ended stay there while others go on:
        beyond, a learned position may not exist, and rope may have other factors for the whole batch."""
        self._model, self._cache, self._cache_name = model, cache, cache_name(model)
        self.width, self.firsts = width, list(firsts)
        self.last_positions = list(last_positions)
        self._first_B1 = torch.tensor(self.firsts, device=model.device)[:, None]
        self._position_B1 = width - 1 - self._first_B1
        self._last_B1 = torch.tensor(self.last_positions, device=model.device)[:, None]
        self._mask_BT: Tensor | None = None

    @classmethod
    def of(cls, model: CausalModel, texts: Sequence[Ids], most: int, last_positions: Sequence[int]) -> Batch:
        """A batch that has read these texts without their last tokens; equal ones once. most: columns that its rows
        will never need more of."""
        unique: dict[tuple[int, ...], int] = {}
        for text in texts:
            unique.setdefault(tuple(text[:-1]), len(unique))
        rows, read, width = [unique[tuple(text[:-1])] for text in texts], list(unique), max(map(len, unique))
        behind_switch = model.switch_length is not None and width >= model.switch_length
        if behind_switch:
            read.append(read[0])
        batch = cls(model, new_cache(model, most), 0, [width - len(text) for text in read], [most] * len(read))
        if width:
            batch._read(read, behind_switch)
        if rows == [*range(len(read))]:
            return cls(model, batch._cache, width, batch.firsts, last_positions)
        return batch._reordered(rows, last_positions)

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self._cache)

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each row."""
        return [self.width - first for first in self.firsts]

    def joined(self, rows: Sequence[int], others: Sequence[tuple[Batch, Sequence[int]]], most: int) -> Batch:
        """A batch of some of its rows, and behind them some of others; each may be taken several times.

        Only a cache that `takes_rows` takes others, or loses the columns that nobody needs any more.
        """
        if not self.takes_rows:
            assert not others
            return self._reordered(rows, [self.last_positions[row] for row in rows])
        sources = [(self, list(rows)), *((other, list(taken)) for other, taken in others)]
        lengths = [batch.lengths[row] for batch, taken in sources for row in taken]
        width, device = max(lengths), self._model.device
        cache = put_together(
            self._model,
            [(batch._cache, batch.width, torch.tensor(taken, device=device)) for batch, taken in sources if taken],
            width,
            most,
        )
        last_positions = [batch.last_positions[row] for batch, taken in sources for row in taken]
        return Batch(self._model, cache, width, [width - length for length in lengths], last_positions)

    @property
    def bytes_per_token(self) -> int:
        return -(-num_bytes(self._cache) // (self.width * len(self.firsts)))

    def advance(self, token_B: Tensor) -> Tensor:
        """Reads a token of each row; gives the states that predict the next, [B, H]."""
        self.width += 1
        self._position_B1 = torch.minimum(self._position_B1 + 1, self._last_B1)
        return self._forward(token_B[:, None], self._position_B1)

    def _reordered(self, rows: Sequence[int], last_positions: Sequence[int]) -> Batch:
        self._cache.reorder_cache(torch.tensor(list(rows), device=self._model.device))
        return Batch(self._model, self._cache, self.width, [self.firsts[row] for row in rows], last_positions)

    def _read(self, texts: list[tuple[int, ...]], behind_switch: bool) -> None:
        """behind_switch: the texts and their last tokens are read with the factors that hold there, though some pass
        may end before; rope asks the largest position of a pass, and the last row, which is nobody's, has it."""
        ids_UP = self._model.padded(texts, side="left")
        size = ids_UP.shape[1]
        position_UP = (torch.arange(size, device=ids_UP.device) - self._first_B1).clamp_(min=0)
        if behind_switch:
            position_UP[-1] = self._model.switch_length
        at_once = self._columns_at_once(*ids_UP.shape)
        for start in range(0, size, at_once):
            read = slice(start, start + at_once)
            self.width = min(size, read.stop)
            self._forward(ids_UP[:, read], position_UP[:, read])

    def _columns_at_once(self, rows: int, columns: int) -> int:
        """How many columns of texts one pass reads. Only attention can be read in pieces; a state is carried on one
        token at a time."""
        if all(isinstance(layer, GrowingLayer | DynamicSlidingWindowLayer) for layer in self._cache.layers):
            return max(1, min(READ_TOKENS // rows, MASK_ENTRIES // (rows * columns)))
        return columns

    def _forward(self, ids_BT: Tensor, position_BT: Tensor) -> Tensor:
        # A state-space model masks the tokens it is given, which behind the prompt are never padding.
        masked = any(self.firsts) and not (self._cache_name == STATES and ids_BT.shape[1] < self.width)
        out = self._model.body(
            input_ids=ids_BT,
            attention_mask=self._mask() if masked else None,
            position_ids=position_BT,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        return out.last_hidden_state[:, -1]

    def _mask(self) -> Tensor:
        """[B, width] bool."""
        if self._mask_BT is None or self._mask_BT.shape[1] < self.width:
            self._mask_BT = torch.arange(self.width + SPARE, device=self._first_B1.device) >= self._first_B1
        return self._mask_BT[:, : self.width]
