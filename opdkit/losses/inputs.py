"""What `head_loss` is given: what each view says, and the checks that it fits the losses.

Letters: N tokens, V vocabulary (`num_tokens`), H hidden width, K length of the teacher's top-k list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from opdkit.losses.heads import Head, Projector
from opdkit.losses.terms import Term, counted_tokens
from opdkit.types import Asked


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
