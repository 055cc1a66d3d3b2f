"""How often do 95 % intervals over problems hold the truth, and how wide are they? Ours beside the published bootstrap.

    python benchmarks/interval_coverage.py                 # a minute and a half of one core
    python benchmarks/interval_coverage.py --draws 5000    # finer

A draw is an evaluation of P problems with n answers each. A problem's chance of a right answer is drawn from a beta
distribution with the given mean; the correlation of two answers to one problem is 0 (all problems are alike) to 0.9
(nearly always all right or all wrong). For differences, a problem's answers are drawn before and after:

    gain      never solved before; after, as above
    harder    chances of a beta(1/2, 1/2), and after a share of what was missing is added: most problems hardly move
    both ways answers move by a whole point on a share of the problems, 7 of 10 of them upwards
    rare loss a share of the problems loses a whole point, the others move by an eighth or not at all

Coverage is the share of draws whose interval holds the true mean; width is the mean width, cut to the scale. The last
lines say the smallest coverage of each. With 2000 draws a coverage of 0.95 is known to 0.01 (two standard errors).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from opdkit.measure.bootstrap import bootstrap_means
from opdkit.measure.intervals import Estimate, estimate_difference, estimate_mean

PROBLEMS = (5, 10, 30, 100, 500)
MEANS = (0.005, 0.02, 0.1, 0.5)
KINDS_OF_ANSWERS = ((1, 0.0), (8, 0.0), (8, 0.2), (8, 0.9))  # answers a problem, correlation of two of them
CHANGES = (0.02, 0.1, 0.3)
RESAMPLES = 1000  # of the bootstrap

Floats = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    worst: dict[str, tuple[float, str]] = {}
    print(f"{'':40}  coverage          width\n{'':40}  ours  bootstrap   ours   bootstrap")
    for case, truth, before, after in _cases(rng, asked.draws):
        if before is None:
            ours: list[Estimate] = [estimate_mean(values) for values in after]
            changes = after
        else:
            ours = [estimate_difference(b, a) for b, a in zip(before, after, strict=True)]
            changes = after - before
        old = bootstrap_means(changes.T, seed=asked.seed, resamples=RESAMPLES)
        scale = (0.0 if before is None else -1.0, 1.0)
        (held, width), (old_held, old_width) = (_measured(found, truth, scale) for found in (ours, old))
        print(f"{case:40}  {held:.3f} {old_held:.3f}      {width:.4f}  {old_width:.4f}", flush=True)
        for name, coverage in (("ours", held), ("bootstrap", old_held)):
            worst[name] = min(worst.get(name, (1.0, "")), (coverage, case))
    for name, (coverage, case) in worst.items():
        print(f"smallest coverage, {name}: {coverage:.3f} ({' '.join(case.split())})")


def _cases(rng: np.random.Generator, draws: int) -> Iterator[tuple[str, float, Floats | None, Floats]]:
    """(name, true mean, values before or None, values after)."""
    for num, mean, (samples, correlation) in itertools.product(PROBLEMS, MEANS, KINDS_OF_ANSWERS):
        name = f"mean {mean:<5} {num:3} problems x {samples}, corr. {correlation}"
        yield name, mean, None, answers(rng, rates(rng, draws, num, mean, correlation), samples)
    for (what, change), num, size in itertools.product(CHANGED.items(), (10, 30, 100, 300), CHANGES):
        before, after, truth = change(rng, draws, num, size)
        yield f"difference, {what:9} {size:<4} {num:3} problems", truth, before, after


def rates(rng: np.random.Generator, draws: int, num: int, mean: float, correlation: float) -> Floats:
    """[draws, problems]: the chance that an answer to the problem is right."""
    if correlation == 0:
        return np.full((draws, num), mean)
    spread = 1 / correlation - 1
    return rng.beta(mean * spread, (1 - mean) * spread, (draws, num))


def answers(rng: np.random.Generator, rate: Floats, samples: int) -> Floats:
    return rng.binomial(samples, rate) / samples


def gain(rng: np.random.Generator, draws: int, num: int, size: float) -> tuple[Floats, Floats, float]:
    return np.zeros((draws, num)), answers(rng, rates(rng, draws, num, size, 0.5), 8), size


def harder(rng: np.random.Generator, draws: int, num: int, size: float) -> tuple[Floats, Floats, float]:
    rate = rng.beta(0.5, 0.5, (draws, num))
    return answers(rng, rate, 8), answers(rng, rate + size * (1 - rate), 8), size / 2


def both_ways(rng: np.random.Generator, draws: int, num: int, size: float) -> tuple[Floats, Floats, float]:
    moved, up = rng.random((draws, num)) < size, rng.random((draws, num)) < 0.7
    before = np.where(moved, np.where(up, 0.0, 1.0), 0.5)
    return before, np.where(moved, 1 - before, before), 0.4 * size


def rare_loss(rng: np.random.Generator, draws: int, num: int, size: float) -> tuple[Floats, Floats, float]:
    lost = rng.random((draws, num)) < size
    before = np.where(lost, 1.0, 0.5)
    return before, np.where(lost, 0.0, 0.5 + rng.integers(-1, 2, (draws, num)) / 8), -size


CHANGED: dict[str, Callable[[np.random.Generator, int, int, float], tuple[Floats, Floats, float]]] = {
    "gain": gain,
    "harder": harder,
    "both ways": both_ways,
    "rare loss": rare_loss,
}


def _measured(found: Sequence[Estimate], truth: float, scale: tuple[float, float]) -> tuple[float, float]:
    ends = np.array([(one["low"], one["high"]) for one in found])
    held = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
    return float(held), float((ends[:, 1].clip(*scale) - ends[:, 0].clip(*scale)).mean())


if __name__ == "__main__":
    main()
