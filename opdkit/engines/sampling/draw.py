"""One token per row from its scores, with its log-prob under exactly the distribution it was drawn from.

A token is drawn by inverting the cumulative distribution at one uniform number: for 64 rows of 32,000 ids on a CPU
`torch.multinomial` takes 41 ms, this 2 ms, and the number comes from the row's own stream.

Letters: B rows, V vocabulary, K entries that are looked at, C blocks of a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import SamplingParams
from opdkit.errors import UserError

BLOCK = 256  # entries per block when many are drawn from in two steps
# Candidates looked at first for top-p; elsewhere all: a GPU sorts them sooner than it tells whether they are enough.
FIRST_NUCLEUS = {"cpu": 128}
UNIFORMS_AT_ONCE = 64  # random numbers made per row at a time; the stream does not depend on it


def check_params(params: SamplingParams) -> None:
    """Raise UserError for a sampling parameter outside its range."""
    ranges = [
        ("temperature", params.temperature, params.temperature >= 0, "0 (greedy) or more"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1 (off)"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (off) or more"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "between 0 (off) and 1"),
        ("max_answer_tokens", params.max_answer_tokens, params.max_answer_tokens >= 1, "1 or more"),
    ]
    for name, value, fine, wanted in ranges:
        if not fine:
            raise UserError(f"sampling.{name} = {value} is out of range; it must be {wanted}.")


def draw(scores_BV: Tensor, uniform_B1: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob (nats, float32) under the distribution it was drawn from: ([B], [B]).

    scores_BV   logits / temperature; overwritten unless `cuts(params, V)`
    uniform_B1  float64 in [0, 1)
    The distribution is softmax(scores), cut by top-k, then by top-p of what is left, then by min-p relative to the
    likeliest (the order of transformers' `generate`), and renormalised. At temperature 0 all mass is on the likeliest
    token, so its log-prob is 0. A row whose scores hold NaN or infinity gets some token, and the log-prob NaN.
    """
    if params.temperature == 0:
        best_B = scores_BV.argmax(-1)  # of NaN, if there is one
        return best_B, torch.where(scores_BV.gather(1, best_B[:, None])[:, 0].isfinite(), 0.0, torch.nan)
    scores_BK, ids_BK = kept_entries(scores_BV, params)
    mass_BK = scores_BK.sub_(scores_BK.amax(-1, keepdim=True)).exp_()
    index_B1, total_B1 = _invert(mass_BK, uniform_B1)
    logprob_B1 = (mass_BK.gather(1, index_B1) / total_B1).log()
    token_B1 = index_B1 if ids_BK is None else ids_BK.gather(1, index_B1)
    return token_B1[:, 0], logprob_B1[:, 0].float()


def cuts(params: SamplingParams, num_tokens: int) -> bool:
    """Whether some of the vocabulary may not be drawn."""
    return params.temperature > 0 and (0 < params.top_k < num_tokens or params.top_p < 1 or params.min_p > 0)


def uncut_logprob(scores_BV: Tensor, token_B: Tensor) -> Tensor:
    """[B] nats, float32: log-prob of tokens under the whole distribution, softmax(scores)."""
    scores_BV = scores_BV.float()
    return scores_BV.gather(1, token_B[:, None])[:, 0] - scores_BV.logsumexp(-1)


def kept_entries(scores_BV: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Scores of the entries that may be drawn (-inf: may not) and their ids; ids None: the entry is the id."""
    ids_BK: Tensor | None = None
    scores_BK, size = scores_BV, scores_BV.shape[1]
    if 0 < params.top_k < size:
        scores_BK, ids_BK = scores_BV.topk(params.top_k)
    if params.top_p < 1:
        peak_B1 = scores_BK.amax(-1, keepdim=True)
        wanted_B1 = params.top_p * (scores_BK - peak_B1).exp_().sum(-1, keepdim=True, dtype=torch.float64)
        if ids_BK is None:
            first = FIRST_NUCLEUS.get(scores_BV.device.type, size)
            scores_BK, ids_BK = _nucleus_candidates(scores_BV, peak_B1, wanted_B1, first)
        mass_BK = (scores_BK - peak_B1).exp_()
        likelier_BK = mass_BK.cumsum(-1, dtype=torch.float64) - mass_BK  # mass of the entries before
        scores_BK = scores_BK.masked_fill(likelier_BK >= wanted_B1, -math.inf)
    if params.min_p > 0:
        floor_B1 = scores_BK.amax(-1, keepdim=True) + math.log(params.min_p)
        scores_BK = scores_BK.masked_fill(scores_BK < floor_B1, -math.inf)
    return scores_BK, ids_BK


class Uniforms:
    """Uniform numbers in [0, 1), one stream per row: position t of a row gets the t-th number of its seed's stream.

    Philox is counter-based, so streams of different seeds do not overlap. Nothing else is shared, hence a row's numbers
    do not depend on the other rows, on their order, or on who has finished.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._streams: list[np.random.Generator] = []
        self._ahead_TB1 = torch.empty(0, 0, 1, dtype=torch.float64, device=device)  # made, and not yet used
        self.change([], [(seed, 0) for seed in seeds])

    def next(self) -> Tensor:
        """[B, 1] float64, for the next position."""
        if not len(self._ahead_TB1):
            self._ahead_TB1 = self._made(self._streams, UNIFORMS_AT_ONCE)
        first_B1, self._ahead_TB1 = self._ahead_TB1[0], self._ahead_TB1[1:]
        return first_B1

    def change(self, rows: Sequence[int], others: Sequence[tuple[int, int]] = ()) -> None:
        """Only these rows go on, and behind them others: (seed, how many numbers of its stream are used already)."""
        fresh = [np.random.Generator(np.random.Philox(key=seed)) for seed, _ in others]
        for stream, (_, used) in zip(fresh, others, strict=True):
            stream.random(used)
        kept_TB1 = self._ahead_TB1[:, torch.tensor(list(rows), dtype=torch.long, device=self._device)]
        self._ahead_TB1 = torch.cat([kept_TB1, self._made(fresh, len(kept_TB1))], 1)
        self._streams = [*(self._streams[row] for row in rows), *fresh]

    def _made(self, streams: Sequence[np.random.Generator], num: int) -> Tensor:
        made_BT = np.array([stream.random(num) for stream in streams]).reshape(len(streams), num)
        return torch.from_numpy(np.ascontiguousarray(made_BT.T)).unsqueeze(-1).to(self._device)


def _nucleus_candidates(scores_BV: Tensor, peak_B1: Tensor, wanted_B1: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest entries and their ids, in falling order, enough of them to hold the wanted mass in every row.

    A full sort is slow and seldom needed: `count` entries first, more for the rows where they do not hold the mass.
    """
    scores_BK, ids_BK = scores_BV.topk(min(count, scores_BV.shape[1]))
    held_B1 = (scores_BK - peak_B1).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    short_B = (held_B1 < wanted_B1)[:, 0]
    if count >= scores_BV.shape[1] or not bool(short_B.any()):
        return scores_BK, ids_BK
    wider, wider_ids = _nucleus_candidates(scores_BV[short_B], peak_B1[short_B], wanted_B1[short_B], 32 * count)
    missing = (0, wider.shape[1] - scores_BK.shape[1])
    scores_BK = torch.nn.functional.pad(scores_BK, missing, value=-math.inf)
    ids_BK = torch.nn.functional.pad(ids_BK, missing)
    scores_BK[short_B], ids_BK[short_B] = wider, wider_ids
    return scores_BK, ids_BK


def _invert(mass_BK: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the cumulative distribution of unnormalised masses: (entry [B, 1], total mass [B, 1]).

    A large vocabulary is drawn from in two steps, a block and an entry in it: 256 times fewer numbers to accumulate.
    An entry of mass 0 is never returned.
    """
    size = mass_BK.shape[1]
    if size <= 8 * BLOCK:
        index_B1, _, total_B1 = _locate(mass_BK, uniform_B1)
        return index_B1, total_B1
    if size % BLOCK:
        mass_BK = torch.nn.functional.pad(mass_BK, (0, -size % BLOCK))
    mass_BCK = mass_BK.unflatten(1, (-1, BLOCK))
    block_B1, rest_B1, total_B1 = _locate(mass_BCK.sum(-1), uniform_B1)
    inside_BK = mass_BCK.take_along_dim(block_B1[:, :, None], 1)[:, 0]
    return block_B1 * BLOCK + _locate(inside_BK, rest_B1)[0], total_B1


def _locate(mass_BK: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(entry, how far into it the number falls: a fresh uniform number in [0, 1), total mass), each [B, 1].

    Sums are float64: beside a float32 sum near 1, masses under 3e-8 would vanish, which together are a visible part of
    a large vocabulary.
    """
    cumulative_BK = mass_BK.cumsum(-1, dtype=torch.float64)
    total_B1 = cumulative_BK[:, -1:]
    target_B1 = uniform_B1 * total_B1  # stays below the total when rounded, as uniforms are at most 1 - 2^-53
    index_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)  # the first sum above the target
    index_B1.clamp_(max=mass_BK.shape[1] - 1)  # NaN has none; on CUDA nothing works after a place beyond the end
    mass_B1 = mass_BK.gather(1, index_B1)
    below_B1 = cumulative_BK.gather(1, index_B1) - mass_B1
    rest_B1 = ((target_B1 - below_B1) / mass_B1).clamp_(0, 1 - 2**-40)
    return index_B1, rest_B1, total_B1
