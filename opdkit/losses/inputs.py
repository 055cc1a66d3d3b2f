"""What `head_loss` is given: the student's head, what each view says, and the checks that they fit the losses.

Letters: N tokens, V vocabulary (`num_tokens`), H hidden width, K length of the teacher's top-k list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses import logprobs, memory
from opdkit.losses.logprobs import math_dtype, product_dtype
from opdkit.losses.terms import Term, counted_tokens
from opdkit.types import Asked

# Far below any logit and finite: its probability is exactly 0, and 0 times its log-probability is 0 and not NaN.
ABSENT_LOGIT = -1e5
# A matrix product whose rows begin at addresses that are no multiple of 16 bytes falls to kernels without wide loads,
# several times slower, and most vocabularies (Qwen3's 151669) are odd: a GPU's copy of the head is filled up to this.
ROW_MULTIPLE = {"cpu": 1, "cuda": 64}


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

    def trimmed(self, *dtypes: torch.dtype) -> Head:
        """The same head, rounded to each of `dtypes` in turn, without the rows beyond the tokenizer's vocabulary. Rows
        of zeros fill it up to a `ROW_MULTIPLE`: they are multiplied, and their products never read."""
        missing = -self.num_tokens % ROW_MULTIPLE.get(self.weight_VH.device.type, 1)

        def cut(array: Tensor) -> Tensor:
            array = array[: self.num_tokens]
            for dtype in dtypes:
                array = memory.cast(array, dtype)
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
    """A head applied to chunk after chunk of hidden states, into the same memory each time.

    Fresh memory of this size is dear (`memory.py`).
    """

    def __init__(self, head: Head, hidden_NH: Tensor) -> None:
        self._compute_dtype = compute_dtype(hidden_NH)
        self.dtype = product_dtype(self._compute_dtype, hidden_NH.device)
        with torch.no_grad():
            self.head, self.hidden_NH = head.trimmed(self._compute_dtype, self.dtype), hidden_NH
        self._output = hidden_NH.new_empty(0, self.head.num_rows, dtype=math_dtype(self.dtype))
        self._probs = hidden_NH.new_empty(0, self.head.num_tokens, dtype=math_dtype(self.dtype))

    def hidden(self, rows: Tensor) -> Tensor:
        """[n, H] as the head's matrix product takes them in: rounded to autocast's dtype where that applies."""
        return self.hidden_NH[rows].to(self._compute_dtype).to(self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, V] plain output for these tokens; valid until the next call."""
        self._output = memory.at_least(len(rows), self._output)
        return self.head.project(self.hidden(rows), out=self._output[: len(rows)])

    def distribution_(self, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        """`logprobs.distribution_` of logits of this head; the probabilities are valid until the next call."""
        if logits_nV.dtype != self._probs.dtype:
            return logprobs.distribution_(logits_nV)
        self._probs = memory.at_least(len(logits_nV), self._probs)
        return logprobs.distribution_(logits_nV, out=self._probs[: len(logits_nV)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewTokens:
    """What a view said of N tokens. A loss that it cannot answer is refused by name.

    hidden_NH          raw hidden states, with the `head` they were made for: answers every support; a width of its own
    topk_ids_NK        the view's likeliest ids, and
    topk_logprob_NK    their log-probabilities in nats, over the full vocabulary and already at the loss temperature
    sampled_logprob_N  the sampled token's, likewise

    Values at tokens that no term asking this view counts are never used: they may be NaN.
    """

    hidden_NH: Tensor | None = None
    head: Head | None = None
    topk_ids_NK: Tensor | None = None
    topk_logprob_NK: Tensor | None = None
    sampled_logprob_N: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.hidden_NH is None) != (self.head is None):
            raise ValueError("a view's hidden_NH and head belong together; one of them is missing")
        if (self.topk_ids_NK is None) != (self.topk_logprob_NK is None):
            raise ValueError("a view's topk_ids_NK and topk_logprob_NK belong together; one of them is missing")

    def take(self, index: Tensor | slice) -> ViewTokens:
        """What was said of some of the tokens (LongTensor of positions, bool mask or slice over N)."""
        return replace(self, **{name: array[index] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, Tensor]:
        """The arrays that are there, by name."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "head"}
        return {name: array for name, array in arrays.items() if array is not None}


class Batch:
    """What one call of `head_loss` reads, checked and ready: heads trimmed, unknowns that nothing counts blanked."""

    def __init__(
        self,
        hidden_NH: Tensor,
        head: Head,
        sampled_ids_N: Tensor,
        terms: Sequence[Term],
        views: Mapping[str, ViewTokens],
        temperature: float,
    ) -> None:
        check_inputs(hidden_NH, head, sampled_ids_N, terms, views)
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature} must be above 0")
        self.temperature, self.sampled_ids_N = temperature, sampled_ids_N
        self.student = Projector(head, hidden_NH)
        self.terms, self.views = blank_uncounted(terms, views)
        self.projectors: dict[str, Projector] = {}
        for name in views_with_logits(terms, views, head.num_tokens):
            view = self.views[name]
            assert view.head is not None and view.hidden_NH is not None
            self.projectors[name] = Projector(view.head, view.hidden_NH)
        counted_N = counted_tokens(terms)
        check_ids("sampled_ids_N", sampled_ids_N[counted_N], head.num_tokens)
        for name, view in self.views.items():
            if view.topk_ids_NK is not None:
                check_ids(f"view {name!r}: topk_ids_NK", view.topk_ids_NK[counted_N], head.num_tokens)

    def parts(self) -> Iterator[tuple[Tensor, list[Term]]]:
        """The counted tokens, in sets that the same terms count: (their positions, those terms). No set asks a view for
        a token that it did not read."""
        counted_SN = torch.stack([term.coef_N != 0 for term in self.terms])
        bit_S1 = (1 << torch.arange(len(self.terms), device=counted_SN.device)).unsqueeze(-1)
        code_N = (counted_SN * bit_S1).sum(0)
        for code in code_N.unique().tolist():
            if code:
                terms = [term for number, term in enumerate(self.terms) if code >> number & 1]
                yield (code_N == code).nonzero().squeeze(-1), terms


def compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What the head's matrix product runs in: autocast's dtype where that applies (not to fp64), else the input's."""
    device = hidden_NH.device.type
    if hidden_NH.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype


def check_inputs(
    hidden_NH: Tensor, head: Head, sampled_ids_N: Tensor, terms: Sequence[Term], views: Mapping[str, ViewTokens]
) -> None:
    """Raises ValueError if the arrays do not fit each other."""
    if not terms:
        raise ValueError("head_loss was given no terms")
    names = [term.name for term in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"the names of terms must differ, but are {names}")
    lengths = {"sampled_ids_N": len(sampled_ids_N)} | {
        f"coef_N of term {term.name!r}": len(term.coef_N) for term in terms
    }
    for view, said in views.items():
        lengths |= {f"view {view!r}: {name}": len(array) for name, array in said.arrays().items()}
        if said.head is not None and said.head.num_compared != head.num_tokens:
            raise ValueError(
                f"view {view!r}: its head has num_tokens = {said.head.num_compared}, the student's {head.num_tokens}; "
                "both must be the size of one tokenizer"
            )
    for name, length in lengths.items():
        if length != len(hidden_NH):
            raise ValueError(f"hidden_NH holds {len(hidden_NH)} tokens, but {name} holds {length}")


def views_with_logits(terms: Sequence[Term], views: Mapping[str, ViewTokens], num_tokens: int) -> list[str]:
    """Views that must be read from their hidden states. Raises ValueError if what a term asks of a view is missing."""
    found = []
    for term in terms:
        for name, asked in term.asks.items():
            view = views.get(name, ViewTokens())
            if _lists_answer(view, asked, num_tokens):
                continue
            if view.hidden_NH is None:
                listed = {
                    "sampled": "sampled_logprob_N or ",
                    "topk": f"topk_ids_NK and topk_logprob_NK with K >= {asked.k}, or ",
                }
                raise ValueError(
                    f"term {term.name!r} needs of view {name!r} {listed.get(asked.answer, '')}hidden_NH and head: "
                    f"{term.loss}"
                )
            if name not in found:
                found.append(name)
    return found


def _lists_answer(view: ViewTokens, asked: Asked, num_tokens: int) -> bool:
    if asked.answer == "sampled":
        return view.sampled_logprob_N is not None
    if asked.answer == "topk" and view.topk_ids_NK is not None:
        assert asked.k is not None
        return view.topk_ids_NK.shape[-1] >= min(asked.k, num_tokens)
    return False


def blank_uncounted(terms: Sequence[Term], views: Mapping[str, ViewTokens]) -> tuple[list[Term], dict[str, ViewTokens]]:
    """Zeros in place of per-token inputs that no coefficient counts, so that an unknown (NaN) there cannot spread; of
    the views only those that a term asks."""
    blanked = [
        replace(
            term,
            advantage_N=_blank(term.advantage_N, term.coef_N != 0),
            old_logprob_N=_blank(term.old_logprob_N, term.coef_N != 0),
        )
        for term in terms
    ]
    asked = {}
    for name, view in views.items():
        asking = [term for term in terms if name in term.asks]
        if asking:
            asked_N = counted_tokens(asking)
            arrays = {} if bool(asked_N.all()) else view.arrays()
            asked[name] = replace(view, **{array: _blank(values, asked_N) for array, values in arrays.items()})
    return blanked, asked


def check_ids(what: str, ids: Tensor, num_tokens: int) -> None:
    """Raises ValueError if an id is outside the vocabulary."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_tokens:
        raise ValueError(
            f"{what} holds ids from {int(ids.min())} to {int(ids.max())}; the vocabulary has {num_tokens} tokens"
        )


def _blank(array: Tensor | None, keep_N: Tensor) -> Tensor | None:
    if array is None:
        return None
    return array.masked_fill(~keep_N.view(-1, *[1] * (array.dim() - 1)), 0)
