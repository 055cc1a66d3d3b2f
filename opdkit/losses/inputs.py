"""What `head_loss` is given: the student's head, the teacher's word, and the checks that they fit the losses asked for.

Letters: N tokens, V vocabulary (`num_tokens`), H hidden width, K length of the teacher's top-k list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from opdkit.losses.logprobs import math_dtype
from opdkit.losses.terms import Term, counted_tokens
from opdkit.types import Needs

# Far below any logit and finite: its probability is exactly 0, and 0 times its log-probability is 0 and not NaN.
ABSENT_LOGIT = -1e5


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last layer of a language model: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    weight_VH    may have more rows than the tokenizer has ids (a padded vocabulary), and so may bias_V
    num_tokens   V, how many ids the tokenizer knows; rows from there on take no part, on either side
    absent_ids   ids below V that do not exist either (only one of two models knows them): their probability is 0
    logit_scale  multiplied (Cohere's logit_scale; 1 / Granite's logits_scaling)
    softcap      c tanh(. / c), after the scale (Gemma's final_logit_softcapping); None: no cap
    """

    weight_VH: Tensor
    num_tokens: int
    bias_V: Tensor | None = None
    absent_ids: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.num_tokens <= self.weight_VH.shape[0]:
            raise ValueError(f"num_tokens = {self.num_tokens}, but the head has {self.weight_VH.shape[0]} rows")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap} must be above 0; None means no cap")

    def trimmed(self, dtype: torch.dtype) -> Head:
        """The same head in `dtype`, without the rows beyond the tokenizer's vocabulary."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.num_tokens].to(dtype)
        return replace(self, weight_VH=self.weight_VH[: self.num_tokens].to(dtype), bias_V=bias_V)

    def project(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, V] plain output of a `trimmed` head, hidden @ weight.T + bias, in the dtype of hidden_nH."""
        if out is None:
            return F.linear(hidden_nH, self.weight_VH, self.bias_V)
        if self.bias_V is None:
            return torch.mm(hidden_nH, self.weight_VH.T, out=out)
        return torch.addmm(self.bias_V, hidden_nH, self.weight_VH.T, out=out)

    def logits(self, output_nV: Tensor, temperature: float) -> Tensor:
        """[n, V] logits / temperature from the plain output, in `math_dtype`."""
        output_nV = output_nV.to(math_dtype(output_nV.dtype))
        factor = self.logit_scale / temperature
        if self.softcap is not None:
            output_nV = torch.tanh(output_nV * (self.logit_scale / self.softcap)) * (self.softcap / temperature)
        elif factor != 1:
            output_nV = output_nV * factor
        return output_nV if self.absent_ids is None else output_nV.index_fill(-1, self.absent_ids, ABSENT_LOGIT)


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
        logit_scale=reference.logit_scale,
    )


class Projector:
    """A head applied to chunk after chunk of hidden states, into the same memory each time.

    Fresh memory of this size costs a CPU more in page faults than the arithmetic that fills it.
    """

    def __init__(self, head: Head, hidden_NH: Tensor) -> None:
        self.dtype = compute_dtype(hidden_NH)
        with torch.no_grad():
            self.head, self.hidden_NH = head.trimmed(self.dtype), hidden_NH
        self._memory_nV = hidden_NH.new_empty(0, head.num_tokens, dtype=self.dtype)

    def hidden(self, rows: Tensor) -> Tensor:
        """[n, H] in the dtype of the head's matrix product."""
        return self.hidden_NH[rows].to(self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, V] plain output for these tokens; valid until the next call."""
        if len(self._memory_nV) < len(rows):
            self._memory_nV = self._memory_nV.new_empty(len(rows), self.head.num_tokens)
        return self.head.project(self.hidden(rows), out=self._memory_nV[: len(rows)])


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTokens:
    """What the teacher said of N tokens. Give what there is; a loss that it cannot answer is refused by name.

    hidden_NH          raw hidden states, with the teacher's `head`: answers every support; its own width H
    topk_ids_NK        the teacher's likeliest ids, and
    topk_logprob_NK    their log-probabilities in nats, over the full vocabulary and already at the loss temperature
    sampled_logprob_N  the sampled token's, likewise

    Values at tokens that no teacher-asking term counts are never used: they may be NaN.
    """

    hidden_NH: Tensor | None = None
    head: Head | None = None
    topk_ids_NK: Tensor | None = None
    topk_logprob_NK: Tensor | None = None
    sampled_logprob_N: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.hidden_NH is None) != (self.head is None):
            raise ValueError("the teacher's hidden_NH and head belong together; one of them is missing")
        if (self.topk_ids_NK is None) != (self.topk_logprob_NK is None):
            raise ValueError("the teacher's topk_ids_NK and topk_logprob_NK belong together; one of them is missing")

    def take(self, index: Tensor | slice) -> TeacherTokens:
        """The teacher's word on some of the tokens (LongTensor of positions, bool mask or slice over N)."""
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
        teacher: TeacherTokens | None,
        temperature: float,
    ) -> None:
        check_inputs(hidden_NH, head, sampled_ids_N, terms, teacher)
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature} must be above 0")
        self.temperature, self.sampled_ids_N = temperature, sampled_ids_N
        self.student = Projector(head, hidden_NH)
        self.terms, self.teacher = blank_uncounted(terms, teacher)
        self.teacher_projector = None
        if needs_teacher_logits(terms, teacher, head.num_tokens):
            assert self.teacher is not None and self.teacher.head is not None and self.teacher.hidden_NH is not None
            self.teacher_projector = Projector(self.teacher.head, self.teacher.hidden_NH)
        self.counted_rows = counted_tokens(terms).nonzero().squeeze(-1)
        check_ids("sampled_ids_N", sampled_ids_N[self.counted_rows], head.num_tokens)
        if self.teacher is not None and self.teacher.topk_ids_NK is not None:
            check_ids("the teacher's topk_ids_NK", self.teacher.topk_ids_NK[self.counted_rows], head.num_tokens)


def compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What the head's matrix product runs in: autocast's dtype where that applies (not to fp64), else the input's."""
    device = hidden_NH.device.type
    if hidden_NH.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype


def check_inputs(
    hidden_NH: Tensor, head: Head, sampled_ids_N: Tensor, terms: Sequence[Term], teacher: TeacherTokens | None
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
    if teacher is not None:
        lengths |= {f"the teacher's {name}": len(array) for name, array in teacher.arrays().items()}
        if teacher.head is not None and teacher.head.num_tokens != head.num_tokens:
            raise ValueError(
                f"the teacher's head has num_tokens = {teacher.head.num_tokens}, the student's {head.num_tokens}; "
                "both must be the size of one tokenizer"
            )
    for name, length in lengths.items():
        if length != len(hidden_NH):
            raise ValueError(f"hidden_NH holds {len(hidden_NH)} tokens, but {name} holds {length}")


def needs_teacher_logits(terms: Sequence[Term], teacher: TeacherTokens | None, num_tokens: int) -> bool:
    """Whether a term can only be answered from the teacher's hidden states. Raises ValueError if those are missing."""
    for term in terms:
        needs = term.loss.needs
        if not term.asks_teacher or (teacher is not None and _lists_answer(teacher, needs, num_tokens)):
            continue
        if teacher is None or teacher.hidden_NH is None:
            listed = {
                "sampled": "sampled_logprob_N or ",
                "topk": f"topk_ids_NK and topk_logprob_NK with K >= {needs.k}, or ",
            }
            raise ValueError(
                f"term {term.name!r} needs the teacher's {listed.get(needs.teacher, '')}hidden_NH and head: {term.loss}"
            )
        return True
    return False


def _lists_answer(teacher: TeacherTokens, needs: Needs, num_tokens: int) -> bool:
    if needs.teacher == "sampled":
        return teacher.sampled_logprob_N is not None
    if needs.teacher == "topk" and teacher.topk_ids_NK is not None:
        assert needs.k is not None
        return teacher.topk_ids_NK.shape[-1] >= min(needs.k, num_tokens)
    return False


def blank_uncounted(terms: Sequence[Term], teacher: TeacherTokens | None) -> tuple[list[Term], TeacherTokens | None]:
    """Zeros in place of per-token inputs that no coefficient counts, so that an unknown (NaN) there cannot spread."""
    blanked = [
        replace(
            term,
            advantage_N=_blank(term.advantage_N, term.coef_N != 0),
            old_logprob_N=_blank(term.old_logprob_N, term.coef_N != 0),
        )
        for term in terms
    ]
    asking = [term for term in terms if term.asks_teacher]
    if teacher is None or not asking:
        return blanked, None
    asked_N = counted_tokens(asking)
    if bool(asked_N.all()):
        return blanked, teacher
    return blanked, replace(teacher, **{name: _blank(array, asked_N) for name, array in teacher.arrays().items()})


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
