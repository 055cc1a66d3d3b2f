"""Gradients of a whole batch, a micro-batch at a time, and what was seen on the way.

Letters: N counted tokens of the batch, n those of a micro-batch, H hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from opdkit import losses
from opdkit.losses.terms import counted_tokens
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.ranks.base import Ranks
from opdkit.training.batch import Batch, Part
from opdkit.training.state import State
from opdkit.types import Example

# Called with the rows of a micro-batch and the student's hidden states behind their counted tokens, [n, H].
Saw = Callable[[Sequence[Example], Tensor], None]


@dataclass(slots=True)
class Learned:
    """What the passes over a batch saw. `tokens`: per name one number per counted token, NaN where not computed; a name
    is missing if it was computed for none."""

    loss: float = 0.0
    tokens: dict[str, Tensor] = field(default_factory=dict)
    num_empty_support: Counter[str] = field(default_factory=Counter)

    def add(self, out: losses.HeadOutput, tokens_n: Tensor, num_tokens: int) -> None:
        self.loss += float(out.loss.detach())
        self.num_empty_support.update(out.num_empty_support)
        seen = {**out.token_loss, "entropy": out.entropy_N, "logprob": out.sampled_logprob_N}
        seen |= {f"{name}/unclipped": value_n for name, value_n in out.unclipped_loss.items()}
        seen |= {f"{view}_logprob": said_n for view, said_n in out.view_sampled_logprob.items()}
        for name, seen_n in seen.items():
            self.tokens.setdefault(name, seen_n.new_full((num_tokens,), torch.nan))[tokens_n] = seen_n

    def of_all_ranks(self, ranks: Ranks, batch: Batch) -> Learned:
        told = ranks.gather((self.loss, self.num_empty_support))
        loss, empty = sum(loss for loss, _ in told), sum((counts for _, counts in told), Counter[str]())
        return Learned(loss, batch.of_all_ranks(self.tokens), empty)

    def fill(self, inputs: PlanInputs) -> None:
        """Tokens that the loss left out, with what was known of them before the update."""
        known = {
            "entropy": inputs.student_entropy_N,
            "logprob": inputs.student_logprob_N,
            **{f"{view}_logprob": said_N for view, said_N in inputs.view_logprob.items()},
        }
        for name, known_N in known.items():
            if known_N is not None:
                seen_N = self.tokens.get(name, known_N)
                self.tokens[name] = torch.where(seen_N.isnan(), known_N.to(seen_N.dtype), seen_N)


def backward(
    state: State, batch: Batch, terms: Sequence[losses.Term], saw: Saw = lambda rows, hidden_nH: None
) -> Learned:
    """Gradients of the whole batch. Where nothing is to be learned (no token counted, or every gradient exactly 0, as
    of equal rewards) there are none at all, not zeros, so that the optimizer does not move on memory alone. `saw` hears
    what the student read on the way."""
    learned = Learned()
    state.optimizer.make_ready()
    parts = [*parts_of_terms(state, batch, terms)]
    for part, of_part in state.student.in_step(parts, state.optimizer.compute_weights):
        out = read(state, batch, part, of_part, state.optimizer.compute_weights(), saw)
        out.loss.backward()
        learned.add(out, part.tokens_n, batch.num_tokens)
    state.optimizer.collect()
    return learned.of_all_ranks(state.ranks, batch)


def parts_of_terms(
    state: State, batch: Batch, terms: Sequence[losses.Term]
) -> Iterator[tuple[Part, list[losses.Term]]]:
    """Micro-batches of the rows that some term counts a token of, each with what its terms say of its own tokens; terms
    that count none of them are left out."""
    if not terms:
        return
    planned = partial(state.student.planned, passes=state.passes)
    for part in batch.parts(planned, counted_tokens(terms)):
        taken = [term.take(part.tokens_n) for term in terms]
        yield part, [term for term in taken if (term.coef_N != 0).any()]


def read(
    state: State,
    batch: Batch,
    part: Part,
    terms: Sequence[losses.Term],
    weights: Mapping[str, Tensor] | None,
    saw: Saw = lambda rows, hidden_nH: None,
) -> losses.HeadOutput:
    """What the loss makes of a micro-batch, with the student's `weights` (None: the module's own)."""
    hidden_nH = hidden_of(state, part, weights)
    saw(part.rows, hidden_nH)
    return losses.head_loss(
        hidden_nH,
        state.student.head(weights),
        batch.ids_N[part.tokens_n],
        terms,
        batch.view_tokens(part, sorted({view for term in terms for view in term.asks})),
        temperature=state.method.loss_temperature,
    )


def hidden_of(state: State, part: Part, weights: Mapping[str, Tensor] | None) -> Tensor:
    """[n, H] the student's hidden states behind the counted tokens of a micro-batch."""
    prompts, answers = [r.rollout.prompt_ids for r in part.rows], [r.rollout.answer_ids for r in part.rows]
    hidden = state.student.hidden(prompts, answers, weights=weights, passes=state.passes)
    return hidden if part.counted_n is None else hidden[part.counted_n]
