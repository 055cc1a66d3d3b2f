"""Hidden states that were kept or sent, and what they say when somebody asks.

Letters: T answer positions of one row, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from opdkit.engines.forward.scoring import signals_of
from opdkit.engines.model import Ids
from opdkit.types import Asked, Signal

TOKENS_PER_PART = 16384  # that go through a head together


def answered(signals: Sequence[Signal], answers: Sequence[Ids], asked: Asked, temperature: float) -> list[Signal]:
    """What signals of hidden states say of the answers, exactly as an engine says it that is asked so."""
    if asked.answer == "distribution" and not asked.entropy:
        return list(signals)
    said: dict[int, Signal] = {}
    with torch.no_grad():
        for rows in _parts(signals, answers):
            states = []
            for row in rows:
                states_TH = signals[row].hidden_TH
                assert states_TH is not None
                states.append(states_TH)
            own = [answers[row] for row in rows]
            found = signals_of(torch.cat(states), signals[rows[0]].head, own, asked, temperature)
            said.update(zip(rows, found, strict=True))
    return [said[row] for row in range(len(signals))]


def _parts(signals: Sequence[Signal], answers: Sequence[Ids]) -> Iterator[list[int]]:
    """Rows of one head each, of about `TOKENS_PER_PART` tokens."""
    for head in dict.fromkeys(id(signal.head) for signal in signals):
        part: list[int] = []
        for row in (row for row, signal in enumerate(signals) if id(signal.head) == head):
            part.append(row)
            if sum(len(answers[one]) for one in part) >= TOKENS_PER_PART:
                yield part
                part = []
        if part:
            yield part
