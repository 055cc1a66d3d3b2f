"""What the processes of a run ask each other. Alone there is nobody to ask, and every answer is one's own.

Every rank takes the same decisions, so whatever a decision depends on is gathered before it is taken. A call here is
made by all ranks, in one order; what only some would make hangs the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from opdkit.errors import Interrupted, UserError

T = TypeVar("T")

MOST_SAID = 500  # characters of an exception
LOST = 75  # exit status of a rank that ended because another one did


class RankLost(Exception):
    """Another rank ended, or did not answer in time. What is on disk stays whole."""


class Ranks:
    """One process. `rank` counts from 0; the first one speaks and writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order."""
        return [mine]

    def gather_on_first(self, mine: T) -> list[T]:
        """The same on the first rank; [] on the others."""
        return [mine]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives the first rank, who alone calls it. What it raises ends all, see `heard`."""
        return make()

    def from_all(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """What `make` gives every rank, one behind the other. What it raises on one ends all, see `heard`."""
        own: Sequence[T] = ()
        failed: Exception | None = None
        try:
            own = make()
        except RankLost:  # nobody is there to be told
            raise
        except Exception as error:
            failed = error
        try:
            told = self.gather((own, None if failed is None else heard(failed, self.rank)))
        except RankLost:
            if failed is None:
                raise
        if failed is not None:
            raise failed
        for _, theirs in told:
            if theirs is not None:
                raise theirs
        return [item for items, _ in told for item in items]

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Until all are here."""

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Around work in which torch itself asks other ranks: raises RankLost where one does not answer."""
        yield

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's run of neighbours: equally many on all ranks, to within one."""
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def joined(self, own: Sequence[T]) -> list[T]:
        """The shares of all ranks, one after the other."""
        return [item for items in self.gather(own) for item in items]


ALONE = Ranks()


def heard(error: Exception, rank: int) -> Exception:
    """What the other ranks raise when `rank` raises this: bad input and a wish to stop are everybody's, and end each as
    they end one process. Of anything else they say what it was; it is that rank's own, with its traceback."""
    if isinstance(error, Interrupted):
        return type(error)(str(error))
    if isinstance(error, UserError):
        return UserError(*(f"rank {rank}: {sentence}" for sentence in error.sentences))
    return RankLost(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:MOST_SAID]}")


def dealt(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Who takes each item: the dearest first, each to the rank that has least so far."""
    loads, ranks = [0.0] * num_ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        ranks[item] = min(range(num_ranks), key=loads.__getitem__)
        loads[ranks[item]] += costs[item]
    return ranks
