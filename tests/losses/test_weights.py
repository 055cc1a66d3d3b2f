"""Weights and selections: numbers one can do in the head, and what must not change them."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from opdkit.losses import group_return, weights

DOUBLE = {"dtype": torch.float64}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, **DOUBLE)


def rows(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def test_the_best_of_every_row_are_kept() -> None:
    """Half of 5 is 2, half of 2 is 1, half of 1 is still 1; among equals the earlier stays."""
    score_N = tensor(1, 5, 3, 5, 2, 7, 8, 0)
    kept_N = weights.keep_best(score_N, rows(5, 2, 1), 0.5)
    assert kept_N.nonzero().flatten().tolist() == [1, 3, 6, 7]
    assert weights.keep_best(tensor(4, 4, 4, 4), rows(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("length", "keep", "expected"), [(100, 0.29, 29), (10, 0.3, 3), (10, 0.7, 7), (3, 0.999, 2)])
def test_a_share_is_not_lost_to_rounding(length: int, keep: float, expected: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point; 29 tokens are kept."""
    assert int(weights.keep_best(torch.rand(length), rows(length), keep).sum()) == expected


def test_keeping_all_keeps_all() -> None:
    assert weights.keep_best(torch.randn(9), rows(4, 5), 1.0).all()


def test_a_row_is_kept_the_same_among_other_rows() -> None:
    """What a row keeps depends on its own scores alone. The scores of TIP do compare with the batch, by min and max."""
    score_N, row_N = torch.randn(30, generator=torch.Generator().manual_seed(1)), rows(12, 3, 15)
    alone_N = torch.cat([weights.keep_best(score_N[row_N == r], rows(int((row_N == r).sum())), 0.4) for r in range(3)])
    assert torch.equal(weights.keep_best(score_N, row_N, 0.4), alone_N)


def test_soft_or_by_hand() -> None:
    """Entropies 0, 1, 2 and divergences 4, 2, 0 map to h = 0, .5, 1 and d = 1, .5, 0; h + d - h d = 1, .75, 1."""
    assert weights.soft_or(tensor(0, 1, 2), tensor(4, 2, 0), 1.0).tolist() == [1.0, 0.75, 1.0]
    assert weights.confident_and_wrong(tensor(0, 1, 2), tensor(4, 2, 6), 1.0).tolist() == [4.0, 1.0, 0.0]


def test_entropy_is_cut_at_its_percentile() -> None:
    """Of 0, 1, 2, 3, 100 the 0.75-quantile is 3: the outlier no longer squeezes the others together."""
    got = weights.clipped_entropy(tensor(0, 1, 2, 3, 100), 0.75)
    assert got.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_quantile_is_linear_between_neighbours() -> None:
    """As numpy and torch define it; without torch's limit on the number of values."""
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0), **DOUBLE)
    for share in (0.0, 0.123, 0.5, 0.98, 1.0):
        assert weights.quantile(values, share).item() == pytest.approx(torch.quantile(values, share).item(), abs=1e-15)
    assert weights.quantile(tensor(3), 0.4) == 3 and weights.quantile(tensor(), 0.4).isnan()


def test_equal_values_have_no_interval() -> None:
    """All entropies equal: nothing stands out, 0 for all, and no division by zero."""
    assert weights.unit_interval(tensor(2, 2, 2)).tolist() == [0, 0, 0]


def test_draws_follow_their_propensity() -> None:
    """One of three tokens drawn 4000 times with propensities 1 : 2 : 5, within three standard errors; two of three
    without replacement: the first token stays out with probability 2/8 5/6 + 5/8 2/3 = 0.625."""
    propensity = tensor(1, 2, 5)
    first = torch.stack([weights.draw(propensity, rows(3), 0.34, [seed]) for seed in range(4000)]).double().mean(0)
    assert first.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=3 * 0.0077)
    pair = torch.stack([weights.draw(propensity, rows(3), 0.67, [seed]) for seed in range(4000)]).double().mean(0)
    assert 1 - pair[0].item() == pytest.approx(0.625, abs=3 * 0.0077)


def test_a_draw_belongs_to_its_row() -> None:
    """The same seed draws the same tokens, alone or behind another row; another seed draws others."""
    propensity = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    alone = weights.draw(propensity[10:], rows(30), 0.5, [7])
    assert torch.equal(weights.draw(propensity, rows(10, 30), 0.5, [1, 7])[10:], alone)
    assert not torch.equal(weights.draw(propensity[10:], rows(30), 0.5, [8]), alone)


def test_position_by_hand() -> None:
    """tau = u of the middle token of three: the sigmoid is 1/2 there, so w = 0.2 + 0.8 / 2."""
    got = weights.position(rows(3, 1), 0.2, 0.5, 0.1, mean_one=False, dtype=torch.float64)
    edge = 1 / (1 + exp((1 / 3) / 0.1))
    assert got.tolist() == pytest.approx([0.2 + 0.8 * edge, 0.6, 0.2 + 0.8 * (1 - edge), 0.6])


def test_position_with_mean_one() -> None:
    """In every row the weights have mean 1 and keep their ratios; a row of one token has weight 1."""
    plain, scaled = (
        weights.position(rows(7, 1, 4), 0.25, 0.3, 0.1, mean_one=m, dtype=torch.float64) for m in (False, True)
    )
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        assert scaled[part].mean().item() == pytest.approx(1)
        torch.testing.assert_close(scaled[part] / scaled[part][0], plain[part] / plain[part][0])


def test_importance_by_hand() -> None:
    """Ratios 1/2, 4 and 1 capped at 2 are 1/2, 2, 1, of mean 3.5 / 3; of whole rows 2 and 1, capped at 1.5."""
    log_ratio, row_N = tensor(log(0.5), log(4), 0), rows(2, 1)
    by_token = weights.importance(log_ratio, row_N, "token", 2.0, mean_one=False)
    assert by_token.tolist() == pytest.approx([0.5, 2, 1])
    by_row = weights.importance(log_ratio, row_N, "sequence", 1.5, mean_one=False)
    assert by_row.tolist() == pytest.approx([1.5, 1.5, 1])
    scaled = weights.importance(log_ratio, row_N, "token", 2.0, mean_one=True)
    assert scaled.tolist() == pytest.approx([0.5 / (3.5 / 3), 2 / (3.5 / 3), 1 / (3.5 / 3)])
    by_row = weights.importance(log_ratio, row_N, "sequence", 9.0, mean_one=True)  # rows 2 and 1 have mean 1.5
    assert by_row.tolist() == pytest.approx([4 / 3, 4 / 3, 2 / 3])


def test_prefix_by_hand() -> None:
    """Disagreements 1, 2, 1 of 4: what lies before is 0, 1/4, 3/4. An answer without any has 1 + gamma throughout."""
    got = weights.prefix(tensor(1, -2, 1, 0, 0), rows(3, 2), 0.8)
    assert got.tolist() == pytest.approx([1.8, 1 + 0.8 * 0.75, 1 + 0.8 * 0.25, 1.8, 1.8])


def test_prefix_does_not_lose_digits_to_earlier_rows() -> None:
    """float32 gaps behind 200 000 tokens of other rows weigh as they do alone: sums over the batch are in float64."""
    gap_N = torch.rand(200_020, generator=torch.Generator().manual_seed(0))
    together = weights.prefix(gap_N, rows(200_000, 20), 1.0)[-20:]
    torch.testing.assert_close(together, weights.prefix(gap_N[-20:], rows(20), 1.0), rtol=1e-6, atol=1e-6)


def test_beta_kernel_and_its_mean() -> None:
    """p = 0, 1/2, 1/2 at alpha = beta = 1: weights 0, 1/4, 1/4. Over two problems, the second with two rows, the mean
    is 1/8, so they become 0 and 2. All zeros stay zeros."""
    weight_R = weights.beta_kernel(tensor(0, 0.5, 0.5), 1.0, 1.0)
    assert weight_R.tolist() == [0, 0.25, 0.25]
    group_R = torch.tensor([0, 1, 1])
    assert weights.mean_one_per_problem(weight_R, group_R).tolist() == [0, 2, 2]
    assert weights.mean_one_per_problem(tensor(0, 0, 0), group_R).tolist() == [0, 0, 0]


def test_reward_softmax_by_hand() -> None:
    """Rewards 1 and 0 at temperature 1 / ln 3 weigh 3 : 1, so 1.5 and 0.5; an answer alone in its problem weighs 1; a
    tiny temperature gives all to the best, without overflow."""
    reward_R, group_R = tensor(1, 0, 1), torch.tensor([0, 0, 1])
    assert weights.reward_softmax(reward_R, group_R, 1 / log(3)).tolist() == pytest.approx([1.5, 0.5, 1])
    assert weights.reward_softmax(reward_R, None, 1 / log(3)).tolist() == pytest.approx([9 / 7, 3 / 7, 9 / 7])
    assert weights.reward_softmax(reward_R, group_R, 1e-9).tolist() == [2, 0, 1]


def test_group_return_by_hand() -> None:
    """Token rewards (1, 3) and (5) of one problem have mean 3: centred -2, 0, 2; summed to the end -2, 0 and 2."""
    got = group_return(tensor(1, 3, 5), rows(2, 1), torch.tensor([0, 0]), "none")
    assert got.tolist() == pytest.approx([-2, 0, 2])
