"""A term of the loss: what scores a token (`loss`) and how much each token counts (`coef_N`).

    loss = sum over terms, sum over tokens:  coef_N * token_loss_N

`coef_N` is fixed for the whole batch, all micro-batches and all ranks, before the first backward; `coefficients.py`
makes it. Letters: N tokens, flat, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdkit.losses import surrogate
from opdkit.losses.divergence import divergence
from opdkit.losses.spec import (
    Divergence,
    EntryAdvantage,
    KLEstimate,
    LossSpec,
    NegativeLogLikelihood,
    PolicyGradient,
    Target,
)
from opdkit.losses.support import Entries
from opdkit.types import Asked

TEACHER = Target()


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One component of the loss over N tokens.

    name            appears in metrics and in `HeadOutput.token_loss`; unique among the terms of a batch
    coef_N          float; a token whose coefficient is exactly 0 in every term costs nothing: it forms no logits
    advantage_N     float, for losses with an advantage from outside (`PolicyGradient`)
    old_logprob_N   nats, log p of the sampled token before the update, for losses with an importance ratio
    target          the combination of views that the student is compared with, for losses that ask any

    Raises ValueError if the arrays differ in length, or an array is missing or without use for this loss.
    """

    name: str
    loss: LossSpec
    coef_N: Tensor
    advantage_N: Tensor | None = None
    old_logprob_N: Tensor | None = None
    target: Target = TEACHER

    def __post_init__(self) -> None:
        kind = type(self.loss).__name__
        for field, array in (("advantage_N", self.advantage_N), ("old_logprob_N", self.old_logprob_N)):
            if array is not None and array.shape != self.coef_N.shape:
                raise ValueError(
                    f"term {self.name!r}: {field} is {tuple(array.shape)}, coef_N {tuple(self.coef_N.shape)}"
                )
        if self.loss.uses_advantage != (self.advantage_N is not None):
            verb = "needs" if self.loss.uses_advantage else "has no use for"
            raise ValueError(f"term {self.name!r}: {kind} {verb} advantage_N")
        if self.old_logprob_N is not None and not self.loss.takes_old_logprob:
            raise ValueError(f"term {self.name!r}: {kind} has no use for old_logprob_N")
        if self.old_logprob_N is None and isinstance(self.loss, PolicyGradient) and self.loss.clips:
            raise ValueError(f"term {self.name!r}: a clipped ratio needs old_logprob_N")

    @property
    def asks(self) -> dict[str, Asked]:
        """What each view must have said of the tokens that this term counts."""
        return self.target.asks(self.loss)

    def take(self, index: Tensor | slice) -> Term:
        """The term of some of the tokens: a micro-batch (LongTensor of positions, bool mask or slice over N)."""

        def pick(array: Tensor | None) -> Tensor | None:
            return None if array is None else array[index]

        return replace(
            self, coef_N=self.coef_N[index], advantage_N=pick(self.advantage_N), old_logprob_N=pick(self.old_logprob_N)
        )


def counted_tokens(terms: Sequence[Term]) -> Tensor:
    """[N] bool: tokens with a coefficient other than exactly 0 in at least one term."""
    return torch.stack([term.coef_N != 0 for term in terms]).any(0)


def token_loss(term: Term, entries: Entries) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
    """([N] the term's loss per token, closure giving [N, E] its gradient with respect to `entries.student_nE`, [N] the
    loss before a clip or None).

    The value is differentiable by autograd; the closure is the same gradient in closed form, called at most once.
    """
    loss = term.loss
    if isinstance(loss, Divergence):
        return divergence(loss, entries)
    if isinstance(loss, EntryAdvantage):
        return *surrogate.entry_advantage(loss, entries), None
    student_n = entries.student_nE.squeeze(-1)
    if isinstance(loss, NegativeLogLikelihood):
        value_n, gradient = surrogate.negative_log_likelihood(student_n)
    elif isinstance(loss, PolicyGradient):
        assert term.advantage_N is not None
        value_n, gradient = surrogate.policy_gradient(loss, student_n, term.advantage_N, term.old_logprob_N)
    elif isinstance(loss, KLEstimate):
        assert entries.teacher_nE is not None
        value_n, gradient = surrogate.kl_estimate(student_n, entries.teacher_nE.squeeze(-1))
    else:
        assert entries.teacher_nE is not None
        value_n, gradient = surrogate.teacher_advantage(student_n, entries.teacher_nE.squeeze(-1), loss.form)
    return value_n, lambda: gradient().unsqueeze(-1), None
