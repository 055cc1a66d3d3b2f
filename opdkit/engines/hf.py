"""Sampling and scoring with a Hugging Face model in this process: exact log-probs, no weight copies, any device.

Letters: N answer tokens of a batch, T answer positions of one row, K likeliest ids, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import Progress, Sampled, SamplingParams
from opdkit.engines.decode import decode
from opdkit.engines.draw import check_params
from opdkit.engines.model import Ids, LanguageModel
from opdkit.losses import Head, head_stats
from opdkit.types import Asked, Signal

LOGIT_BYTES = 512 << 20  # of one array of a step's logits, so that short answers of many rows do not fill the memory


class HFEngine:
    """`Sampler` and `Scorer` (see `engines.base`) over one `LanguageModel`, with its own weights or stand-ins.

    max_tokens_per_batch  rows times padded length that go through the model together; a single longer row goes alone
    weights               tensors that replace parameters, as in `LanguageModel.using` (initial or EMA teachers)
    """

    def __init__(
        self, model: LanguageModel, *, max_tokens_per_batch: int = 32768, weights: Mapping[str, Tensor] | None = None
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
    ) -> list[Sampled]:
        """One answer per prompt, in order. Row i depends on prompts[i], seeds[i] and params only (see `decode`).

        Raises UserError for parameters out of range or a row that may outgrow the model's positions.
        """
        check_params(params)
        if len(seeds) != len(prompts) or not all(map(len, prompts)):
            raise ValueError("sample needs one seed per prompt, and prompts of at least one token")
        limit, switch = params.max_answer_tokens, self.model.switch_length
        self.model.check_fits([len(prompt) + limit for prompt in prompts], f"prompt and max_answer_tokens = {limit}")
        rows = [_Row(tuple(prompt), seed, limit, 0) for prompt, seed in zip(prompts, seeds, strict=True)]
        if switch is None:
            return self._sample(rows, params, progress, len(rows))
        # Behind the switch every key is another one (`engines.rope`): an answer that crosses it stops there, and goes
        # on in a pass that reads anew what it has written.
        short = [row._replace(limit=min(limit, switch + 1 - len(row.prompt))) for row in rows]
        begun_with = [index for index, row in enumerate(short) if row.limit > 0]
        answers = self._sample([short[index] for index in begun_with], params, progress, len(rows))
        begun = dict(zip(begun_with, answers, strict=True))
        open_rows = [i for i in range(len(rows)) if i not in begun or _cut_short(begun[i], limit)]
        going_on = [rows[i].behind(begun[i]) if i in begun else rows[i] for i in open_rows]
        for i, answer in zip(open_rows, self._sample(going_on, params, progress, len(rows)), strict=True):
            begun[i] = _joined(begun[i], answer) if i in begun else answer
        return [begun[index] for index in range(len(rows))]

    def _sample(
        self, rows: Sequence[_Row], params: SamplingParams, progress: Progress | None, num_rows: int
    ) -> list[Sampled]:
        """One answer per row, in order; the rows may be read together. `num_rows`: with others that are not here."""
        # Longest first: what does not fit into memory shows at once. Equal prompts become neighbours, to be read once.
        order = sorted(range(len(rows)), key=lambda row: (len(rows[row].prompt), rows[row].prompt), reverse=True)
        results: dict[int, Sampled] = {}

        def report(num_finished: int) -> None:
            if progress is not None:
                progress(min(len(results) + num_finished, num_rows), num_rows)

        # Inference mode is a tenth faster here, and safe: only numbers leave the loop.
        with torch.inference_mode(), self.model.using(self.weights), self.model.evaluating():
            lengths = [len(rows[row].prompt) + rows[row].limit for row in order]
            for part in _parts(lengths, self.max_tokens_per_batch, LOGIT_BYTES // (4 * self.model.num_tokens)):
                chosen = [rows[row] for row in order[part]]
                answers = decode(
                    self.model,
                    [row.prompt for row in chosen],
                    [row.seed for row in chosen],
                    params,
                    report,
                    limits=[row.limit for row in chosen],
                    drawn=[row.drawn for row in chosen],
                )
                results.update(zip(order[part], answers, strict=True))
        return [results[row] for row in range(len(rows))]

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
        if asked.answer == "none":
            raise ValueError("score was called for a method that needs no teacher")
        lengths = [len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True)]
        self.model.check_fits(lengths, what="context and answer")
        order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
        results: dict[int, Signal] = {}
        # Not inference mode: the hidden states go into a loss, and autograd refuses inference tensors.
        with torch.no_grad():
            head = self.model.head(self.weights)
            for part in _parts([lengths[row] for row in order], self.max_tokens_per_batch, len(order)):
                rows = order[part]
                said = [answers[r] for r in rows]
                hidden_NH = self.model.hidden([contexts[r] for r in rows], said, weights=self.weights)
                signals = signals_of(hidden_NH, head, said, asked, temperature)
                results.update(zip(rows, signals, strict=True))
                if progress is not None:
                    progress(len(results), len(lengths))
        return [results[row] for row in range(len(lengths))]


class _Row(NamedTuple):
    """An answer to sample: at most `limit` tokens, after `drawn` numbers of its seed's stream."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    drawn: int

    def behind(self, answer: Sampled) -> _Row:
        """What is left to sample behind the beginning of an answer."""
        num = len(answer.answer_ids)
        return _Row(self.prompt + answer.answer_ids, self.seed, self.limit - num, num)


def _cut_short(answer: Sampled, limit: int) -> bool:
    return answer.finish == "length" and len(answer.answer_ids) < limit


def _joined(beginning: Sampled, rest: Sampled) -> Sampled:
    both = {name: (getattr(beginning, name), getattr(rest, name)) for name in Sampled.__slots__ if name.endswith("_T")}
    arrays: dict[str, Any] = {
        name: None if first is None else np.concatenate([first, second]) for name, (first, second) in both.items()
    }
    return replace(rest, answer_ids=beginning.answer_ids + rest.answer_ids, **arrays)


def signals_of(hidden_NH: Tensor, head: Head, answers: Sequence[Ids], asked: Asked, temperature: float) -> list[Signal]:
    """What hidden states say of the answer tokens they predict, rows one after another: what was asked."""
    ends = np.cumsum([len(answer) for answer in answers])[:-1]
    columns: dict[str, Sequence[Any]] = {}
    if asked.answer == "distribution":
        columns["hidden_TH"] = hidden_NH.cpu().tensor_split(ends.tolist())
        columns["head"] = [head] * len(answers)
    if asked.answer != "distribution" or asked.entropy:
        stats = head_stats(
            hidden_NH,
            head,
            sampled_ids_N=None if asked.answer == "distribution" else _flat(answers, hidden_NH.device),
            k=asked.k if asked.answer == "topk" else None,
            entropy=asked.entropy,
            temperature=temperature,
        )
        said = {
            "sampled_logprob_T": stats.sampled_logprob_N,
            "topk_ids_TK": stats.topk_ids_NK,
            "topk_logprob_TK": stats.topk_logprob_NK,
            "entropy_T": stats.entropy_N,
        }
        columns |= {name: np.split(array.cpu().numpy(), ends) for name, array in said.items() if array is not None}
    return [Signal(**{name: column[row] for name, column in columns.items()}) for row in range(len(answers))]


def _flat(answers: Sequence[Ids], device: torch.device) -> Tensor:
    return torch.tensor([token for answer in answers for token in answer], dtype=torch.long, device=device)


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
