"""`Sampler` over a server: every row in flight at once, rows handed on as they come, and none lost or doubled when the
server dies, hangs or is restarted in the middle.

A row is asked again with its own prompt and seed. In float32 on one thread vLLM gives the same tokens again, whoever is
in the batch (seen for 32 of 32 rows); in bfloat16 now and then another one (30 of 32).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from opdkit.engines.base import Finished, Progress, Sampled, SamplingParams
from opdkit.engines.sampling.draw import check_params, cuts
from opdkit.engines.servers.base import Aborted, Api, Row, Vocabulary, Written
from opdkit.engines.servers.http import Refused, Unreachable, as_answered
from opdkit.engines.tokens.stop_strings import StopStrings
from opdkit.errors import UserError
from opdkit.types import FloatArray

AT_ONCE = 1024  # rows in flight; more than an engine decodes together
RECOVERIES = 3  # in a row, without a single row between them
LOOK_S = 15.0  # between looks at a server that has said nothing
STALL_S = 180.0  # without a row or a token a server that lives is taken to hang


class Host(Protocol):
    """Who looks after the server."""

    api: Api

    @property
    def is_running(self) -> bool:
        """False: its process is known to have ended."""
        ...

    def recover(self, trouble: str) -> None:
        """Make it ready again, with the weights it had; `api` may be another one then. Raises UserError where it cannot
        be."""
        ...


@dataclass(slots=True)
class ServerEngine:
    """adapter: the name that rows are asked of; None: the served model. version: of the weights that must answer, where
    the server says it."""

    host: Host
    vocabulary: Vocabulary
    max_model_len: int | None = None
    adapter: str | None = None
    version: str | None = None
    num_recoveries: int = field(default=0, init=False)  # since it was made

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Sampled]:
        """See `Sampler`. Raises UserError where the server cannot answer, or answers something else."""
        check_params(params)
        rows = [Row(tuple(map(int, prompt)), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        self._check_lengths(rows, params)
        done: dict[int, Sampled] = {}
        in_vain = 0
        while len(done) < len(rows):
            before = len(done)
            trouble = self._ask(rows, params, done, progress, finished)
            if trouble is None:
                continue
            in_vain = 0 if len(done) > before else in_vain + 1
            if in_vain > RECOVERIES:
                raise UserError(
                    f"{self.host.api.client.url} failed {in_vain} times in a row without one answer ({trouble}); see "
                    "its log, and go on with --resume"
                )
            self.num_recoveries += 1
            self.host.recover(trouble)
        return [done[index] for index in range(len(rows))]

    def _ask(
        self,
        rows: Sequence[Row],
        params: SamplingParams,
        done: dict[int, Sampled],
        progress: Progress | None,
        finished: Finished | None,
    ) -> str | None:
        """Ask for what is missing and hand on what comes; what happened, if the server must be looked after."""
        watch = _Watch(self)
        answered = as_answered(
            lambda index: self._answer(rows[index], params),
            [index for index in range(len(rows)) if index not in done],
            at_once=AT_ONCE,
            abort=self.host.api.client.abort,
        )
        try:
            for come in answered:
                fresh = {index: one for index, one in come if isinstance(one, Sampled)}
                if fresh:
                    watch.heard()
                    done |= fresh
                    if finished is not None:
                        finished(fresh)
                if progress is not None:
                    progress(len(done), len(rows))
                failed = [one for _, one in come if isinstance(one, Exception)]
                for error in failed:
                    if not isinstance(error, Unreachable | Aborted | _OtherWeights):
                        raise error
                trouble = str(failed[0]) if failed else watch.trouble()
                if trouble is not None:
                    return trouble or "it ended an answer before its end"
        finally:
            answered.close()
        return None

    def _answer(self, row: Row, params: SamplingParams) -> Sampled:
        body = self.host.api.body(row, params, self.vocabulary, self.adapter)
        try:
            answer = self.host.api.client.json(self.host.api.path, body)
        except Refused as error:
            if error.status == 404 and self.adapter is not None and self.adapter in error.said:
                raise _OtherWeights("it has lost the adapter: it was restarted") from None
            raise
        try:
            written = self.host.api.written(answer)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{self.host.api.client.url}{self.host.api.path} gave an answer that cannot be read "
                f"({type(error).__name__}: {error}); is it a server of this kind, and of a version that was tried?"
            ) from None
        written = up_to_text(written, params, self.vocabulary)
        self._check(row, written, params)
        return sampled(written, params, self.vocabulary)

    def _check(self, row: Row, written: Written, params: SamplingParams) -> None:
        """Raises UserError for an answer that is not one to this question, _OtherWeights for one of other weights."""
        vocabulary, ids = self.vocabulary, written.ids
        where = f"{self.host.api.client.url}{self.host.api.path}"
        if self.version is not None and self.adapter is None:
            for version in written.versions:
                if version == "default":
                    raise _OtherWeights("its weights are those it began with: it was restarted")
                if version != self.version:
                    raise UserError(
                        f"{where} answered with weights {version!r} instead of {self.version!r}: another run updates "
                        "the same server; give each its own"
                    )
        if len(written.logprobs_T) != len(ids) or not 0 < len(ids) <= params.max_answer_tokens:
            raise UserError(f"{where} gave {len(ids)} tokens and {len(written.logprobs_T)} log-probs for one answer")
        if strange := [token for token in ids if not 0 <= token < vocabulary.num_tokens or token in vocabulary.absent]:
            raise UserError(
                f"{where} sampled id {strange[0]}, which the student's tokenizer has not "
                f"({vocabulary.num_tokens} ids); is another model served there?"
            )
        stopped = ids[-1] in vocabulary.stop_ids or written.ends_text
        if written.stopped != stopped or any(i in vocabulary.stop_ids for i in ids[:-1]):
            raise UserError(
                f"{where} ended an answer elsewhere than at a stop token (its last id: {ids[-1]}, stops: "
                f"{sorted(vocabulary.stop_ids)}); is stop_token_ids heard there?"
            )

    def _check_lengths(self, rows: Sequence[Row], params: SamplingParams) -> None:
        room = self.max_model_len
        longest = max((len(row.prompt) for row in rows), default=0)
        if room is not None and longest + params.max_answer_tokens > room:
            raise UserError(
                f"a prompt of {longest} tokens and max_answer_tokens = {params.max_answer_tokens} do not fit into the "
                f"engine's max_model_len = {room}; raise sampling.vllm.max_model_len (--max-model-len of a server), or "
                "lower max_answer_tokens"
            )


class _OtherWeights(Exception):
    """An answer, or a refusal, of a server that has not the weights it should have."""


@dataclass(slots=True)
class _Watch:
    """Whether a server that says nothing still works."""

    engine: ServerEngine
    _looked: float = field(default_factory=time.monotonic)
    _moved: float = field(default_factory=time.monotonic)
    _count: float | None = None

    def heard(self) -> None:
        self._moved = time.monotonic()

    def trouble(self) -> str | None:
        engine, now = self.engine, time.monotonic()
        if not engine.host.is_running:
            return "the engine's process has ended"
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        try:
            engine.host.api.client.ask("/health", timeout_s=30.0, patience_s=0)
            count = engine.host.api.progress()
        except (Unreachable, Refused) as error:
            return str(error)
        if count is None or count != self._count:
            self._count, self._moved = count, time.monotonic()
        return f"no token in {STALL_S:.0f} s" if now - self._moved > STALL_S else None


def up_to_text(written: Written, params: SamplingParams, vocabulary: Vocabulary) -> Written:
    """The answer up to the token that completes a text which ends it. A server stops about there to save work; where it
    is, `StopStrings` says for every engine alike."""
    end = StopStrings(vocabulary.tokenizer, params.stop).end(written.ids) if params.stop else None
    if end is None:
        return written
    return replace(written, ids=written.ids[:end], logprobs_T=written.logprobs_T[:end], stopped=True, ends_text=True)


def sampled(written: Written, params: SamplingParams, vocabulary: Vocabulary) -> Sampled:
    """As the engines here say it: at temperature 0 all mass is on the likeliest token; what the log-prob before the
    cuts was is not known (NaN)."""
    logprobs_T = np.zeros_like(written.logprobs_T) if params.temperature == 0 else np.minimum(written.logprobs_T, 0)
    uncut: FloatArray | None = None
    if cuts(params, vocabulary.num_tokens):
        uncut = np.full(len(written.ids), np.nan, dtype=np.float32)
    return Sampled(
        answer_ids=written.ids,
        logprobs_T=logprobs_T,
        finish="stop" if written.stopped else "length",
        uncut_logprobs_T=uncut,
    )
