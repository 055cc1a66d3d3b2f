"""Which problems a step sees."""

import pytest

from opdkit.errors import UserError
from opdkit.training.order import problems_of_step


def test_every_epoch_is_a_permutation() -> None:
    """10 problems, 3 a step: 3 steps an epoch, no problem twice in it, another order in the next."""
    steps = [problems_of_step(range(10), step=s, per_step=3, seed=0) for s in range(6)]
    assert len({p for step in steps[:3] for p in step}) == 9
    assert steps[:3] != steps[3:]


def test_a_step_is_a_function_of_seed_and_step() -> None:
    """Nothing is remembered between steps, so a resumed run sees the same problems."""
    assert problems_of_step(range(10), step=7, per_step=3, seed=1) == problems_of_step(
        range(10), step=7, per_step=3, seed=1
    )
    assert problems_of_step(range(10), step=0, per_step=3, seed=1) != problems_of_step(
        range(10), step=0, per_step=3, seed=2
    )


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(UserError, match="problems_per_step = 3 wants more problems than the 2"):
        problems_of_step(range(2), step=0, per_step=3, seed=0)
