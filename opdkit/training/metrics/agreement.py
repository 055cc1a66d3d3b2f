"""Saved or fresh answers read by two models side by side: the numbers of `measure/overlap.py` for each of their tokens.

Both sides give hidden states at the answers' positions, their heads are applied together, a bounded chunk at a time,
and of every token only the columns of a `TokenTable` are kept. So it works for every method and every teacher.

Letters: N counted answer tokens of some rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opdkit.losses import Head, compare_heads
from opdkit.measure.overlap import Compared, Ints, TokenTable, token_table
from opdkit.types import Asked, Example, Signal, Spans

TOKENS_PER_PART = 16384  # whose hidden states are in host memory at one time, on both sides
_DISTRIBUTION = Asked("distribution")

Progress = Callable[[int, int], None]  # (rows done, rows)


def heard_tokens(rows: Sequence[Example], spans: Sequence[Spans | None]) -> list[Example]:
    """The rows, of which only those tokens are counted that a teacher with another tokenizer says something of."""
    return [
        row
        if own is None
        else replace(row, rollout=replace(row.rollout, answer_mask=row.rollout.answer_mask & own.said_T))
        for row, own in zip(rows, spans, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models: hidden states [T, H] of the answers of rows, each behind what this side reads."""

    hidden: Callable[[Sequence[Example]], list[Tensor]]
    head: Head


def student_side(score: Callable[..., list[Signal]], head: Head) -> Side:
    """Reads `prompt_ids`. `score` is a `Scorer`'s."""

    def hidden(rows: Sequence[Example]) -> list[Tensor]:
        contexts, answers = [r.rollout.prompt_ids for r in rows], [r.rollout.answer_ids for r in rows]
        return hidden_states(score(contexts, answers, _DISTRIBUTION, temperature=1.0))

    return Side(hidden=hidden, head=head)


def teacher_side(score: Callable[..., list[Signal]], head: Head) -> Side:
    """Reads the row's view, which must be there."""

    def hidden(rows: Sequence[Example]) -> list[Tensor]:
        contexts = []
        for row in rows:
            assert row.view is not None, f"rollout {row.rollout.key} has no view"
            contexts.append(row.view.context_ids)
        return hidden_states(score(contexts, [r.rollout.answer_ids for r in rows], _DISTRIBUTION, temperature=1.0))

    return Side(hidden=hidden, head=head)


def compare_rows(
    rows: Sequence[Example],
    student: Side,
    teacher: Side,
    *,
    k: int,
    temperature: float,
    device: torch.device,
    masses_at: Sequence[int] = (),
    progress: Progress | None = None,
) -> TokenTable:
    """The table of every counted token of `rows`; `row_N` counts them as given. At least one token must be counted.

    k, masses_at: see `token_table`.
    """
    longest = max(k, *masses_at, 1)
    parts = compare_parts(rows, student, teacher, k=longest, temperature=temperature, device=device, progress=progress)
    return TokenTable.joined([part.table(k, masses_at) for part in parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPart:
    """What both said of the counted tokens of some rows, and where those stand, as in a `TokenTable`."""

    compared: Compared
    row_N: Ints
    index_N: Ints
    length_N: Ints

    def table(self, k: int | None = None, masses_at: Sequence[int] = ()) -> TokenTable:
        """See `token_table`."""
        return token_table(
            self.compared,
            row_N=self.row_N,
            index_N=self.index_N,
            length_N=self.length_N,
            k=k,
            masses_at=masses_at,
        )


def compare_parts(
    rows: Sequence[Example],
    student: Side,
    teacher: Side,
    *,
    k: int,
    temperature: float,
    device: torch.device,
    progress: Progress | None = None,
) -> Iterator[ComparedPart]:
    """The lists themselves, of about `TOKENS_PER_PART` tokens at a time."""
    done = 0
    for part in parts_of(rows):
        some = rows[part]
        counted = [np.flatnonzero(row.rollout.answer_mask) for row in some]
        sampled = [np.asarray(row.rollout.answer_ids)[c] for row, c in zip(some, counted, strict=True)]
        hidden = [
            torch.cat([h_TH[torch.from_numpy(c)] for h_TH, c in zip(side.hidden(some), counted, strict=True)])
            for side in (student, teacher)
        ]
        said = compare_heads(
            hidden[0].to(device),
            student.head,
            hidden[1].to(device),
            teacher.head,
            torch.from_numpy(np.concatenate(sampled)).to(device),
            k=k,
            temperature=temperature,
        )
        sizes = [len(c) for c in counted]
        yield ComparedPart(
            compared=Compared(**{name: _numpy(getattr(said, name)) for name in said.__slots__}),
            row_N=np.repeat(np.arange(part.start, part.stop), sizes),
            index_N=np.concatenate(counted),
            length_N=np.repeat([len(row.rollout.answer_ids) for row in some], sizes),
        )
        done += len(some)
        if progress:
            progress(done, len(rows))


def parts_of(rows: Sequence[Example]) -> Iterator[slice]:
    """Runs of rows of about `TOKENS_PER_PART` tokens."""
    start, size = 0, 0
    for index, row in enumerate(rows):
        length = len(row.rollout.answer_ids)
        if size and size + length > TOKENS_PER_PART:
            yield slice(start, index)
            start, size = index, 0
        size += length
    if size:
        yield slice(start, len(rows))


def hidden_states(signals: Sequence[Signal]) -> list[Tensor]:
    """[T, H] of each signal, which must be one of a distribution."""
    states = []
    for signal in signals:
        assert signal.hidden_TH is not None
        states.append(signal.hidden_TH)
    return states


def _numpy(array: Tensor) -> np.ndarray:
    return array.cpu().numpy() if array.dtype == torch.long else array.double().cpu().numpy()
