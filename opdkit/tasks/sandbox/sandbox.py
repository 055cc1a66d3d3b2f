"""Runs model-written programs: keeps every slot of its zygotes busy and gives back how each program ended.

The walls are explained in README.md. Nothing of a program is executed, unpickled or opened in this process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks.base import GraderDown
from opdkit.tasks.pool import usable_cores
from opdkit.tasks.sandbox.jobs import TIERS, Done, Job
from opdkit.tasks.sandbox.start import start_zygote
from opdkit.tasks.sandbox.zygote_client import Flight, ZygoteClient, ZygoteDied, wait_for_answers

DEFAULT_PRELOAD = ("numpy", "sortedcontainers")

_SLOTS_PER_ZYGOTE = 8  # forking is serial within one
_MAX_DEATHS = 3  # of zygotes, in one call of `run`; more is the machine's fault and must be seen
_MAX_TRIES = 2  # of a job whose zygote died
_POLL_S = 1.0


class Sandbox:
    """Runs jobs, as many at a time as there are slots. Starts at the first `run` or `describe`.

    num_slots: default, one per usable core. tiers: the walls that may be used; the strongest that holds is.
    preload: packages that programs may import besides the standard library; those not installed are left out.
    allow_unsafe: run programs WITHOUT walls, under resource limits only, with a warning. For throw-away machines.
    """

    def __init__(
        self,
        *,
        num_slots: int | None = None,
        tiers: Sequence[str] = TIERS,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        allow_unsafe: bool = False,
    ) -> None:
        if not tiers or set(tiers) - set(TIERS):
            raise UserError(f"sandbox tiers are {list(tiers)}; name one or more of {', '.join(TIERS)}")
        self.num_slots = num_slots or usable_cores()
        self.num_restarts = 0  # zygotes that died and were replaced
        self._tiers = tuple(tiers)
        self._preload = tuple(preload)
        self._allow_unsafe = allow_unsafe
        self._lock = threading.Lock()
        self._runs_in: int | None = None  # thread
        self._zygotes: list[ZygoteClient] = []
        self._owner_pid = 0

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Each job once, in the order in which they end. `jobs` is drawn from only when a slot is free.

        Raises SandboxUnavailable, and GraderDown if a fork server cannot be kept alive; never for what a program
        does. One caller at a time: another thread waits until this iterator is used up or closed.
        """
        if self._runs_in == threading.get_ident():
            raise RuntimeError("this thread is in the middle of another run of this sandbox, and would wait for itself")
        with self._lock:
            self._runs_in = threading.get_ident()
            try:
                self._start()
                yield from self._run(iter(jobs))
            except GeneratorExit:
                if any(zygote.flights for zygote in self._zygotes):
                    self._forget()  # jobs now in flight must not answer the next call
                raise
            except BaseException:
                self._forget()
                raise
            finally:
                self._runs_in = None

    def describe(self) -> dict[str, Any]:
        """For the run's record: tier, landlock_abi, user_per_process, refused (tier -> why), absent, num_slots."""
        if not self._zygotes:
            with self._lock:
                self._start()
        hello = {key: value for key, value in self._zygotes[0].hello.items() if key != "error"}
        return {**hello, "num_slots": self.num_slots}

    def close(self) -> None:
        """Ends all processes. Safe to call twice; a later `run` starts afresh."""
        with self._lock:
            self._forget()

    def _run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        repeated: deque[Flight] = deque()  # whose zygote died
        num_deaths = 0
        while True:
            self._fill(repeated, jobs)
            busy = [zygote for zygote in self._zygotes if zygote.flights]
            if not busy:
                return
            answering = wait_for_answers(busy, _POLL_S)
            for zygote in busy:
                try:
                    if zygote in answering:
                        yield zygote.receive()
                    elif zygote.is_late:
                        raise ZygoteDied("it does not answer")
                except ZygoteDied as error:
                    num_deaths += 1
                    if num_deaths > _MAX_DEATHS:
                        raise GraderDown(f"the sandbox's fork servers died {num_deaths} times: {error}") from error
                    for flight in list(zygote.flights.values()):
                        if flight.num_tries < _MAX_TRIES:
                            repeated.append(flight)
                        else:
                            reason = f"the fork server died {flight.num_tries} times under it: {error}"
                            yield Done(job=flight.job, error=reason)
                    self._replace(zygote)

    def _fill(self, repeated: deque[Flight], jobs: Iterator[Job]) -> None:
        for zygote in self._zygotes:
            while zygote.is_free:
                if repeated:
                    flight = repeated.popleft()
                    zygote.send(flight.job, num_tries=flight.num_tries + 1)
                    continue
                job = next(jobs, None)
                if job is None:
                    return
                zygote.send(job)

    def _start(self) -> None:
        if self._zygotes and self._owner_pid != os.getpid():
            self._forget()  # we were forked from the owner, and its sockets are not ours to use
        if self._zygotes:
            return
        self._owner_pid = os.getpid()
        num_zygotes = -(-self.num_slots // _SLOTS_PER_ZYGOTE)
        tiers: Sequence[str] = self._tiers
        for index in range(num_zygotes):
            num_slots = len(range(index, self.num_slots, num_zygotes))
            self._zygotes.append(self._start_zygote(tiers, num_slots))
            tiers = [self._zygotes[0].hello["tier"]]

    def _replace(self, zygote: ZygoteClient) -> None:
        self.num_restarts += 1
        zygote.close()
        place = self._zygotes.index(zygote)
        tiers = self._tiers if self._allow_unsafe else [zygote.hello["tier"]]
        self._zygotes[place] = self._start_zygote(tiers, zygote.num_slots)

    def _start_zygote(self, tiers: Sequence[str], num_slots: int) -> ZygoteClient:
        return start_zygote(tiers=tiers, num_slots=num_slots, preload=self._preload, allow_unsafe=self._allow_unsafe)

    def _forget(self) -> None:
        for zygote in self._zygotes:
            zygote.close()
        self._zygotes = []
