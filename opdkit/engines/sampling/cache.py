"""Keys and values of rows that come and go: buffers with spare room, and caches put together from rows of others.

All rows of a cache end at its last column. So a row that joins needs no columns of its own, a longest row that leaves
takes the columns away that only it had, and windows, which count columns, are right for every row.

Letters: B rows, T columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opdkit.engines.causal import CausalModel
from opdkit.errors import UserError

KEYS, STATES = "past_key_values", "cache_params"  # Mamba's has states; most models swallow unknown names
_BUFFERS = {"keys": "key_buffer", "values": "value_buffer"}

Source = tuple[DynamicCache, int, Tensor]  # a cache, its columns, which of its rows are taken


def cache_name(model: CausalModel) -> str:
    """The argument of the body that takes a cache. Raises UserError where there is none."""
    names = inspect.signature(model.body.forward).parameters
    for name in (KEYS, STATES):
        if name in names:
            return name
    raise UserError(f"{model.name} takes no cache that opdkit knows ({KEYS} or {STATES}); use another model.")


def new_cache(model: CausalModel, most: int) -> DynamicCache:
    """The library's cache for this architecture; plain attention layers, and only those, become growing ones.

    most: columns that it never outgrows.
    """
    cache = DynamicCache(config=model.body.config)
    cache.layers = [GrowingLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_rows(cache: DynamicCache) -> bool:
    """Whether rows can join it: all its layers are attention, whose columns we know."""
    return all(type(layer) in (GrowingLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def put_together(model: CausalModel, sources: Sequence[Source], width: int, most: int) -> DynamicCache:
    """A cache of `width` columns with rows of others, each read once; where `takes_rows` holds. Columns before a row's
    first are zeros: a mask hides them, but would not hide what is no number."""
    cache = new_cache(model, most)
    for number, layer in enumerate(cache.layers):
        parts = [(source.layers[number], columns, rows) for source, columns, rows in sources]
        written = [part for part in parts if part[0].is_initialized]
        if not written:  # rows of one token, or a layer that reads another one's
            continue
        first = written[0][0].keys
        layer.lazy_initialization(first, written[0][0].values)
        window = getattr(layer, "sliding_window", None)
        kept = width if window is None else min(width, window - 1)
        room = kept if window is not None else _room(width, most)
        for name in ("keys", "values"):
            example = getattr(written[0][0], name)
            buffer = example.new_zeros(sum(len(rows) for _, _, rows in parts), example.shape[1], room, example.shape[3])
            start = 0
            for part, _, rows in parts:
                if part.is_initialized:
                    old = getattr(part, name)
                    taken = min(old.shape[2], kept)
                    buffer[start : start + len(rows), :, kept - taken : kept] = old[rows, :, old.shape[2] - taken :]
                start += len(rows)
            if window is None:
                setattr(layer, _BUFFERS[name], buffer)
            setattr(layer, name, buffer[:, :, :kept])
        if window is not None:
            layer.cumulative_length = width
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare; the library's layer copies them at every token.

    most: columns that it never outgrows.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.key_buffer, self.value_buffer = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self.key_buffer, self.value_buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self.key_buffer.shape[-2]:
            room = max(end, _room(end, self._most))
            self.key_buffer, self.value_buffer = _roomier(self.keys, room), _roomier(self.values, room)
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:  # a body that wrote nothing, which the proof refuses
            return
        end = self.keys.shape[-2]
        self.key_buffer = self.key_buffer.index_select(0, beam_idx)
        self.value_buffer = self.value_buffer.index_select(0, beam_idx)
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]


def num_bytes(cache: DynamicCache) -> int:
    """What the keys and values of all rows and columns take, without spare room."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _room(width: int, most: int) -> int:
    """Columns to make room for: half as many again, so that growing costs little."""
    return max(width, min(width + width // 2 + 16, most))


def _roomier(states_BHTD: Tensor, room: int) -> Tensor:
    batch, heads, length, width = states_BHTD.shape
    buffer = states_BHTD.new_empty(batch, heads, room, width)
    buffer[:, :, :length] = states_BHTD
    return buffer
