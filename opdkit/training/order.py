"""Which problems a step sees: a function of (seed, step) alone, so that a resumed run needs no memory of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from opdkit.errors import UserError
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
