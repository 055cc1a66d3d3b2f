"""Which rows are sampled together: as many as their cache has room for, others as soon as these end.

Own loop, because `generate` does not give what is needed: log-probs under the distribution that was sampled, and rows
that do not depend on their batch. It is also faster where it matters: siblings share the pass over their prompt, the
cache grows in place, and the places of answers that have ended are filled from the queue.

A batch costs rows times columns (the tokens of its longest row). It may not outgrow `max_tokens`: then the longest rows
leave it and wait, and are read again later; so they do where they keep many others waiting. What a row gets depends on
its own text, seed and parameters. Nothing is decided by a clock or by free memory: the same rows make the same batches.
The last bits of a matrix product still depend on the shape of the batch, so a number that falls within about 1e-7 of a
boundary between two tokens can go either way.

Letters: B rows in the batch, S tokens of each until ends are looked for, V vocabulary.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.causal import CausalModel
from opdkit.engines.sampling.cache import KEYS, cache_name, new_cache, takes_rows
from opdkit.engines.sampling.decode import Batch
from opdkit.engines.sampling.draw import Uniforms, cuts, draw, uncut_logprob
from opdkit.engines.tokens.stop_strings import StopStrings
from opdkit.errors import UserError
from opdkit.losses.logprobs import math_dtype, product_dtype
from opdkit.types import Finish

LOGIT_BYTES = 512 << 20  # of one array of a step's logits, so that short answers of many rows do not fill the memory
ROOM = 256  # tokens that a row has room for when it joins; one that waits with an answer begun: half of that again
ENDED_SHARE = 1 / 8  # rows that have ended leave once they are more than this share of the batch: leaving copies it
GROW_SHARE = 1 / 8  # by so much may a batch grow that some rows were taken from
MANY = 2  # the longest rows give way to so many times as many others
SAME_LENGTH = 1.25  # texts of which the longest is at most so many times the shortest are read in one pass
STEPS_AT_ONCE = {"cuda": 16}  # tokens between two looks at who has ended: to look is to wait for the device


class Job(NamedTuple):
    """An answer to sample, of at most `limit` tokens."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    drawn: int = 0  # numbers of the seed's stream that were used before; so many of the prompt's last ids are drawn


@dataclass(slots=True)
class Counts:
    """What sampling did. Positions are summed over all tokens that were decoded together."""

    steps: int = 0
    row_steps: int = 0  # tokens that were drawn, also those behind an end
    positions: int = 0  # of the rows that had not ended
    room: int = 0  # rows times columns
    evictions: int = 0  # answers that were set aside and went on later

    def __iadd__(self, other: Counts) -> Counts:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


@dataclass(slots=True, eq=False)
class _Row:
    index: int
    job: Job
    ids: list[int] = field(default_factory=list)  # of the answer so far
    logprobs: list[np.ndarray] = field(default_factory=list)
    uncut: list[np.ndarray] = field(default_factory=list)
    finish: Finish | None = None  # None: it goes on

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.job.prompt, *self.ids)

    @property
    def length(self) -> int:
        return len(self.job.prompt) + len(self.ids)

    @property
    def left(self) -> int:
        return self.job.limit - len(self.ids)

    def room(self, *, waits: bool) -> int:
        """Columns that it needs before long."""
        return self.length + min(self.left, max(ROOM, len(self.ids) // 2 if waits else 0))

    def add(
        self,
        ids: np.ndarray,
        logprobs: np.ndarray,
        uncut: np.ndarray | None,
        is_stop_V: np.ndarray,
        strings: StopStrings | None,
    ) -> None:
        """Tokens that were drawn, [S]: those up to the first that stops."""
        stops = is_stop_V[ids]
        end = int(stops.argmax()) + 1 if stops.any() else len(ids)
        text_end = None if strings is None else self._text_end(ids[:end].tolist(), strings)
        if stops.any() or text_end is not None:
            self.finish, end = "stop", end if text_end is None else text_end
        else:
            self.finish = "length" if end == self.left else None
        self.ids += ids[:end].tolist()
        self.logprobs.append(logprobs[:end])
        if uncut is not None:
            self.uncut.append(uncut[:end])

    def _text_end(self, ids: list[int], strings: StopStrings) -> int | None:
        """How many of these there are once a string is complete; it may have begun before them."""
        before = [*self.job.prompt[len(self.job.prompt) - self.job.drawn :], *self.ids][-strings.reach :]
        end = strings.end([*before, *ids], len(before))
        return None if end is None else end - len(before)

    def sampled(self) -> Sampled:
        assert self.finish is not None
        return Sampled(
            answer_ids=tuple(self.ids),
            logprobs_T=np.concatenate(self.logprobs),
            finish=self.finish,
            uncut_logprobs_T=np.concatenate(self.uncut) if self.uncut else None,
        )


def _order(row: _Row) -> tuple[int, int, tuple[int, ...], int]:
    """Of the queue: short ones first, as more of them fit; equal prompts are neighbours, to be read once."""
    return row.room(waits=True), row.length, row.job.prompt, row.index


class Slots:
    """Answers to jobs. Run it without gradients and inside `model.evaluating`."""

    def __init__(self, model: CausalModel, jobs: Sequence[Job], params: SamplingParams, *, max_tokens: int) -> None:
        """max_tokens: rows times columns of a batch. A single longer row goes alone."""
        self._model, self._params, self._max_tokens = model, params, max_tokens
        self._max_rows = max(1, LOGIT_BYTES // (4 * model.num_tokens))
        self._waiting = sorted((_Row(index, job) for index, job in enumerate(jobs)), key=_order)
        self._takes_rows = cache_name(model) == KEYS and takes_rows(new_cache(model, 1))
        self._rows: list[_Row] = []  # of the batch, in its order; some may have ended
        self._batch: Batch | None = None
        self._head = model.head().trimmed(product_dtype(model.dtype, model.device))
        # Fresh memory would cost page faults every step.
        self._memory = torch.empty(0, self._head.num_rows, dtype=math_dtype(model.dtype), device=model.device)
        self._is_stop_V = np.zeros(model.num_tokens, dtype=np.bool_)
        self._is_stop_V[[token for token in model.stop_ids if token < model.num_tokens]] = True
        self._strings = StopStrings(model.tokenizer, params.stop) if params.stop else None
        self._uniforms = Uniforms([], model.device)
        self._token_B = torch.zeros(0, dtype=torch.long, device=model.device)  # the last of each row, not yet read
        self.counts = Counts()
        self.num_ended = 0

    def run(self) -> Iterator[dict[int, Sampled]]:
        """Yields whenever ends were looked for (`num_ended`: answers that are whole): those answers, by the place of
        their job, that leave the batch now; often none. Raises UserError for logits that are not finite."""
        while self._waiting or self._rows:
            left = [row for row in self._rows if row.finish is None]
            ended = [row for row in self._rows if row.finish is not None]
            if not left or len(ended) > ENDED_SHARE * len(self._rows) or self._is_too_large(len(self._rows)):
                whole = self.ended()
                self._change(left)
                yield whole
            if self._rows:
                self._decode()
                yield {}

    def ended(self) -> dict[int, Sampled]:
        """The answers that are whole and are still in the batch."""
        return {row.index: row.sampled() for row in self._rows if row.finish is not None}

    def _is_too_large(self, num_rows: int) -> bool:
        assert self._batch is not None
        return num_rows > 1 and num_rows * (self._batch.width + 1) > self._max_tokens

    # Who is in the batch

    def _change(self, left: list[_Row]) -> None:
        """The batch becomes these of its rows, less those that must go, and others from the queue."""
        stay, joining = self._chosen(left)
        self._waiting = self._waiting[len(joining) :]
        for row in left:
            if row not in stay:
                self.counts.evictions += 1
                insort(self._waiting, row, key=_order)
        kept = [place for place, row in enumerate(self._rows) if row in stay]
        self._rows = [*(self._rows[place] for place in kept), *joining]
        self._batch = self._batch_of(kept, joining)
        device = self._model.device
        last = torch.tensor([row.text[-1] for row in joining], dtype=torch.long, device=device)
        self._token_B = torch.cat([self._token_B[torch.tensor(kept, dtype=torch.long, device=device)], last])
        self._uniforms.change(kept, [(row.job.seed, row.job.drawn + len(row.ids)) for row in joining])
        if len(self._memory) < len(self._rows):
            self._memory = self._memory.new_empty(len(self._rows), self._head.num_rows)

    def _batch_of(self, kept: Sequence[int], joining: Sequence[_Row]) -> Batch | None:
        """Of rows at these places of the batch, and of rows that join; None of nobody."""
        most = max((row.length + row.left for row in self._rows), default=0)
        parts: list[tuple[Batch, Sequence[int]]] = []
        for together in _of_one_length(joining) if self._takes_rows else [joining] if joining else []:
            last_positions = [len(row.job.prompt) + row.job.limit - 2 for row in together]
            batch = Batch.of(self._model, [row.text for row in together], most, last_positions)
            parts.append((batch, range(len(together))))
        if kept:
            assert self._batch is not None
            parts.insert(0, (self._batch, kept))
        if not parts:
            return None
        (first, rows), *others = parts
        return first if not others and not kept else first.joined(rows, others, most)

    def _chosen(self, left: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """(which of the batch's rows stay, which of the queue join)."""
        by_length = sorted(left, key=lambda row: (row.length, row.index))
        most = len(by_length)
        if most > 1 and most * self._width(by_length) > self._max_tokens:
            while most > 1 and most * self._width(by_length[:most]) * (1 + GROW_SHARE) > self._max_tokens:
                most -= 1
        stay, joining = by_length[:most], self._joining(by_length[:most])
        num, fewer = len(stay) + len(joining), 1
        while fewer < 2 * most and MANY * num <= len(self._waiting) + most:
            others = self._joining(by_length[: max(0, most - fewer)])
            if max(0, most - fewer) + len(others) >= MANY * num:
                return by_length[: max(0, most - fewer)], others
            fewer *= 2
        return stay, joining

    def _width(self, rows: Sequence[_Row]) -> int:
        """Columns of a batch of some of its rows, with their next token. Only some architectures give up columns."""
        assert self._batch is not None
        return max(row.length for row in rows) if self._takes_rows else self._batch.width + 1

    def _joining(self, stay: Sequence[_Row]) -> list[_Row]:
        """The first of the queue that there is room for; one at least where nobody stays."""
        if stay and not self._takes_rows:
            return []
        width, num = max((row.room(waits=False) for row in stay), default=0), len(stay)
        joining: list[_Row] = []
        for row in self._waiting:
            width = max(width, row.room(waits=True))
            num += 1
            if num > 1 and (num * width > self._max_tokens or num > self._max_rows):
                break
            joining.append(row)
        return joining

    # Tokens

    def _decode(self) -> None:
        """Some tokens for every row, then a look at who has ended."""
        assert self._batch is not None
        rows, batch, params = self._rows, self._batch, self._params
        steps = min(STEPS_AT_ONCE.get(self._model.device.type, 1), *(row.left for row in rows if row.finish is None))
        if len(rows) > 1:
            steps = max(1, min(steps, self._max_tokens // len(rows) - batch.width))
        drawn: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            hidden_BH = batch.advance(self._token_B)
            output_BV = self._head.project(hidden_BH, out=self._memory[: len(rows)])
            scores_BV = self._head.logits(output_BV, params.temperature or 1.0)
            self._token_B, logprob_B = draw(scores_BV, self._uniforms.next(), params)
            whole = (uncut_logprob(scores_BV, self._token_B),) if cuts(params, self._model.num_tokens) else ()
            drawn.append((self._token_B, logprob_B, *whole))
        self._count(steps)
        arrays = [torch.stack(column, 1).cpu().numpy() for column in zip(*drawn, strict=True)]
        ids_BS, logprob_BS, uncut_BS = arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None
        for place, row in enumerate(rows):
            if row.finish is not None:
                continue
            before = len(row.ids)
            uncut_S = None if uncut_BS is None else uncut_BS[place]
            row.add(ids_BS[place], logprob_BS[place], uncut_S, self._is_stop_V, self._strings)
            if np.isnan(row.logprobs[-1]).any():
                raise self._not_finite(logprob_BS, before + int(np.isnan(row.logprobs[-1]).argmax()))
            self.num_ended += row.finish is not None

    def _count(self, steps: int) -> None:
        assert self._batch is not None
        counts, num, width = self.counts, len(self._rows), self._batch.width
        counts.steps += steps
        counts.row_steps += num * steps
        counts.room += num * width * steps
        counts.positions += steps * sum(
            length for length, row in zip(self._batch.lengths, self._rows, strict=True) if row.finish is None
        )

    def _not_finite(self, logprob_BS: np.ndarray, place: int) -> UserError:
        num = int(np.isnan(logprob_BS).any(1).sum())
        return UserError(
            f"{self._model.name} in {str(self._model.dtype).removeprefix('torch.')} gives logits that are no finite "
            f"numbers ({num} of the answers that are sampled, at token {place + 1}), so there is nothing to draw from: "
            "its weights are damaged or have diverged; go on from an earlier checkpoint with a lower learning rate, or "
            "take another copy."
        )


def _of_one_length(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """The rows in order, cut where texts become so much longer that a pass would read much padding."""
    part: list[_Row] = []
    for row in rows:
        lengths = [other.length for other in part] + [row.length]
        if part and max(lengths) > 16 + SAME_LENGTH * min(lengths):
            yield part
            part = []
        part.append(row)
    if part:
        yield part
