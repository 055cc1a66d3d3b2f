"""What the loss made of every answer, token by token, put into the rows that are saved.

Letters: N counted tokens of the batch, T tokens of one answer, S terms of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from opdkit.losses.spec import PolicyGradient
from opdkit.losses.surrogate import policy_gradient
from opdkit.losses.terms import Term
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.training.batch import Batch
from opdkit.types import Example, FloatArray, Signal, Taught


def with_taught(
    rows: Sequence[Example], batch: Batch, terms: Sequence[Term], tokens: Mapping[str, Tensor], inputs: PlanInputs
) -> list[Example]:
    """The rows, each with what it was taught; None for rows that no term can count a token of, or if the loss read
    nothing at all.

    tokens: [N] by name, as the pass that learned has seen them (`backward.Learned.tokens`); NaN where not computed.
    """
    if not any(term.name in tokens for term in terms):
        return list(rows)
    tokens = {**{term.name: batch.new_per_token() for term in terms}, **tokens}
    countable = set(inputs.row_N[inputs.countable_N].tolist())
    clipped_N = torch.zeros_like(tokens["logprob"], dtype=torch.bool)
    for term in terms:
        clipped_N |= _clipped(term, tokens)
    per_token = [*(term.coef_N for term in terms), *(tokens[term.name] for term in terms)]
    columns = [batch.per_row(x_N) for x_N in (*per_token, clipped_N, tokens["logprob"], tokens["entropy"])]
    taught: dict[tuple[str, int], Taught] = {}
    for number, of_row in enumerate(zip(*columns, strict=True)):
        if number not in countable:
            continue
        *arrays, clipped_T, logprob_T, entropy_T = (array_T for _, array_T in of_row)
        coef_ST, loss_ST = np.stack(arrays[: len(terms)]), np.stack(arrays[len(terms) :])
        taught[of_row[0][0].rollout.key] = Taught(
            terms=tuple(term.name for term in terms),
            coef_ST=np.where(np.isnan(coef_ST), np.float32(0), coef_ST),  # tokens the model did not write
            loss_ST=np.where(coef_ST == 0, np.float32(np.nan), loss_ST),
            clipped_T=clipped_T == 1,
            student_logprob_T=logprob_T,
            student_entropy_T=entropy_T,
        )
    return [replace(row, taught=taught.get(row.rollout.key)) for row in rows]


def without_hidden_states(rows: Sequence[Example], batch: Batch, tokens: Mapping[str, Tensor]) -> list[Example]:
    """The rows as they are kept: a view's hidden states give way to its log-probs of the sampled tokens, which the loss
    has just read from them (NaN for tokens it did not compute)."""
    said: dict[str, dict[tuple[str, int], FloatArray]] = {}
    for view in {view for row in rows for view in row.signals}:
        if (known_N := tokens.get(f"{view}_logprob")) is not None:
            said[view] = {e.rollout.key: logprob_T for e, logprob_T in batch.per_row(known_N)}

    def kept(row: Example, view: str, signal: Signal) -> Signal:
        if signal.hidden_TH is None and signal.sampled_logprob_T is not None:
            return signal
        return replace(signal, hidden_TH=None, head=None, sampled_logprob_T=said.get(view, {}).get(row.rollout.key))

    return [replace(row, signals={view: kept(row, view, s) for view, s in row.signals.items()}) for row in rows]


def _clipped(term: Term, tokens: Mapping[str, Tensor]) -> Tensor:
    """[N] bool: the term counts the token, and its clip changed the token's loss."""
    unclipped_N = tokens.get(f"{term.name}/unclipped")
    if unclipped_N is None and isinstance(term.loss, PolicyGradient) and term.old_logprob_N is not None:
        assert term.advantage_N is not None
        unclipped_N, _ = policy_gradient(PolicyGradient(), tokens["logprob"], term.advantage_N, term.old_logprob_N)
    if unclipped_N is None:
        return torch.zeros_like(term.coef_N, dtype=torch.bool)
    return (term.coef_N != 0) & (tokens[term.name] != unclipped_N)
