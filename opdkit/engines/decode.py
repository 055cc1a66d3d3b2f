"""The decoding loop: one batch of prompts through a Hugging Face module, one token per row and step.

Own loop, because `generate` does not give what is needed: log-probs under the distribution that was sampled, and rows
that do not depend on their batch. It is also faster where it matters: siblings share the pass over their prompt, the
cache grows in place instead of being copied at every token, finished rows leave the batch, and a batch that has grown
too large or too small stops, so that its rows go on in batches of another size.

What a row gets depends on its own prompt, seed and parameters. The last bits of a matrix product still depend on the
shape of the batch, so a number that falls within about 1e-7 of a boundary between two tokens can go either way.

Letters: B rows in the batch, U different prompts, P positions of the longest prompt, T positions, H hidden width,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.causal import CausalModel, Ids
from opdkit.engines.draw import Uniforms, cuts, draw, uncut_logprob
from opdkit.errors import UserError
from opdkit.losses.logprobs import math_dtype, product_dtype

FINISHED_SHARE = 1 / 8  # finished rows leave once they are more than this share of the batch: leaving copies the cache
LEFT_SHARE = 1 / 2  # with so few of its rows left a batch stops, if others wait: a GPU's step costs the same for any
READ_TOKENS = 65536  # of prompts in one pass; longer ones are read in several, where the cache allows it


def decode(
    model: CausalModel,
    prompts: Sequence[Ids],
    seeds: Sequence[int],
    params: SamplingParams,
    on_finished: Callable[[int], bool],
    *,
    limits: Sequence[int],
    drawn: Sequence[int],
    max_tokens: int,
    others_wait: bool,
) -> list[Sampled]:
    """One answer per prompt, or its beginning. Call it without gradients and inside `model.evaluating`; equal prompts
    are read once.

    limits       the most tokens each row may get (and not params.max_answer_tokens)
    drawn        how many numbers of its seed's stream each row has used before
    on_finished  gets the number of rows that have finished, after every token; False stops the batch
    max_tokens   several rows of more positions than this, together, stop the batch
    others_wait  a batch of which `LEFT_SHARE` is left stops too

    Rows that were stopped have finish "length" and fewer tokens than their limit. Nothing that stops a batch depends on
    a clock or on free memory. Raises UserError for logits that are not finite: a drawn token would be anything.
    """
    device, limit, num_rows = model.device, max(limits), len(prompts)
    batch = Batch(model, prompts, limit)
    head = model.head().trimmed(product_dtype(batch.hidden_BH.dtype, device))
    # Fresh memory would cost page faults every step.
    memory = batch.hidden_BH.new_empty(num_rows, head.num_rows, dtype=math_dtype(batch.hidden_BH.dtype))
    uniforms = Uniforms(seeds, device, drawn)
    limit_B = torch.tensor(limits, device=device)
    is_stop_V = torch.zeros(model.num_tokens, dtype=torch.bool, device=device)
    is_stop_V[[token for token in model.stop_ids if token < model.num_tokens]] = True
    token_TB = torch.zeros(limit, num_rows, dtype=torch.long, device=device)
    logprob_TB = torch.zeros(limit, num_rows, device=device)
    uncut_TB = torch.zeros_like(logprob_TB) if cuts(params, model.num_tokens) else None
    row_B = torch.arange(num_rows, device=device)  # the rows that are still in the batch
    stopped_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for step in range(limit):
        output_BV = head.project(batch.hidden_BH, out=memory[: len(row_B)])
        scores_BV = head.logits(output_BV, params.temperature or 1.0)
        token_B, logprob_B = draw(scores_BV, uniforms.next(), params)
        token_TB[step].index_copy_(0, row_B, token_B)
        logprob_TB[step].index_copy_(0, row_B, logprob_B)
        if uncut_TB is not None:
            uncut_TB[step].index_copy_(0, row_B, uncut_logprob(scores_BV, token_B))
        stopped_B |= is_stop_V[token_B] | (limit_B[row_B] == step + 1)
        num_stopped, num_unknown = torch.stack([stopped_B.sum(), logprob_B.isnan().sum()]).tolist()  # one wait for both
        if num_unknown:
            raise _not_finite(model, num_unknown, step)
        left = len(row_B) - num_stopped
        going_on = on_finished(num_rows - left)
        too_large = left > 1 and left * (batch.width + 1) > max_tokens
        too_small = left <= (LEFT_SHARE * num_rows if others_wait else 0)
        if step + 1 == limit or too_large or too_small or not going_on:
            break
        if num_stopped > FINISHED_SHARE * len(row_B):
            kept = (~stopped_B).nonzero()[:, 0]
            row_B, token_B, stopped_B = row_B[kept], token_B[kept], stopped_B[kept]
            uniforms.keep(kept)
            batch.keep(kept)
        batch.advance(token_B)
    uncut_TB = None if uncut_TB is None else uncut_TB[: step + 1]
    return _answers(token_TB[: step + 1], logprob_TB[: step + 1], uncut_TB, is_stop_V, limits)


class Batch:
    """The transformer's side of the loop: cache, mask and positions. `hidden_BH` predicts each row's next token.

    Prompts are padded on the left, so that all rows write the same cache column. The mask hides the padding and
    positions are those of the row alone, 0 at its first token. `width` counts columns.
    """

    def __init__(self, model: CausalModel, prompts: Sequence[Ids], limit: int) -> None:
        self._body = model.body
        self._cache_name = _cache_name(model)
        self._cache = _cache(model, max(map(len, prompts)) + limit)
        unique: dict[tuple[int, ...], int] = {}
        for prompt in prompts:
            unique.setdefault(tuple(prompt), len(unique))
        ids_UP = model.padded(list(unique), side="left")
        size, lengths = ids_UP.shape[1], [len(prompt) for prompt in unique]
        padding_U1 = size - torch.tensor(lengths, device=model.device).unsqueeze(-1)
        column_T = torch.arange(size + limit, device=model.device)
        self._mask_BT = column_T >= padding_U1 if min(lengths) < size else None
        position_UP = (column_T[:size] - padding_U1).clamp_(min=0)
        self.width, at_once = 0, self._columns_at_once(ids_UP)
        for start in range(0, size, at_once):
            read = slice(start, start + at_once)
            self.width = min(size, read.stop)
            self._position_BT = position_UP[:, read]
            self.hidden_BH = self._forward(ids_UP[:, read])
        self._position_BT = self._position_BT[:, -1:]
        if len(unique) < len(prompts):
            self.keep(torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=model.device))

    def keep(self, rows: Tensor) -> None:
        """The batch becomes these rows of itself, in this order; a row may be taken several times."""
        self._cache.reorder_cache(rows)
        self._mask_BT = None if self._mask_BT is None else self._mask_BT[rows]
        self._position_BT = self._position_BT[rows]
        self.hidden_BH = self.hidden_BH[rows]

    @property
    def cache_bytes(self) -> int:
        """What the keys and values of all rows and columns take, without spare room."""
        tensors = (getattr(layer, name, None) for layer in self._cache.layers for name in ("keys", "values"))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def advance(self, token_B: Tensor) -> None:
        self.width += 1
        self._position_BT = self._position_BT + 1
        self.hidden_BH = self._forward(token_B[:, None])

    def _columns_at_once(self, ids_UP: Tensor) -> int:
        """How many columns of prompts one pass reads: the mask over padded rows is [rows, columns, positions]. Only
        attention can be read in pieces; a state is carried on one token at a time."""
        attention = (_GrowingLayer, DynamicSlidingWindowLayer)
        if all(isinstance(layer, attention) for layer in self._cache.layers):
            return max(1, READ_TOKENS // len(ids_UP))
        return ids_UP.shape[1]

    def _forward(self, ids_BT: Tensor) -> Tensor:
        # A state-space model masks the tokens it is given, which behind the prompt are never padding.
        mask_BT = None if self._cache_name == STATES and ids_BT.shape[1] < self.width else self._mask_BT
        out = self._body(
            input_ids=ids_BT,
            attention_mask=None if mask_BT is None else mask_BT[:, : self.width],
            position_ids=self._position_BT,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        return out.last_hidden_state[:, -1]


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare; the library's layer copies them at every token.

    most: positions that no row outgrows.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_buffer = key_states[:, :, :0]
            self._value_buffer = value_states[:, :, :0]
            self.keys, self.values = self._key_buffer, self._value_buffer
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            room = max(end, min(end + end // 2 + 16, self._most))
            self._key_buffer, self._value_buffer = _roomier(self.keys, room), _roomier(self.values, room)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:  # a body that wrote nothing, which the proof refuses
            return
        end = self.keys.shape[-2]
        self._key_buffer = self._key_buffer.index_select(0, beam_idx)
        self._value_buffer = self._value_buffer.index_select(0, beam_idx)
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]


def _roomier(states_BHTD: Tensor, room: int) -> Tensor:
    batch, heads, length, width = states_BHTD.shape
    buffer = states_BHTD.new_empty(batch, heads, room, width)
    buffer[:, :, :length] = states_BHTD
    return buffer


KEYS, STATES = (
    "past_key_values",
    "cache_params",
)  # Mamba's has states instead of keys; most models swallow unknown names


def _cache_name(model: CausalModel) -> str:
    names = inspect.signature(model.body.forward).parameters
    for name in (KEYS, STATES):
        if name in names:
            return name
    raise UserError(f"{model.name} takes no cache that opdkit knows ({KEYS} or {STATES}); use another model.")


def _cache(model: CausalModel, most: int) -> DynamicCache:
    """The library's cache for this architecture; plain attention layers, and only those, become growing ones."""
    cache = DynamicCache(config=model.body.config)
    cache.layers = [_GrowingLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _not_finite(model: CausalModel, num: int, step: int) -> UserError:
    return UserError(
        f"{model.name} in {str(model.dtype).removeprefix('torch.')} gives logits that are no finite numbers ({num} of "
        f"the answers that are sampled, at their token {step + 1}), so there is nothing to draw from: its weights are "
        "damaged or have diverged; go on from an earlier checkpoint with a lower learning rate, or take another copy."
    )


def _answers(
    token_TB: Tensor, logprob_TB: Tensor, uncut_TB: Tensor | None, is_stop_V: Tensor, limits: Sequence[int]
) -> list[Sampled]:
    """Each row up to its first stop token or its limit, or as far as it came; what follows was drawn for nobody."""
    ids_TB, logprobs_TB = token_TB.cpu().numpy(), logprob_TB.cpu().numpy()
    uncut = None if uncut_TB is None else uncut_TB.cpu().numpy()
    stop_TB = is_stop_V.cpu().numpy()[ids_TB] & (np.arange(len(ids_TB))[:, None] < limits)
    stopped_B = stop_TB.any(0)
    length_B = np.where(stopped_B, stop_TB.argmax(0) + 1, np.minimum(limits, len(ids_TB)))
    return [
        Sampled(
            answer_ids=tuple(ids_TB[:length, row].tolist()),
            logprobs_T=logprobs_TB[:length, row].copy(),
            finish="stop" if stopped_B[row] else "length",
            uncut_logprobs_T=None if uncut is None else uncut[:length, row].copy(),
        )
        for row, length in enumerate(length_B)
    ]
