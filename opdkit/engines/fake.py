"""An engine without a model, for tests of everything around it: scripted answers, fixed log-probs, no weights.

Letters: T answer positions, K entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from opdkit.engines.base import Finished, Progress, Sampled, SamplingParams
from opdkit.losses import Head
from opdkit.types import Asked, Signal, seed_from

Script = Callable[[tuple[int, ...], int], Sequence[int]]  # (prompt ids, seed) -> answer ids


class FakeEngine:
    """`Sampler` and `Scorer`. The same prompt and seed always give the same answer.

    script   writes the answers; one that is longer than max_answer_tokens is cut and has finish "length"
    logprob  of every answer token, in nats, sampled or scored; top-k ids are 0 .. k-1, all at this log-prob; the
             entropy is its negative
    """

    def __init__(self, script: Script, *, logprob: float = -1.0, hidden_width: int = 4) -> None:
        self.script = script
        self.logprob = logprob
        self.hidden_width = hidden_width

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Sampled]:
        answers: list[Sampled] = []
        try:
            self._write(answers, prompts, seeds, params, progress)
        finally:
            if finished is not None:
                finished(dict(enumerate(answers)))
        return answers

    def _write(
        self,
        answers: list[Sampled],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None,
    ) -> None:
        for prompt, seed in zip(prompts, seeds, strict=True):
            written = tuple(self.script(tuple(prompt), seed))
            ids = written[: params.max_answer_tokens]
            answers.append(
                Sampled(
                    answer_ids=ids,
                    logprobs_T=np.full(len(ids), self.logprob, dtype=np.float32),
                    finish="stop" if ids == written else "length",
                )
            )
            if progress is not None:
                progress(len(answers), len(prompts))

    def score(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        asked: Asked,
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Signal]:
        signals = []
        for context, answer in zip(contexts, answers, strict=True):
            signals.append(self._signal(context, answer, asked))
            if progress is not None:
                progress(len(signals), len(answers))
        return signals

    def _signal(self, context: Sequence[int], answer: Sequence[int], asked: Asked) -> Signal:
        length, k = len(answer), asked.k if asked.answer == "topk" else None
        logprob_T = np.full(length, self.logprob, dtype=np.float32)
        hidden_TH = head = None
        if asked.answer == "distribution":
            generator = torch.Generator().manual_seed(seed_from("fake hidden", *context, "answer", *answer))
            hidden_TH = torch.randn(length, self.hidden_width, generator=generator)
            head = Head(weight_VH=torch.eye(self.hidden_width), num_tokens=self.hidden_width)
        return Signal(
            sampled_logprob_T=None if asked.answer == "distribution" else logprob_T,
            topk_ids_TK=None if k is None else np.tile(np.arange(k, dtype=np.int64), (length, 1)),
            topk_logprob_TK=None if k is None else np.full((length, k), self.logprob, dtype=np.float32),
            entropy_T=-logprob_T if asked.entropy else None,
            hidden_TH=hidden_TH,
            head=head,
        )
