"""Which rows are read together: plans are the cheapest, share what pays, and depend on rows and budget alone."""

from itertools import pairwise

import numpy as np
import pytest

from opdkit.engines.forward.passes import Passes, passes_on, plan_packed, plan_padded
from opdkit.engines.forward.prefix_tree import Forest, grow


def log_normal(num: int, seed: int) -> list[int]:
    """Lengths of answers between 20 and 500."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(np.log(110), 0.8, num)).clip(20, 500).astype(int).tolist()


def cost(plan: list[list[int]], lengths: list[int], passes: Passes) -> int:
    return sum(len(part) * max(lengths[row] for row in part) + passes.fixed_tokens for part in plan)


@pytest.mark.parametrize(
    "passes", [Passes(30, 1, None), Passes(30, 8, None), Passes(9, 3, None), Passes(300, 40, None)]
)
def test_no_cut_of_the_sorted_lengths_is_cheaper(passes: Passes) -> None:
    """Against all 2**9 ways to cut ten sorted lengths, within the budget; a longer row alone."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths = rng.integers(1, 14, 10).tolist()
        order = sorted(range(10), key=lengths.__getitem__)
        costs = []
        for bits in range(2**9):
            cuts = [0, *(place + 1 for place in range(9) if bits >> place & 1), 10]
            plan = [order[a:b] for a, b in pairwise(cuts)]
            if all(len(p) == 1 or len(p) * max(lengths[r] for r in p) <= passes.max_tokens for p in plan):
                costs.append(cost(plan, lengths, passes))
        plan = plan_padded(lengths, passes)
        assert sorted(row for part in plan for row in part) == list(range(10))
        assert cost(plan, lengths, passes) == min(costs)
        longest = [max(lengths[row] for row in part) for part in plan]
        assert longest == sorted(longest, reverse=True)  # what does not fit into memory shows at once


@pytest.mark.parametrize(("num", "most"), [(64, 1.05), (1024, 1.02)])
def test_padding_of_ragged_answers(num: int, most: float) -> None:
    """Of a CPU's constants, for scoring and learning."""
    for seed in range(5):
        lengths = log_normal(num, seed)
        for learning in (False, True):
            plan = plan_padded(lengths, passes_on("cpu", learning=learning))
            assert sum(len(part) * max(lengths[row] for row in part) for part in plan) <= most * sum(lengths)


def test_the_plan_does_not_depend_on_the_order() -> None:
    """The lengths that are read together are the same in every order of the rows."""
    lengths = log_normal(64, 0)
    rows = [list(range(row * 1000, row * 1000 + length)) for row, length in enumerate(lengths)]
    turned = np.random.default_rng(1).permutation(64).tolist()
    passes = Passes(2048, 32, 64)
    for plan, again in (
        (plan_padded(lengths, passes), plan_padded([lengths[row] for row in turned], passes)),
        (plan_packed(rows, passes), plan_packed([rows[row] for row in turned], passes)),
    ):
        assert [sorted(lengths[r] for r in p) for p in plan] == [sorted(lengths[turned[r]] for r in p) for p in again]


def test_packed_passes_are_full_and_keep_families_together() -> None:
    """Siblings share a pass while it holds them; a family that is larger than a pass is cut; no pass is above the
    budget but that of one long row; and there are hardly more passes than positions need."""
    rng = np.random.default_rng(0)
    rows: list[list[int]] = []
    for family in range(6):
        prompt = [family, *rng.integers(0, 99, 80).tolist()]
        rows += [[*prompt, *rng.integers(0, 99, length).tolist()] for length in (20, 5, 60, 33)]
    rows.append(rng.integers(0, 99, 500).tolist())
    passes = Passes(400, 1, 32)
    plan = plan_packed(rows, passes)
    assert sorted(row for part in plan for row in part) == list(range(25))
    sizes = [len(grow([rows[row] for row in part], 32).ids_T) for part in plan]
    assert sizes[0] == 500 and all(size <= 400 for size in sizes[1:])
    assert all(len({row // 4 for row in part if row < 24}) * 4 == len(part) for part in plan[1:])
    assert len(plan) == 1 + 3  # two families of 199 positions in each
    assert [len(part) for part in plan_packed(rows[:4], Passes(198, 1, 32))] == [2, 2]
    assert len(plan_packed(rows[:4], Passes(10, 1, 32))) == 4


# Trees


def readable(forest: Forest, column: int) -> list[int]:
    return [k for k in range(column + 1) if column < forest.reads_until_T[k]]


@pytest.mark.parametrize("least", [None, 1, 3, 10])
def test_every_row_is_in_its_tree(least: int | None) -> None:
    """Tokens, positions, and what a token reads: exactly the tokens of its own row before it."""
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [[1, 2, 3]]
    for _ in range(30):  # random families, some rows equal, some the beginning of others
        begun = rows[rng.integers(len(rows))]
        rows.append([*begun[: rng.integers(1, len(begun) + 1)], *rng.integers(0, 3, rng.integers(0, 9)).tolist()])
    forest = grow(rows, least)
    for row, ids in enumerate(rows):
        columns = forest.columns(row)
        assert forest.ids_T[columns].tolist() == ids
        assert forest.position_T[columns].tolist() == list(range(len(ids)))
        assert readable(forest, columns[-1]) == columns.tolist()
    assert sum(size for size, _ in forest.trees()) == len(forest.ids_T)
    assert sorted(row for _, members in forest.trees() for row in members) == list(range(31))
    if least is None:
        assert len(forest.ids_T) == sum(map(len, rows))
    if least == 1:  # a trie
        assert len(forest.ids_T) == len({tuple(ids[: end + 1]) for ids in rows for end in range(len(ids))})


def test_what_does_not_pay_is_not_shared() -> None:
    """Four tokens saved three times are twelve."""
    rows = [[7, 7, 7, 7, row, 1, 2] for row in range(4)]
    assert len(grow(rows, 12).ids_T) == 4 + 4 * 3
    assert len(grow(rows, 13).ids_T) == 4 * 7


def test_a_long_chain_of_turns() -> None:
    """Every row goes on where the one before it stopped, 1500 times: a tree deeper than Python's stack."""
    text = np.random.default_rng(0).integers(0, 50, 3000).tolist()
    rows = [text[: 2 * turn + 2] for turn in range(1500)]
    forest = grow(rows, 1)
    assert len(forest.ids_T) == 3000 and forest.ids_T[forest.columns(1499)].tolist() == text
