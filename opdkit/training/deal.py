"""Who reads which row of a step: by what a row costs, so that all ranks are done at about the same time.

Every rank knows all rows, what was sampled and what the views said in numbers, and computes the coefficients of all of
them. Only the passes over models are dealt; hidden states and lists of likeliest ids stay with whoever made them.

Letters: N counted tokens of a batch, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdkit.ranks.base import Ranks, dealt
from opdkit.training.state import State
from opdkit.types import Example, Group, Signal, View

ATTENTION_IS_HALF = 24_576  # tokens of a row from which on attention costs more than the matrices (6 x width, at 4096)
BACKWARD_PASSES = 3.0  # what learning from a row costs, in passes that only read it

Key = tuple[str, int]  # of a rollout


@dataclass(frozen=True, slots=True)
class Deal:
    """Of one step. In one process everything is its own."""

    ranks: Ranks
    owner: Mapping[Key, int]

    def is_own(self, key: Key) -> bool:
        return self.owner[key] == self.ranks.rank

    def own(self, rows: Sequence[Example]) -> list[Example]:
        return [row for row in rows if self.is_own(row.rollout.key)]

    def signals_of_all(self, keys: Sequence[Key], signals: Sequence[dict[str, Signal]]) -> list[dict[str, Signal]]:
        """What every row's views said: of other ranks' rows the numbers of each token alone."""
        if self.ranks.size == 1:
            return list(signals)
        own = {key: said for key, said in zip(keys, signals, strict=True) if self.is_own(key)}
        numbers = {key: {name: _numbers(signal) for name, signal in said.items()} for key, said in own.items()}
        told = {key: said for part in self.ranks.gather(numbers) for key, said in part.items()}
        return [own.get(key, told[key]) for key in keys]

    def tokens_of_all(self, rows: Sequence[Example], row_N: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[N] by name, each rank's numbers of its own rows' tokens put together."""
        if self.ranks.size == 1:
            return dict(tokens)
        owner_R = torch.tensor([self.owner[row.rollout.key] for row in rows], dtype=torch.long, device=row_N.device)
        owner_N, merged = owner_R[row_N], dict[str, Tensor]()
        own_N = owner_N == self.ranks.rank
        told = self.ranks.gather({name: value_N[own_N].cpu().numpy() for name, value_N in tokens.items()})
        for rank, values in enumerate(told):
            for name, value_n in values.items():
                known_n = torch.from_numpy(value_n).to(row_N.device)
                whole_N = merged.setdefault(name, known_n.new_full((len(row_N),), torch.nan))
                whole_N[owner_N == rank] = known_n
        return merged

    def with_lists(self, rows: Sequence[Example]) -> list[Example]:
        """The rows as the first rank saves them: with the lists of likeliest ids that others have of their own rows."""
        has_lists = any(signal.topk_ids_TK is not None for row in rows for signal in row.signals.values())
        if not self.ranks.any(has_lists) or self.ranks.size == 1:
            return list(rows)
        own = {row.rollout.key: row.signals for row in self.own(rows)}
        told = {key: signals for part in self.ranks.gather_on_first(own) for key, signals in part.items()}
        return [replace(row, signals=told.get(row.rollout.key, row.signals)) for row in rows]


def deal_rows(state: State, parts: Sequence[Sequence[Group]], views: Sequence[Mapping[str, View]]) -> Deal:
    """parts: the step's groups by update, each of which is dealt for itself. views: of all rows in order."""
    owner: dict[Key, int] = {}
    for groups in parts:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        costs = [
            BACKWARD_PASSES * _cost(len(rollout.prompt_ids) + len(rollout.answer_ids))
            + sum(_cost(len(view.context_ids) + len(rollout.answer_ids)) for view in views[len(owner) + place].values())
            for place, rollout in enumerate(rollouts)
        ]
        ranks = dealt(costs, state.ranks.size)
        owner |= {rollout.key: rank for rollout, rank in zip(rollouts, ranks, strict=True)}
    return Deal(state.ranks, owner)


def _cost(num_tokens: int) -> float:
    return num_tokens + num_tokens**2 / ATTENTION_IS_HALF


def _numbers(signal: Signal) -> Signal:
    return replace(signal, hidden_TH=None, head=None, topk_ids_TK=None, topk_logprob_TK=None)
