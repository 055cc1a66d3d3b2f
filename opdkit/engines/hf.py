"""Sampling and scoring with a Hugging Face model in this process: exact log-probs, no weight copies, any device.

Letters: T answer positions of one row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.engines.base import Finished, Progress, Sampled, SamplingParams
from opdkit.engines.forward.scoring import score
from opdkit.engines.memory import cached_tokens, enough_memory
from opdkit.engines.model import Ids, LanguageModel
from opdkit.engines.sampling.draw import check_params
from opdkit.engines.sampling.slots import Counts, Job, Slots
from opdkit.errors import Interrupted
from opdkit.types import Asked, Signal


class HFEngine:
    """`Sampler` and `Scorer` (see `engines.base`) over one `LanguageModel`, with its own weights or stand-ins.

    max_tokens_per_batch  rows times padded length that are sampled together; a single longer row goes alone. None:
                          `TOKENS_PER_BATCH`, and on CUDA what memory holds (`engines.memory`). Nor are more scored
                          together; else scoring goes by the model's `passes`
    weights               tensors that replace parameters, as in `LanguageModel.using` (initial or EMA teachers)
    reader_ids_W          what it says of whole distributions and likeliest ids is for another tokenizer (`Head`)
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_tokens_per_batch: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
        reader_ids_W: Tensor | None = None,
    ) -> None:
        self.model = model
        self.reader_ids_W = reader_ids_W
        self.max_tokens_per_batch = max_tokens_per_batch
        self.weights = weights
        self.counts = Counts()  # of all that it has sampled

    def sample(
        self,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Sampled]:
        """One answer per prompt, in order. Row i depends on prompts[i], seeds[i] and params only (see `slots`).

        Raises UserError for parameters out of range, a row that may outgrow the model's positions, logits that are not
        finite, and where memory runs out.
        """
        check_params(params)
        if len(seeds) != len(prompts) or not all(map(len, prompts)):
            raise ValueError("sample needs one seed per prompt, and prompts of at least one token")
        limit, switch = params.max_answer_tokens, self.model.switch_length
        self.model.check_fits([len(prompt) + limit for prompt in prompts], f"prompt and max_answer_tokens = {limit}")
        jobs = [Job(tuple(prompt), seed, limit) for prompt, seed in zip(prompts, seeds, strict=True)]
        if switch is None:
            return self._sample(dict(enumerate(jobs)), params, progress, finished, 0, len(jobs))
        # Behind the switch every key is another one (`engines.rope`): an answer that crosses it stops there, and goes
        # on in a pass that reads anew what it has written.
        short = {index: job._replace(limit=min(limit, switch + 1 - len(job.prompt))) for index, job in enumerate(jobs)}
        short = {index: job for index, job in short.items() if job.limit > 0}

        def whole(answers: Mapping[int, Sampled]) -> None:
            if finished is not None:
                finished({index: answer for index, answer in answers.items() if not _cut_short(answer, limit)})

        begun = dict(zip(short, self._sample(short, params, progress, whole, 0, len(jobs)), strict=True))
        rest = {index: _behind(job, begun[index]) if index in begun else job for index, job in enumerate(jobs)}
        rest = {i: job for i, job in rest.items() if i not in begun or _cut_short(begun[i], limit)}

        def joined(answers: Mapping[int, Sampled]) -> None:
            for index, answer in answers.items():
                begun[index] = _joined(begun[index], answer) if index in begun else answer
            if finished is not None:
                finished({index: begun[index] for index in answers})

        self._sample(rest, params, progress, joined, len(jobs) - len(rest), len(jobs))
        return [begun[index] for index in range(len(jobs))]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Gathering`."""
        shards = self.model.shards
        if shards is None:
            yield
            return
        with shards.holding({n: w for n, w in (self.weights or {}).items() if n in shards}), shards.whole():
            yield

    def _sample(
        self,
        jobs: Mapping[int, Job],
        params: SamplingParams,
        progress: Progress | None,
        finished: Finished | None,
        num_done: int,
        num_jobs: int,
    ) -> list[Sampled]:
        """One answer per job, in order. num_done, num_jobs: of all, for `progress`."""
        places, results = list(jobs), dict[int, Sampled]()

        def hand_out(answers: Mapping[int, Sampled]) -> None:
            fresh = {places[index]: answer for index, answer in sorted(answers.items())}
            results.update(fresh)
            if finished is not None and fresh:
                finished(fresh)

        # Inference mode is a tenth faster here, and safe: only numbers leave the loop.
        with (
            self.model.using(self.weights),
            nullcontext() if self.model.shards is None else self.model.shards.whole(),
            torch.inference_mode(),
            self.model.evaluating(),
            enough_memory("sampling", "lower max_tokens_per_batch (of [sampling]; --max-tokens-per-batch)"),
        ):
            max_tokens = self.max_tokens_per_batch or cached_tokens(self.model)
            slots = Slots(self.model, list(jobs.values()), params, max_tokens=max_tokens)
            for answers in slots.run():
                hand_out(answers)
                if progress is not None:
                    try:
                        progress(num_done + slots.num_ended, num_jobs)
                    except Interrupted:
                        hand_out(slots.ended())
                        raise
            self.counts += slots.counts
        return [results[place] for place in places]

    def score(
        self,
        contexts: Sequence[Ids],
        answers: Sequence[Ids],
        asked: Asked,
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
        states_of: Collection[int] = (),
    ) -> list[Signal]:
        """What this model says of every answer token, given the context, in order: what `asked.answer` asks for.

        "sampled": log-probs of the answer tokens. "topk": also the k likeliest ids and their log-probs.
        "distribution": hidden states, and the head to read them through; it is not applied here. The states are in host
        memory: a whole batch of them would fill an accelerator, and each is wanted in one micro-batch only.
        With `asked.entropy` also each token's entropy. Rows in `states_of` have hidden states and head besides.
        Raises UserError for a row longer than the model's positions.
        """
        most = self.max_tokens_per_batch or self.model.passes.max_tokens
        passes = replace(self.model.passes, max_tokens=min(most, self.model.passes.max_tokens))
        head = replace(self.model.head(self.weights), reader_ids_W=self.reader_ids_W)
        return score(
            self.model,
            contexts,
            answers,
            asked,
            passes,
            self.weights,
            head,
            temperature=temperature,
            progress=progress,
            states_of=states_of,
        )


def _behind(job: Job, answer: Sampled) -> Job:
    """What is left to sample behind the beginning of an answer."""
    num = len(answer.answer_ids)
    return Job(job.prompt + answer.answer_ids, job.seed, job.limit - num, num)


def _cut_short(answer: Sampled, limit: int) -> bool:
    return answer.finish == "length" and len(answer.answer_ids) < limit


def _joined(beginning: Sampled, rest: Sampled) -> Sampled:
    both = {name: (getattr(beginning, name), getattr(rest, name)) for name in Sampled.__slots__ if name.endswith("_T")}
    arrays: dict[str, Any] = {
        name: None if first is None else np.concatenate([first, second]) for name, (first, second) in both.items()
    }
    return replace(rest, answer_ids=beginning.answer_ids + rest.answer_ids, **arrays)
