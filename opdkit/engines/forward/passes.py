"""Which rows go through a model together. Pure functions of token ids, lengths and a budget: no clock, no free memory.

Two kinds of pass. Padded: rows side by side, filled up to the longest; the plan is the cheapest one, where a pass costs
its padded positions and a fixed number more. Packed: rows one behind the other in one line of positions, and what
several of them begin with only once (`prefix_tree`); nothing is padded, so the plan only has to be short.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdkit.engines.forward.prefix_tree import Ids, grow


@dataclass(frozen=True, slots=True)
class Passes:
    """How rows are put into passes. Positions are those that the model computes, padding included.

    max_tokens         positions of one pass; a single row that is longer goes alone
    fixed_tokens       what a padded pass costs whatever it reads, in positions: launches, and products too small to be
                       quick
    least_shared       what several rows begin with is read once if that saves so many positions; None: never
    """

    max_tokens: int
    fixed_tokens: int
    least_shared: int | None


# By kind of device: (max_tokens of a pass that scores, of one that learns, fixed_tokens, least_shared). Measured on a
# CPU by benchmarks/ragged_and_shared.py. Of the others reckoned: a launch-bound pass of 28 layers takes 20 ms, in
# which an H200 computes about 1000 positions of 1.7 billion parameters.
_DEFAULTS = {"cpu": (4096, 4096, 32, 64), "cuda": (65536, 32768, 1024, 256), "mps": (8192, 8192, 256, 128)}


def passes_on(device: str, *, learning: bool = False) -> Passes:
    """The defaults on a kind of device ("cpu", "cuda", "mps"; any other as CUDA)."""
    scoring_tokens, learning_tokens, fixed, least = _DEFAULTS.get(device, _DEFAULTS["cuda"])
    return Passes(learning_tokens if learning else scoring_tokens, fixed, least)


def plan_padded(lengths: Sequence[int], passes: Passes) -> list[list[int]]:
    """Rows of each pass, so that the sum of padded positions and fixed costs is the least of all plans.

    An optimal plan has neighbours of the sorted lengths together, so it is found by dynamic programming. The longest
    rows come first: what does not fit into memory shows at once. Equal lengths stay in order.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], -row))
    least = np.zeros(len(order) + 1, dtype=np.int64)  # cost of the first so many
    begins = np.zeros(len(order) + 1, dtype=np.int64)  # where the last pass of that plan begins
    for end in range(1, len(order) + 1):
        longest = max(1, lengths[order[end - 1]])
        starts = np.arange(max(0, end - max(1, passes.max_tokens // longest)), end)
        costs = least[starts] + (end - starts) * longest
        best = int(costs.argmin())
        least[end], begins[end] = costs[best] + passes.fixed_tokens, starts[best]
    plan, end = [], len(order)
    while end:
        plan.append(order[begins[end] : end][::-1])
        end = int(begins[end])
    return plan


def plan_packed(rows: Sequence[Ids], passes: Passes) -> list[list[int]]:
    """Rows of each pass: those that share a beginning together, in as few passes as a best fit finds."""
    units = _units(rows, passes)
    plan: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (positions left, number of the pass), sorted
    for size, unit in sorted(units, key=lambda sized: (-sized[0], sized[1])):
        place = bisect_left(rooms, (size, -1))
        if place == len(rooms):
            plan.append([])
            room, number = max(passes.max_tokens, size), len(plan) - 1
        else:
            room, number = rooms.pop(place)
        plan[number] += unit
        insort(rooms, (room - size, number))
    return [sorted(part) for part in plan]


def _units(rows: Sequence[Ids], passes: Passes) -> list[tuple[int, list[int]]]:
    """(positions, rows) of every tree of rows that share a beginning. One that is larger than a pass is cut, and what
    it shares is read again."""
    found: list[tuple[int, list[int]]] = []
    waiting = [list(range(len(rows)))]
    while waiting:
        some = waiting.pop()
        for size, members in grow([rows[row] for row in some], passes.least_shared).trees():
            unit = sorted(some[member] for member in members)
            if size > passes.max_tokens and len(unit) > 1:
                by_text = sorted(unit, key=lambda row: tuple(rows[row]))
                waiting += [by_text[: len(unit) // 2], by_text[len(unit) // 2 :]]
            else:
                found.append((size, unit))
    return found
