"""Which problems a step sees."""

import pytest

from opdkit.errors import UserError
from opdkit.training.problems.order import Draws, problems_of_step


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


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.75, 0.25), (0.9, 0.06, 0.04), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("per_step", [1, 4, 7])
def test_sets_are_drawn_by_their_shares(shares: tuple[float, ...], per_step: int) -> None:
    """Whole epochs of every set, its share to within two draws after every step, and no step with a problem twice."""
    names = [f"s{number}" for number in range(len(shares))]
    sets = {name: [(name, place) for place in range(per_step + number)] for number, name in enumerate(names)}

    def draws() -> Draws[tuple[str, int]]:
        return Draws(sets, dict(zip(names, shares, strict=True)), per_step=per_step, num_steps=50, seed=1)

    one, seen = draws(), {name: [] for name in names}  # type: ignore[var-annotated]
    for step in range(50):
        assert one.num_drawn(step) == {name: len(places) for name, places in seen.items()}
        chosen = one.of_step(step)
        assert len(set(chosen)) == per_step
        for name, place in chosen:
            seen[name].append(place)
        for name, share in zip(names, shares, strict=True):
            assert abs(len(seen[name]) - share * (step + 1) * per_step) < 2
    for name, places in seen.items():
        size = len(sets[name])
        whole = [places[start : start + size] for start in range(0, len(places) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
    assert draws().of_step(49) == chosen  # without having walked there
