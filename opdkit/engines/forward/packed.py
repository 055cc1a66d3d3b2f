"""Rows one behind the other in one pass, and what several of them begin with only once.

A transformer reads every token by itself, except in attention. So rows need no padding and a common beginning no second
reading, if attention lets each token read the tokens before it in its own row, and nothing else; gradients then reach
the common beginning once by themselves, and activation checkpointing sees nothing unusual. Positions are those of the
row alone. Three ways, by what attention the model was loaded with:

- "pieces" (CPU; any device without flex attention): the model's own attention, once for each segment, over the keys of
  its row. Without a mask where a row stands alone, so the causal kernel does no more than it must; short segments of
  one length, behind as many tokens, side by side, as a call costs more than they do.
- "flex" (CUDA): one kernel over all of it, with the tree as a block mask. Soft-caps and sinks as transformers has them.
- "varlen" (models loaded with flash attention): one call with the rows' lengths; rows that share nothing.

Which tokens of its own row a layer reads (all, a window, a chunk) is the model's own mask function, asked about
positions in the row. A model is packed only if `engines.prove` finds the same states as in a padded pass.

Letters: T columns of the pass, H hidden width, Q columns of a piece, K columns that it reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opdkit.engines.forward.prefix_tree import Forest

Way = Literal["pieces", "flex", "varlen"]
Allowed = Callable[..., Any]  # (batch, head, position q, position k) -> whether q reads k; of any shapes that broadcast
_NAME = "opdkit_packed"  # under which transformers finds the attention of a packed pass; no "flash" in it
_MASKED_PIECE = 256  # columns of a branch that are read at once: a mask is [these, columns of the row]
_SIDE_BY_SIDE = 256  # columns of a row up to which it is copied to stand beside others like it
_BLOCK = 128  # a flex pass is filled up to a multiple of it, so that there are few shapes to compile for
_reading: ContextVar[_Reading] = ContextVar("opdkit_packed_reading")


@dataclass(frozen=True, slots=True)
class _Reading:
    """One pass: its trees, how it is read, and with which attention the model was loaded."""

    forest: Forest
    way: Way
    attention: str
    position_T: Tensor


def way_of(body: nn.Module, device: torch.device) -> Way:
    """How a model's attention is packed."""
    attention = str(body.config._attn_implementation)
    if "flash" in attention:
        return "varlen"
    return "flex" if device.type == "cuda" and attention in ("sdpa", "flex_attention") else "pieces"


def num_filled(forest: Forest, way: Way) -> int:
    """Columns that a pass is filled up with, behind those of the trees."""
    return -len(forest.ids_T) % _BLOCK if way == "flex" else 0


def states(body: nn.Module, ids_1T: Tensor, forest: Forest, way: Way) -> Tensor:
    """[T, H] of every column of one pass; `ids_1T` is filled up. "varlen" reads trees of one segment only."""
    position_T = np.concatenate([forest.position_T, np.zeros(num_filled(forest, way), dtype=np.int64)])
    position_1T = torch.from_numpy(position_T).to(ids_1T.device)[None]
    reading = _Reading(forest, way, str(body.config._attn_implementation), position_1T[0])
    # A mask of ones, so that transformers does not look for packed rows by itself: branches begin anywhere.
    own = {"attention_mask": torch.ones_like(ids_1T)}
    token = _reading.set(reading)
    try:
        with packed_attention(body, way):
            options = _lengths(forest, ids_1T.device) if way == "varlen" else own
            out = body(input_ids=ids_1T, position_ids=position_1T, use_cache=False, **options)
    finally:
        _reading.reset(token)
    return out.last_hidden_state[0]


@contextmanager
def packed_attention(body: nn.Module, way: Way | None) -> Iterator[None]:
    """Inside the block the model's layers find the attention of a packed pass. way None, or "varlen": their own."""
    if way in (None, "varlen"):
        yield
        return
    configs = {id(m.config): m.config for m in body.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _lengths(forest: Forest, device: torch.device) -> dict[str, Any]:
    ends = [segment.end for segment in forest.segments]
    longest = max(segment.end - segment.start for segment in forest.segments)
    ends_R = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": ends_R, "cu_seq_lens_k": ends_R, "max_length_q": longest, "max_length_k": longest}


class _Piece(NamedTuple):
    """Columns that are read at once, and the pieces of their row that they read, themselves last."""

    size: int
    path: tuple[int, ...]
    is_plain: bool  # every token reads itself and all before it, so that the causal kernel needs no mask


class _Pieces:
    """What stands in the place of a mask in a "pieces" pass; one for each kind of layer.

    allowed: the model's own: whether position q of a row reads position k of it.
    """

    def __init__(self, reading: _Reading, allowed: Allowed) -> None:
        self.attention = reading.attention
        self._allowed = allowed
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self.pieces: list[_Piece] = []
        path_to: list[tuple[int, ...]] = []
        position_T = reading.position_T
        for segment in reading.forest.segments:
            path = () if segment.parent < 0 else path_to[segment.parent]
            length = segment.end - segment.start
            is_plain = (
                not path and self.attention == "sdpa" and self._is_causal(position_T[segment.start : segment.end])
            )
            at_once = length if is_plain else _MASKED_PIECE
            for start in range(segment.start, segment.end, at_once):
                size = min(at_once, segment.end - start)
                path = (*path, len(self.pieces))
                self.pieces.append(_Piece(size, path, is_plain))
            path_to.append(path)
        self._position_T = position_T.split([piece.size for piece in self.pieces])
        self.pieces = [self._without_unread(piece) for piece in self.pieces]
        alike: dict[tuple[Any, ...], list[int]] = {}
        begins = np.cumsum([0, *(piece.size for piece in self.pieces)]).tolist()
        for number, piece in enumerate(self.pieces):
            read = tuple((int(reading.forest.position_T[begins[p]]), self.pieces[p].size) for p in piece.path)
            is_short = sum(size for _, size in read) <= _SIDE_BY_SIDE
            alike.setdefault((piece.is_plain, *read) if is_short else (number,), []).append(number)
        self.calls = list(alike.values())  # numbers of the pieces that are read in one call: they have one mask

    def _is_causal(self, position_T: Tensor) -> bool:
        """Of one row: what the last token reads of the first, with every window and chunk, every other pair reads."""
        return self._allowed is causal_mask_function or bool(self._allowed(0, 0, position_T[-1:], position_T[:1]))

    def _without_unread(self, piece: _Piece) -> _Piece:
        """Of its row the piece reads what its first token reads the last token of: a window or chunk is no longer."""
        if len(piece.path) == 1 or self._allowed is causal_mask_function:
            return piece
        lasts = torch.stack([self._position_T[number][-1] for number in piece.path[:-1]])
        reads = self._allowed(0, 0, self._position_T[piece.path[-1]][:1], lasts).tolist()
        return piece._replace(path=(*(n for n, does in zip(piece.path, reads, strict=False) if does), piece.path[-1]))

    def mask(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, columns, columns that they read], 0 or the least number; None: plainly causal."""
        piece = self.pieces[number]
        if piece.is_plain:
            return None
        if (number, dtype) not in self._masks:
            q_Q, k_K = self._position_T[number], torch.cat([self._position_T[p] for p in piece.path])
            allowed_QK = self._allowed(0, 0, q_Q[:, None], k_K[None, :]).expand(len(q_Q), len(k_K))
            zeros_QK = torch.zeros(allowed_QK.shape, dtype=dtype, device=q_Q.device)
            self._masks[number, dtype] = zeros_QK.masked_fill_(~allowed_QK, torch.finfo(dtype).min)[None, None]
        return self._masks[number, dtype]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, heads, T, width] to [1, T, heads, width]."""
    if not isinstance(attention_mask, _Pieces):
        from transformers.integrations.flex_attention import flex_attention_forward

        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    packed = attention_mask
    theirs = _attention_of(module, packed.attention)
    sizes = [piece.size for piece in packed.pieces]
    # `split`, not slices: its backward writes the gradient once, and not once for each piece.
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    outs: dict[int, Tensor] = {}
    for numbers in packed.calls:
        path = list(zip(*(packed.pieces[number].path for number in numbers), strict=True))
        read = [_joined([_beside(states, some) for some in path]) for states in (keys, values)]
        mask = packed.mask(numbers[0], query.dtype)
        out = theirs(module, _beside(queries, numbers), *read, mask, **options)[0]
        outs.update(zip(numbers, out.split(1), strict=True))
    return torch.cat([outs[number] for number in range(len(sizes))], dim=1), None


def _beside(states: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """[pieces, heads, columns, width] of pieces of one size; of one that all read, without a copy."""
    if len({*numbers}) == 1:
        return states[numbers[0]].expand(len(numbers), -1, -1, -1)
    return torch.cat([states[number] for number in numbers])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=2)


def _attention_of(module: Any, name: str) -> Callable[..., Any]:
    """What the layer would have called: transformers' of that name, or the eager one of its own file."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, own)


def _mask_of(*args: Any, mask_function: Allowed, use_vmap: bool = False, **options: Any) -> Any:
    """What a layer's mask is in a packed pass. Called by transformers, once for each kind of layer."""
    reading = _reading.get()
    if use_vmap:
        raise NotImplementedError("a mask that cannot be asked about positions")
    if reading.way == "pieces":
        return _Pieces(reading, mask_function)
    return block_mask(reading.forest, reading.position_T, mask_function)


def block_mask(forest: Forest, position_T: Tensor, allowed: Allowed) -> Any:
    """A `BlockMask`: column q reads column k iff it is in the tree below it, and its layer reads that far."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_columns, device = len(position_T), position_T.device
    filling = np.arange(len(forest.ids_T), num_columns) + 1  # a filled-up column is read by itself
    until_T = torch.from_numpy(np.concatenate([forest.reads_until_T, filling])).to(device)

    def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until_T[k]) & allowed(b, h, position_T[q], position_T[k])

    return create_block_mask(reads, 1, None, num_columns, num_columns, device=device, _compile=device.type == "cuda")


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mask_of)
