"""`Scorer` over servers: lists out of `prompt_logprobs`, or hidden states out of a folder that both sides see.

    sampled  the answer tokens' own log-probs            topk  the likeliest ids of each place besides
    hidden   the states behind the last layer: the norm and the head behind them are ours (`engines/output_head.py`), so
             every divergence, support and temperature is exact

Rows are asked one by one, some at a time, siblings at one server and one after the other, so that what they share is
read once where the server keeps it (hidden states read its prefix cache, prompt log-probs never do). What comes is
checked row by row; an answer that is half, or does not fit, is asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from opdkit.engines.base import Progress
from opdkit.engines.model import Ids
from opdkit.engines.output_head import OutputHead
from opdkit.engines.servers import chosen_ids
from opdkit.engines.servers.hidden_files import SharedFolder
from opdkit.engines.servers.http import Client, HalfError, Unreachable, as_answered
from opdkit.engines.servers.prompt_logprobs import Entries, Scan, signal_of
from opdkit.engines.states import answered
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.types import Asked, FloatArray, Signal

Payload = Literal["hidden", "topk", "sampled"]
COMPLETIONS = "/v1/completions"
SPARE = 8  # ids more than k that are asked for where some of them may be unknown to the student


@dataclass(slots=True)
class Cost:
    """Of the rows since the last report."""

    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    retries: int = 0


@dataclass(slots=True)
class ServerScorer:
    """clients: servers of one model under one name. shared, output: for hidden states. end, absent: as
    `CausalModel.limit_to`; entries: what reads lists (`prompt_logprobs`)."""

    clients: Sequence[Client]
    payload: Payload
    model: str
    at_once: int
    shared: SharedFolder | None = None
    output: OutputHead | None = None
    end: int | None = None
    absent: Sequence[int] = ()
    head: Head | None = None  # of hidden states: one object, so that rows may be learned from together
    num_rows: int | None = None  # ids that the server's model has
    max_positions: int | None = None
    entries: Any = Scan
    by_ids: set[str] = field(default_factory=set)  # addresses that answer for chosen ids, of payload "sampled"
    cost: Cost = field(default_factory=Cost)

    def limit_to(self, end: int, absent: Sequence[int] = ()) -> None:
        """As `CausalModel.limit_to`."""
        self.end, self.absent = end, absent
        self.head = None if self.output is None else self.output.head(end, absent)

    def can_say(self, asked: Asked) -> bool:
        if self.payload == "hidden":
            return True
        return Asked("topk", 1 << 30).covers(asked) if self.payload == "topk" else Asked("sampled").covers(asked)

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
        """Raises UserError where no server gives a row in time. Lists are at temperature 1 and no other."""
        if not self.can_say(asked) or (self.payload != "hidden" and temperature != 1.0):
            raise ValueError(f"payload {self.payload} cannot answer {asked} at temperature {temperature}")
        homes = {context: number for number, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
        started, retries = time.monotonic(), self._retries()
        found: dict[int, Signal] = {}

        def ask(row: int) -> Signal:
            context, answer = contexts[row], answers[row]
            return self._row(context, answer, asked, homes[tuple(context)])

        def abort() -> None:
            for client in self.clients:
                client.abort()
            if self.shared is not None:
                self.shared.is_stopped = True

        if self.shared is not None:
            self.shared.is_stopped = False

        order = sorted(range(len(answers)), key=lambda row: homes[tuple(contexts[row])])
        with closing(as_answered(ask, order, at_once=self.at_once * len(self.clients), abort=abort)) as coming:
            for some in coming:
                for row, said in some:
                    if isinstance(said, Exception):
                        raise said
                    found[row] = said
                if progress is not None:
                    progress(len(found), len(answers))
        self.cost.tokens += sum(map(len, contexts)) + sum(map(len, answers))
        self.cost.seconds += time.monotonic() - started
        self.cost.retries += self._retries() - retries
        signals = [found[row] for row in range(len(answers))]
        if self.payload != "hidden":
            return signals
        whole = answered(signals, answers, asked, temperature)
        for row in states_of:
            whole[row] = replace(whole[row], hidden_TH=signals[row].hidden_TH, head=self.head)
        return whole

    def _retries(self) -> int:
        return sum(client.num_retries for client in self.clients)

    def _row(self, context: Ids, answer: Ids, asked: Asked, home: int) -> Signal:
        """From its own server, or the next one where that gives nothing."""
        for number in range(len(self.clients)):
            client = self.clients[(home + number) % len(self.clients)]
            try:
                return self.row_of(client, context, answer, asked)
            except Unreachable:
                if number + 1 == len(self.clients):
                    raise
        raise AssertionError("there is a server at least")

    def row_of(self, client: Client, context: Ids, answer: Ids, asked: Asked) -> Signal:
        if self.payload == "hidden":
            return self._hidden(client, context, answer)
        if client.url in self.by_ids and answer:
            return Signal(sampled_logprob_T=self.ask_ids(client, context, answer))
        prompt, k = [*context, *answer], asked.k if asked.answer == "topk" else None
        k = None if k is None else min(k, self.end or k)
        taken = self.ask_lists(client, prompt, self.num_listed(k))
        try:
            return taken.signal(len(context), k, self.absent, self.end)
        except ValueError as error:
            raise UserError(
                f"{client.url} answers with {error}: too many of the likeliest tokens are unknown to the student; "
                'take a teacher of the student\'s vocabulary, or payload = "hidden"'
            ) from None

    def num_listed(self, k: int | None) -> int:
        """How many of the likeliest are asked for."""
        if k is None:
            return 0
        may_be_unknown = bool(self.absent) or self.num_rows is None or self.num_rows != self.end
        return k + SPARE if may_be_unknown else k

    def ask_lists(self, client: Client, prompt: Ids, count: int) -> _Lists:
        """Of all tokens of a prompt, `count` likeliest each."""
        body = {**self.body(prompt), "prompt_logprobs": count}
        taken = client.stream(COMPLETIONS, body, lambda: _Lists(self.entries(), prompt))
        self.cost.bytes += taken.num_bytes
        return taken

    def ask_ids(self, client: Client, context: Ids, answer: Ids) -> FloatArray:
        """[T] of the answer's own tokens."""
        body = chosen_ids.body(self.model, context, answer)
        logprob_T = client.read(chosen_ids.PATH, body, lambda said: chosen_ids.read(said, len(answer)))
        self.cost.bytes += logprob_T.nbytes
        return logprob_T

    def body(self, prompt: Ids) -> dict[str, Any]:
        """One token is written, since none cannot be asked for; every field is sent, since a server's generation config
        fills in the others."""
        plain = {"n": 1, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stream": False, "echo": False}
        return {"model": self.model, "prompt": list(prompt), **plain}

    def _hidden(self, client: Client, context: Ids, answer: Ids) -> Signal:
        assert self.output is not None and self.head is not None
        if not answer:
            width, dtype = self.head.weight_VH.shape[1], self.head.weight_VH.dtype
            return Signal(hidden_TH=torch.zeros(0, width, dtype=dtype), head=self.head)
        states_TH = self.ask_states(client, [*context, *answer][:-1])
        return Signal(hidden_TH=self.output.states(states_TH[len(context) - 1 :]), head=self.head)

    def ask_states(self, client: Client, prompt: Ids) -> torch.Tensor:
        """[T, H] behind the last layer, of all tokens of a prompt."""
        assert self.output is not None and self.shared is not None
        width, shared = self.output.weight_VH.shape[1], self.shared

        def read(answer: Any) -> torch.Tensor:
            try:
                said = answer["kv_transfer_params"]["hidden_states_path"]
                return shared.take(said, prompt, width, client.timeout_s)
            except (ValueError, KeyError, TypeError) as error:
                raise HalfError(f"it gives no hidden states: {error}") from None

        states_TH = client.read(COMPLETIONS, self.body(prompt), read)
        self.cost.bytes += states_TH.numel() * states_TH.element_size()
        return states_TH


class _Lists:
    """Sink of an answer with `prompt_logprobs`; at its end they must be those of the prompt."""

    def __init__(self, entries: Any, prompt: Ids) -> None:
        self._entries, self._prompt = entries, prompt
        self.found: Entries | None = None

    @property
    def num_bytes(self) -> int:
        return int(self._entries.num_bytes)

    def feed(self, part: bytes) -> None:
        try:
            self._entries.feed(part)
        except ValueError as error:
            raise HalfError(f"its prompt_logprobs cannot be read: {error}") from None

    def end(self) -> None:
        try:
            self.found = self._entries.read()
            signal_of(self.found, self._prompt, 1, None)
        except ValueError as error:
            raise HalfError(f"its prompt_logprobs are not whole: {error}") from None

    def signal(self, num_context: int, k: int | None, absent: Sequence[int], end: int | None) -> Signal:
        assert self.found is not None
        return signal_of(self.found, self._prompt, num_context, k, absent, end)
