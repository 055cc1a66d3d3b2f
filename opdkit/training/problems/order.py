"""Which problems a step sees: a function of (seed, step) alone, so that a resumed run needs no memory of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.types import seed_from

T = TypeVar("T")


def problems_of_step(problems: Sequence[T], *, step: int, per_step: int, seed: int) -> list[T]:
    """Every epoch is a new permutation, cut into steps; what does not fill a step waits for another epoch.

    So no step holds a problem twice. Raises UserError if there are fewer problems than a step wants.
    """
    steps_per_epoch = len(problems) // per_step
    if steps_per_epoch == 0:
        raise UserError(
            f"train.problems_per_step = {per_step} wants more problems than the {len(problems)} there are; "
            "lower it, or use more data"
        )
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng(seed_from(seed, "order", epoch)).permutation(len(problems))
    return [problems[i] for i in order[place * per_step : (place + 1) * per_step]]


class Draws(Generic[T]):
    """The steps' problems out of several sets, by shares.

    The sets take turns as evenly as their shares allow (Sainte-Lague's method), so that after any number of draws each
    has had its share of them, to within about one. The draws of a set are whole epochs of it, each in an order of its
    own; where a step lies in two of them, the second begins with problems that the step does not hold yet.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[T]], shares: Mapping[str, float], *, per_step: int, num_steps: int, seed: int
    ) -> None:
        """sets, shares: by name. Raises UserError for a set of fewer problems than some step wants."""
        self.sets, self._per_step, self._seed = sets, per_step, seed
        self._shares = {name: shares[name] for name in sets}
        self._orders: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        for name, problems in sets.items():
            if len(problems) < int(self._shares[name] * per_step) + len(sets):  # it might do: look at every step
                most = max(self._drawn_in(step, name) for step in range(num_steps))
                if len(problems) < most:
                    raise UserError(
                        f"train.problems_per_step = {per_step} wants {most} problems of {name} in a step, more than "
                        f"the {len(problems)} there are; lower it or the share, or use more data"
                    )

    def of_step(self, step: int) -> list[T]:
        """In the order of the sets' turns. `step`: how many were taken before."""
        counts, found = self.num_drawn(step), []
        for _ in range(self._per_step):
            name = self._next(counts)
            epoch, place = divmod(counts[name], len(self.sets[name]))
            found.append(self.sets[name][self._order(name, epoch)[place]])
            counts[name] += 1
        return found

    def num_drawn(self, step: int) -> dict[str, int]:
        """How many problems of each set the steps before this one take."""
        num, slack = step * self._per_step, len(self.sets) // 2 + 1
        counts = {name: max(0, int(share * (num - slack) - 1)) for name, share in self._shares.items()}
        for _ in range(num - sum(counts.values())):
            counts[self._next(counts)] += 1
        return counts

    def metrics(self, step: int) -> list[Metric]:
        """Of the step after `step` others: what it takes of each set, and how often that has been seen by then."""
        before, after = self.num_drawn(step), self.num_drawn(step + 1)
        return [
            metric
            for name, problems in self.sets.items()
            for metric in (
                Metric(f"data/{name}/draws", float(after[name] - before[name]), "sum"),
                Metric(f"data/{name}/epoch", after[name] / len(problems), "last"),
            )
        ]

    def _next(self, counts: Mapping[str, int]) -> str:
        """Whose turn it is: the k-th draw of a set is due at (k - 1/2) / share."""
        return min(counts, key=lambda name: (counts[name] + 0.5) / self._shares[name])

    def _drawn_in(self, step: int, name: str) -> int:
        return self.num_drawn(step + 1)[name] - self.num_drawn(step)[name]

    def _order(self, name: str, epoch: int) -> npt.NDArray[np.int64]:
        """The places of an epoch of a set. Each order looks at the one before it."""
        size = len(self.sets[name])
        known = next((number for number in range(epoch, -1, -1) if (name, number) in self._orders), -1)
        for number in range(known + 1, epoch + 1):
            order = np.random.default_rng(seed_from(self._seed, "order", name, number)).permutation(size)
            if number and (num_old := self._in_step_before(name, number * size)):
                waits = np.isin(order, self._orders[name, number - 1][size - num_old :])
                order = np.concatenate([order[~waits], order[waits]])
            self._orders[name, number] = order
        return self._orders[name, epoch]

    def _in_step_before(self, name: str, draw: int) -> int:
        """How many draws of the set stand before this one (counted from 0) in its step."""
        step = max(0, int(draw / (self._shares[name] * self._per_step)) - len(self.sets))
        while self.num_drawn(step + 1)[name] <= draw:
            step += 1
        return draw - self.num_drawn(step)[name]
