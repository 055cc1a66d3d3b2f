"""The last layer of a language model, and its products with chunk after chunk of hidden states.

Letters: N tokens, n tokens of a chunk, V vocabulary (`num_tokens`), S rows of a slice of it, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses import logprobs, memory
from opdkit.losses.logprobs import math_dtype, product_dtype

# Far below any logit and finite: its probability is exactly 0, and 0 times its log-probability is 0 and not NaN.
ABSENT_LOGIT = -1e5
# A matrix product whose rows begin at addresses that are no multiple of 16 bytes falls to kernels without wide loads,
# several times slower, and most vocabularies (Qwen3's 151669) are odd: a GPU's copy of the head is filled up to this.
ROW_MULTIPLE = {"cpu": 1, "cuda": 64}
SLICE_BYTES = 4 << 20  # of rows of a head, converted: small beside a cache, and rows enough for an efficient product


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last layer of a language model: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    weight_VH    may have more rows than the tokenizer has ids (a padded vocabulary), and so may bias_V
    num_tokens   V, how many ids the tokenizer knows; rows from there on take no part, on either side
    absent_ids   ids below V that do not exist either (only one of two models knows them): their probability is 0
    logit_scale  multiplied (Cohere's logit_scale; 1 / Granite's logits_scaling)
    softcap      c tanh(. / c), after the scale (Gemma's final_logit_softcapping); None: no cap
    reader_ids_W long; where each of the W ids of another tokenizer stands among the V, -1: nowhere. Log-probabilities
                 are then given in those W ids, normalised over the V; None: the two are the same
    """

    weight_VH: Tensor
    num_tokens: int
    bias_V: Tensor | None = None
    absent_ids: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    reader_ids_W: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.num_tokens <= self.weight_VH.shape[0]:
            raise ValueError(f"num_tokens = {self.num_tokens}, but the head has {self.weight_VH.shape[0]} rows")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap} must be above 0; None means no cap")

    def trimmed(self, dtype: torch.dtype) -> Head:
        """The same head in `dtype`, without the rows beyond the tokenizer's vocabulary. Rows of zeros fill it up to a
        `ROW_MULTIPLE`: they are multiplied, and their products never read."""
        missing = -self.num_tokens % ROW_MULTIPLE.get(self.weight_VH.device.type, 1)

        def cut(array: Tensor) -> Tensor:
            array = memory.cast(array[: self.num_tokens], dtype)
            return torch.cat([array, array.new_zeros(missing, *array.shape[1:])]) if missing else array

        return replace(self, weight_VH=cut(self.weight_VH), bias_V=None if self.bias_V is None else cut(self.bias_V))

    @property
    def num_compared(self) -> int:
        """How many ids it is compared in: V, or W."""
        return self.num_tokens if self.reader_ids_W is None else len(self.reader_ids_W)

    @property
    def silent_W(self) -> Tensor | None:
        """[W] bool: the ids of the other tokenizer that it has no word for; None: it has one for all."""
        return None if self.reader_ids_W is None else self.reader_ids_W < 0

    def for_reader(self, values_nV: Tensor, silent: float) -> Tensor:
        """[n, W] of the other tokenizer's ids, `silent` where it has no word for one; [n, V] where there is none."""
        if self.reader_ids_W is None:
            return values_nV
        found_nW = values_nV.index_select(-1, self.reader_ids_W.clamp(min=0))
        return found_nW.masked_fill_(self.reader_ids_W < 0, silent)

    @property
    def num_rows(self) -> int:
        """What `project` writes of every token: the vocabulary, and what fills it up."""
        return self.weight_VH.shape[0]

    def project(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, V] plain output of a head `trimmed` for `hidden_nH`, hidden @ weight.T + bias, in `math_dtype`.

        Rounding logits to bf16 would cost 1.5 % of a gradient. Differentiable without `out`, memory [n, `num_rows`].
        """
        return self._project(hidden_nH, out)[:, : self.num_tokens]

    def _project(self, hidden_nH: Tensor, out: Tensor | None) -> Tensor:
        dtype = math_dtype(self.weight_VH.dtype)
        if out is None:
            bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
            return F.linear(hidden_nH.to(dtype), self.weight_VH.to(dtype), bias_V)
        hidden_nH = hidden_nH.to(self.weight_VH.dtype)
        if dtype != self.weight_VH.dtype:
            torch.mm(hidden_nH, self.weight_VH.T, out_dtype=dtype, out=out)
            return out if self.bias_V is None else out.add_(self.bias_V)
        if self.bias_V is None:
            return torch.mm(hidden_nH, self.weight_VH.T, out=out)
        return torch.addmm(self.bias_V, hidden_nH, self.weight_VH.T, out=out)

    def logits(self, output_nV: Tensor, temperature: float) -> Tensor:
        """[n, V] logits / temperature from the plain output, in `math_dtype`; in its memory where nothing changes."""
        output_nV = output_nV.to(math_dtype(output_nV.dtype))
        factor = self.logit_scale / temperature
        if self.softcap is not None:
            output_nV = torch.tanh(output_nV * (self.logit_scale / self.softcap)) * (self.softcap / temperature)
        elif factor != 1:
            output_nV = output_nV * factor
        return output_nV if self.absent_ids is None else output_nV.index_fill(-1, self.absent_ids, ABSENT_LOGIT)

    def slope(self, logits_nV: Tensor, temperature: float) -> Tensor | None:
        """[n, V] what the soft cap passes on of a small change, 1 - tanh^2, read off its `logits`; None: all."""
        return None if self.softcap is None else 1 - (logits_nV * (temperature / self.softcap)) ** 2


def mixed_head(reference: Head, other: Head, share: float) -> Head:
    """The head whose logits are (1 - share) reference + share other, over both hidden states side by side, [n, 2H].

    Exact for linear heads. Raises ValueError for soft-capped ones, whose mixture no head gives, and for two scales.
    """
    if (reference.softcap, other.softcap) != (None, None) or reference.logit_scale != other.logit_scale:
        raise ValueError(f"no head mixes {reference} and {other}: both must be uncapped and of one scale")
    parts = ((reference, 1 - share), (other, share))
    biases_V = [head.bias_V.detach() * factor for head, factor in parts if head.bias_V is not None]
    return Head(
        weight_VH=torch.cat([head.weight_VH.detach() * factor for head, factor in parts], -1),
        bias_V=torch.stack(biases_V).sum(0) if biases_V else None,
        num_tokens=reference.num_tokens,
        absent_ids=reference.absent_ids,
        logit_scale=reference.logit_scale,
    )


class Projector:
    """A head applied to chunk after chunk of hidden states, and what its gradient is multiplied with, into the same
    memory each time: fresh memory of this size is dear (`memory.py`).

    A head that is narrower than what its products take in is nowhere copied whole: a slice of the vocabulary is
    converted, multiplied from the cache, and forgotten. For a chunk of 128 tokens that adds 7 % to the products.
    """

    def __init__(self, head: Head, hidden_NH: Tensor) -> None:
        self._compute_dtype = compute_dtype(hidden_NH)
        self.dtype = product_dtype(self._compute_dtype, hidden_NH.device)
        with torch.no_grad():
            self.head, self.hidden_NH = head.trimmed(self._compute_dtype), hidden_NH
        self._output = hidden_NH.new_empty(0, self.head.num_rows, dtype=math_dtype(self.dtype))
        self._probs = hidden_NH.new_empty(0, self.head.num_tokens, dtype=math_dtype(self.dtype))
        self._slice_SH = hidden_NH.new_empty(0, self.head.weight_VH.shape[-1], dtype=self.dtype)

    def hidden(self, rows: Tensor) -> Tensor:
        """[n, H] as the head's matrix product takes them in: rounded to autocast's dtype where that applies."""
        return self.hidden_NH[rows].to(self._compute_dtype).to(self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, V] plain output for these tokens; valid until the next call."""
        self._output = memory.at_least(len(rows), self._output)
        hidden_nH, output_nV = self.hidden(rows), self._output[: len(rows)]
        for part in self.slices():
            self._rows(part).project(hidden_nH, out=output_nV[:, part])
        return output_nV[:, : self.head.num_tokens]

    def slices(self) -> Iterator[slice]:
        """The rows of the head that products take in at one time: all, unless they are converted for it."""
        num_rows, width = self.head.weight_VH.shape
        size = num_rows if self.head.weight_VH.dtype == self.dtype else SLICE_BYTES // (self.dtype.itemsize * width)
        for start in range(0, num_rows, max(1, size)):
            yield slice(start, min(start + max(1, size), num_rows))

    def _rows(self, part: slice) -> Head:
        """These rows of the head, as its products take them in; valid until the next call."""
        weight_SH, bias_V = self.head.weight_VH[part], self.head.bias_V
        if weight_SH.dtype != self.dtype:
            self._slice_SH = memory.at_least(len(weight_SH), self._slice_SH)
            weight_SH = self._slice_SH[: len(weight_SH)].copy_(weight_SH)
        bias_S = None if bias_V is None else bias_V[part].to(self.dtype)
        return replace(self.head, weight_VH=weight_SH, bias_V=bias_S, num_tokens=len(weight_SH))

    def grad_hidden(self, grad_nV: Tensor) -> Tensor:
        """[n, H] from the gradient with respect to the plain output (of all rows, in `dtype`)."""
        first, *others = self.slices()
        total_nH = grad_nV[:, first] @ self._rows(first).weight_VH
        for part in others:
            total_nH.addmm_(grad_nV[:, part], self._rows(part).weight_VH)
        return total_nH

    def distribution_(self, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        """`logprobs.distribution_` of logits of this head; the probabilities are valid until the next call."""
        if logits_nV.dtype != self._probs.dtype:
            return logprobs.distribution_(logits_nV)
        self._probs = memory.at_least(len(logits_nV), self._probs)
        return logprobs.distribution_(logits_nV, out=self._probs[: len(logits_nV)])


def compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What the head's matrix product runs in: autocast's dtype where that applies (not to fp64), else the input's."""
    device = hidden_NH.device.type
    if hidden_NH.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype
