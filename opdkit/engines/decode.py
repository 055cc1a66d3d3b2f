"""The decoding loop: one batch of prompts through a Hugging Face module, one token per row and step.

Own loop, because `generate` does not give what is needed: log-probs under the distribution that was sampled, and rows
that do not depend on their batch. It is also faster where it matters: siblings share the pass over their prompt, the
cache grows in place instead of being copied at every token, and finished rows leave the batch.

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
from transformers.cache_utils import DynamicCache, DynamicLayer

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.causal import CausalModel, Ids
from opdkit.engines.draw import Uniforms, cuts, draw, uncut_logprob
from opdkit.errors import UserError
from opdkit.losses.logprobs import math_dtype, product_dtype

FINISHED_SHARE = 1 / 8  # finished rows leave once they are more than this share of the batch: leaving copies the cache


def decode(
    model: CausalModel,
    prompts: Sequence[Ids],
    seeds: Sequence[int],
    params: SamplingParams,
    on_finished: Callable[[int], None],
    *,
    limits: Sequence[int],
    drawn: Sequence[int],
) -> list[Sampled]:
    """One answer per prompt. Call it without gradients and inside `model.evaluating`; equal prompts are read once.

    limits       the most tokens each row may get (and not params.max_answer_tokens)
    drawn        how many numbers of its seed's stream each row has used before
    on_finished  gets the number of rows that have finished, after every token
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
        num_stopped = int(stopped_B.sum())
        on_finished(num_rows - len(row_B) + num_stopped)
        if num_stopped == len(row_B) or step + 1 == limit:
            break
        if num_stopped > FINISHED_SHARE * len(row_B):
            going_on = (~stopped_B).nonzero()[:, 0]
            row_B, token_B, stopped_B = row_B[going_on], token_B[going_on], stopped_B[going_on]
            uniforms.keep(going_on)
            batch.keep(going_on)
        batch.advance(token_B)
    on_finished(num_rows)
    uncut_TB = None if uncut_TB is None else uncut_TB[: step + 1]
    return _answers(token_TB[: step + 1], logprob_TB[: step + 1], uncut_TB, is_stop_V, limits)


class Batch:
    """The transformer's side of the loop: cache, mask and positions. `hidden_BH` predicts each row's next token.

    Prompts are padded on the left, so that all rows write the same cache column. The mask hides the padding and
    positions are those of the row alone, 0 at its first token.
    """

    def __init__(self, model: CausalModel, prompts: Sequence[Ids], limit: int) -> None:
        self._body = model.body
        self._cache_name = _cache_name(model)
        self._cache = _cache(model)
        unique: dict[tuple[int, ...], int] = {}
        for prompt in prompts:
            unique.setdefault(tuple(prompt), len(unique))
        ids_UP = model.padded(list(unique), side="left")
        self._width = ids_UP.shape[1]
        lengths = [len(prompt) for prompt in unique]
        padding_U1 = self._width - torch.tensor(lengths, device=model.device).unsqueeze(-1)
        column_T = torch.arange(self._width + limit, device=model.device)
        self._mask_BT = column_T >= padding_U1 if min(lengths) < self._width else None
        self._position_BT = (column_T[: self._width] - padding_U1).clamp_(min=0)
        self.hidden_BH = self._forward(ids_UP)
        self._position_BT = self._position_BT[:, -1:]
        if len(unique) < len(prompts):
            self.keep(torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=model.device))

    def keep(self, rows: Tensor) -> None:
        """The batch becomes these rows of itself, in this order; a row may be taken several times."""
        self._cache.reorder_cache(rows)
        self._mask_BT = None if self._mask_BT is None else self._mask_BT[rows]
        self._position_BT = self._position_BT[rows]
        self.hidden_BH = self.hidden_BH[rows]

    def advance(self, token_B: Tensor) -> None:
        self._width += 1
        self._position_BT = self._position_BT + 1
        self.hidden_BH = self._forward(token_B[:, None])

    def _forward(self, ids_BT: Tensor) -> Tensor:
        # A state-space model masks the tokens it is given, which behind the prompt are never padding.
        mask_BT = None if self._cache_name == STATES and ids_BT.shape[1] < self._width else self._mask_BT
        out = self._body(
            input_ids=ids_BT,
            attention_mask=None if mask_BT is None else mask_BT[:, : self._width],
            position_ids=self._position_BT,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        return out.last_hidden_state[:, -1]


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare; the library's layer copies them at every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_buffer = key_states[:, :, :0]
            self._value_buffer = value_states[:, :, :0]
            self.keys, self.values = self._key_buffer, self._value_buffer
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            room = end + end // 2 + 16
            self._key_buffer, self._value_buffer = _roomier(self.keys, room), _roomier(self.values, room)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # gives new tensors without spare room
        self._key_buffer, self._value_buffer = self.keys, self.values


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


def _cache(model: CausalModel) -> DynamicCache:
    """The library's cache for this architecture; plain attention layers, and only those, become growing ones."""
    cache = DynamicCache(config=model.body.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _answers(
    token_TB: Tensor, logprob_TB: Tensor, uncut_TB: Tensor | None, is_stop_V: Tensor, limits: Sequence[int]
) -> list[Sampled]:
    """Each row up to its first stop token or its limit; what follows was drawn for nobody."""
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
