"""One worker process as the trainer sees it: what waits for it, what it is doing, since when, and what it said."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdkit.tasks._worker import take_frame
from opdkit.tasks.user.process import UserProcess

_GRACE_S = 2.0  # an environment that waits by `async` ends its own waits; one that cannot is killed so much later
_MAX_BATCH = 32  # requests that a worker of one thing at a time is handed at once
_MAX_REPLY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Item:
    """A request to an episode's environment. digest: of its answer, when it has been asked before."""

    episode: int
    request: Mapping[str, Any]
    limit_s: float
    digest: str | None = None


class Gone(Exception):
    """The process has ended, or says what no worker says. One line."""


class Worker:
    """It does one thing after the other, unless its environment is async. `num_episodes` is the pool's count."""

    def __init__(self, process: UserProcess, described: Mapping[str, Any]) -> None:
        self.process, self.described, self.num_episodes = process, described, 0
        self._one_by_one = not described["is_async"]
        self._waiting: deque[Item] = deque()
        self._in_flight: dict[int, tuple[Item, float]] = {}  # by number, in order; and when it began
        self._num_given = 0
        self._outgoing, self._incoming = bytearray(), bytearray()
        process.channel.setblocking(False)

    def give(self, item: Item) -> None:
        self._waiting.append(item)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing or (self._waiting and not (self._one_by_one and self._in_flight)))

    @property
    def deadline_s(self) -> float:
        """When something may be overdue."""
        return min((self._limit_s(item, began_s) for item, began_s in self._begun()), default=math.inf)

    def overdue(self) -> list[Item]:
        now_s = time.monotonic()
        return [item for item, began_s in self._begun() if now_s > self._limit_s(item, began_s)]

    def suspects(self) -> list[Item]:
        """What it may have died of."""
        return [item for item, _ in self._begun()]

    def exchange(self) -> list[tuple[Item, dict[str, Any]]]:
        """Hands over what waits, and takes what has been answered. Never blocks. Raises Gone for nonsense."""
        self._fill()
        try:
            while self._outgoing:
                del self._outgoing[: self.process.channel.send(bytes(self._outgoing[: 1 << 20]))]
        except OSError:
            pass  # it is full for now, or gone: `is_alive` says which
        return self._received()

    def is_alive(self) -> bool:
        return self.process.process.poll() is None

    def _begun(self) -> list[tuple[Item, float]]:
        begun = list(self._in_flight.values())
        return begun[:1] if self._one_by_one else begun

    def _limit_s(self, item: Item, began_s: float) -> float:
        return began_s + item.limit_s + (0.0 if self._one_by_one else _GRACE_S)

    def _fill(self) -> None:
        if not self._waiting or (self._one_by_one and self._in_flight):
            return
        now_s = time.monotonic()
        items: list[dict[str, Any]] = []
        while self._waiting and len(items) < (_MAX_BATCH if self._one_by_one else math.inf):
            item = self._waiting.popleft()
            self._num_given += 1
            self._in_flight[self._num_given] = (item, now_s)
            limit = {} if self._one_by_one else {"limit_s": item.limit_s}
            items.append({"number": self._num_given, "episode": item.episode, **item.request, **limit})
        payload = json.dumps({"items": items}).encode()
        self._outgoing += len(payload).to_bytes(4, "big") + payload

    def _received(self) -> list[tuple[Item, dict[str, Any]]]:
        answered: list[tuple[Item, dict[str, Any]]] = []
        try:
            while data := self.process.channel.recv(1 << 20):
                self._incoming += data
                if len(self._incoming) > _MAX_REPLY_BYTES:
                    raise Gone("its process sent an endless reply")
        except OSError:
            pass  # nothing there for now, or gone
        try:
            while (frame := take_frame(self._incoming)) is not None:
                said = json.loads(frame)
                item, _ = self._in_flight.pop(said["number"])
                answered.append((item, said))
                self._next_began(float(said["at"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise Gone(f"its process sent something else than an answer ({type(error).__name__})") from None
        return answered

    def _next_began(self, at_s: float) -> None:
        """CLOCK_MONOTONIC is one clock for all processes of a machine."""
        if self._one_by_one and self._in_flight:
            number = next(iter(self._in_flight))
            item, _ = self._in_flight[number]
            self._in_flight[number] = (item, min(at_s, time.monotonic()))
