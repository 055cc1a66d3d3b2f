"""Sampling and scoring with a Hugging Face model in this process: exact log-probs, no weight copies, any device.

Letters: T answer positions of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import Finished, Progress, Sampled, SamplingParams
from opdkit.engines.decode import decode
from opdkit.engines.draw import check_params
from opdkit.engines.memory import cached_tokens, enough_memory
from opdkit.engines.model import Ids, LanguageModel
from opdkit.engines.scoring import score
from opdkit.errors import Interrupted
from opdkit.types import Asked, Signal

LOGIT_BYTES = 512 << 20  # of one array of a step's logits, so that short answers of many rows do not fill the memory
ROOM = 1024  # tokens that a row is given room for when it begins, and a row that has more already: as many again


class HFEngine:
    """`Sampler` and `Scorer` (see `engines.base`) over one `LanguageModel`, with its own weights or stand-ins.

    max_tokens_per_batch  rows times padded length that are sampled together; a single longer row goes alone. None:
                          `TOKENS_PER_BATCH`, and on CUDA what memory holds (`engines.memory`). Nor are more scored
                          together; else scoring goes by the model's `passes`
    weights               tensors that replace parameters, as in `LanguageModel.using` (initial or EMA teachers)
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_tokens_per_batch: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.max_tokens_per_batch = max_tokens_per_batch
        self.weights = weights

    def sample(
        self,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Sampled]:
        """One answer per prompt, in order. Row i depends on prompts[i], seeds[i] and params only (see `decode`).

        Raises UserError for parameters out of range, a row that may outgrow the model's positions, logits that are not
        finite, and where memory runs out.
        """
        check_params(params)
        if len(seeds) != len(prompts) or not all(map(len, prompts)):
            raise ValueError("sample needs one seed per prompt, and prompts of at least one token")
        limit, switch = params.max_answer_tokens, self.model.switch_length
        self.model.check_fits([len(prompt) + limit for prompt in prompts], f"prompt and max_answer_tokens = {limit}")
        rows = [_Row(tuple(prompt), seed, limit, 0) for prompt, seed in zip(prompts, seeds, strict=True)]
        if switch is None:
            return self._sample(dict(enumerate(rows)), params, progress, finished, 0, len(rows))
        # Behind the switch every key is another one (`engines.rope`): an answer that crosses it stops there, and goes
        # on in a pass that reads anew what it has written.
        short = {index: row._replace(limit=min(limit, switch + 1 - len(row.prompt))) for index, row in enumerate(rows)}
        short = {index: row for index, row in short.items() if row.limit > 0}

        def whole(answers: Mapping[int, Sampled]) -> None:
            if finished is not None:
                finished({index: answer for index, answer in answers.items() if not _cut_short(answer, limit)})

        begun = dict(zip(short, self._sample(short, params, progress, whole, 0, len(rows)), strict=True))
        rest = {index: row.behind(begun[index]) if index in begun else row for index, row in enumerate(rows)}
        rest = {i: row for i, row in rest.items() if i not in begun or _cut_short(begun[i], limit)}

        def joined(answers: Mapping[int, Sampled]) -> None:
            for index, answer in answers.items():
                begun[index] = _joined(begun[index], answer) if index in begun else answer
            if finished is not None:
                finished({index: begun[index] for index in answers})

        self._sample(rest, params, progress, joined, len(rows) - len(rest), len(rows))
        return [begun[index] for index in range(len(rows))]

    def _sample(
        self,
        rows: Mapping[int, _Row],
        params: SamplingParams,
        progress: Progress | None,
        finished: Finished | None,
        num_done: int,
        num_rows: int,
    ) -> list[Sampled]:
        """One answer per row, in order; the rows may be read together. num_done, num_rows: of all, for `progress`.

        In rounds: every row is given room for some more tokens, as many rows as there is room for are decoded together,
        and a batch that outgrows its room, or of which few are left, stops; what is left of all goes on in the next
        round. So a batch holds what its rows have come to, not what they may come to.
        """
        results: dict[int, Sampled] = {}
        begun: dict[int, Sampled] = {}
        stops: list[Interrupted] = []

        def report(num_finished: int) -> bool:
            if progress is not None:
                try:
                    progress(num_done + len(results) + num_finished, num_rows)
                except Interrupted as stop:
                    stops.append(stop)
            return not stops

        open_rows, max_tokens = dict(rows), self.max_tokens_per_batch or cached_tokens(self.model)
        # Inference mode is a tenth faster here, and safe: only numbers leave the loop.
        with (
            torch.inference_mode(),
            self.model.using(self.weights),
            self.model.evaluating(),
            enough_memory("sampling", "lower max_tokens_per_batch (of [sampling]; --max-tokens-per-batch)"),
        ):
            while open_rows and not stops:
                # Longest first: what does not fit shows at once. Equal prompts become neighbours, to be read once.
                order = sorted(open_rows, key=lambda row: open_rows[row].order, reverse=True)
                prices = [open_rows[row].price for row in order]
                for part in _parts(prices, max_tokens, LOGIT_BYTES // (4 * self.model.num_tokens)):
                    chosen = {index: open_rows[index] for index in order[part]}
                    answers = self._decoded(chosen, params, report, max_tokens, len(chosen) < len(open_rows))
                    whole: dict[int, Sampled] = {}
                    for index, answer in answers.items():
                        row, before = chosen[index], begun.pop(index, None)
                        so_far = answer if before is None else _joined(before, answer)
                        if _cut_short(answer, row.limit):
                            begun[index], open_rows[index] = so_far, row.behind(answer)
                        else:
                            whole[index] = so_far
                            del open_rows[index]
                    results |= whole
                    if finished is not None:
                        finished(dict(sorted(whole.items())))
                    if stops:
                        raise stops[0]
        return [results[index] for index in rows]

    def _decoded(
        self,
        rows: Mapping[int, _Row],
        params: SamplingParams,
        report: Callable[[int], bool],
        max_tokens: int,
        others_wait: bool,
    ) -> dict[int, Sampled]:
        answers = decode(
            self.model,
            [row.prompt for row in rows.values()],
            [row.seed for row in rows.values()],
            params,
            report,
            limits=[row.limit for row in rows.values()],
            drawn=[row.drawn for row in rows.values()],
            max_tokens=max_tokens,
            others_wait=others_wait,
        )
        return dict(zip(rows, answers, strict=True))

    def score(
        self,
        contexts: Sequence[Ids],
        answers: Sequence[Ids],
        asked: Asked,
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Signal]:
        """What this model says of every answer token, given the context, in order: what `asked.answer` asks for.

        "sampled": log-probs of the answer tokens. "topk": also the k likeliest ids and their log-probs.
        "distribution": hidden states, and the head to read them through; it is not applied here. The states are in host
        memory: a whole batch of them would fill an accelerator, and each is wanted in one micro-batch only.
        With `asked.entropy` also each token's entropy.
        Raises UserError for a row longer than the model's positions.
        """
        most = self.max_tokens_per_batch or self.model.passes.max_tokens
        passes = replace(self.model.passes, max_tokens=min(most, self.model.passes.max_tokens))
        return score(
            self.model, contexts, answers, asked, passes, self.weights, temperature=temperature, progress=progress
        )


class _Row(NamedTuple):
    """An answer to sample: at most `limit` tokens, after `drawn` numbers of its seed's stream."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    drawn: int

    def behind(self, answer: Sampled) -> _Row:
        """What is left to sample behind the beginning of an answer."""
        num = len(answer.answer_ids)
        return _Row(self.prompt + answer.answer_ids, self.seed, self.limit - num, self.drawn + num)

    @property
    def price(self) -> int:
        """Positions that a batch keeps for it: those it has, and room for some more."""
        return len(self.prompt) + min(self.limit, max(ROOM, self.drawn))

    @property
    def order(self) -> tuple[int, int, tuple[int, ...]]:
        return self.price, len(self.prompt), self.prompt


def _cut_short(answer: Sampled, limit: int) -> bool:
    return answer.finish == "length" and len(answer.answer_ids) < limit


def _joined(beginning: Sampled, rest: Sampled) -> Sampled:
    both = {name: (getattr(beginning, name), getattr(rest, name)) for name in Sampled.__slots__ if name.endswith("_T")}
    arrays: dict[str, Any] = {
        name: None if first is None else np.concatenate([first, second]) for name, (first, second) in both.items()
    }
    return replace(rest, answer_ids=beginning.answer_ids + rest.answer_ids, **arrays)


def _parts(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[slice]:
    """Neighbouring rows of falling length whose padded size is at most `max_tokens`, in parts of about equal rows."""

    def cut(max_rows: int) -> list[slice]:
        parts, start = [], 0
        while start < len(lengths):
            end = start + max(1, min(max_rows, max_tokens // lengths[start]))
            parts.append(slice(start, end))
            start = end
        return parts

    fewest = len(cut(max_rows))
    return cut(-(-len(lengths) // fewest)) if fewest else []
