"""Masks, weights, coefficients: the only place that divides."""

from __future__ import annotations

import pytest
import torch

from opdkit.losses import token_coefficients

# Three rows of 3, 1 and 2 tokens; the last row has no counted token, the first has two.
ROW = torch.tensor([0, 0, 0, 1, 2, 2])
MASK = torch.tensor([True, False, True, True, False, False])
WEIGHT = torch.tensor([2.0, 9.0, 4.0, 1.0, 9.0, 9.0])


def test_reductions_by_hand() -> None:
    """3 counted tokens in 2 rows: token means divide by 3, row means by 2 and 1 and then by 2. Weights multiply and
    leave the denominator alone; a masked token, and a row without counted tokens, leave it."""
    for per, expected in (
        ("token", [2 / 3, 0, 4 / 3, 1 / 3, 0, 0]),
        ("sequence", [2 / 4, 0, 4 / 4, 1 / 2, 0, 0]),
        ("sequence_sum", [2 / 2, 0, 4 / 2, 1 / 2, 0, 0]),
        ("sum", [2, 0, 4, 1, 0, 0]),
    ):
        assert token_coefficients(MASK, WEIGHT, ROW, per=per).tolist() == pytest.approx(expected)
    assert token_coefficients(MASK, WEIGHT, ROW, per="constant", divide_by=8).tolist() == [0.25, 0, 0.5, 0.125, 0, 0]
    assert token_coefficients(MASK, None, ROW, per="token").tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0, 0])


def test_a_weight_of_0_dilutes() -> None:
    """2 more tokens of weight 0 in 2 more rows make 3 tokens into 5, and 2 rows into 4: what is here counts less, in
    the same proportions."""
    mask, weight = torch.cat([MASK, torch.tensor([True, True])]), torch.cat([WEIGHT, torch.zeros(2)])
    row = torch.cat([ROW, torch.tensor([3, 4])])
    for per, expected in (
        ("token", [2 / 5, 0, 4 / 5, 1 / 5, 0, 0, 0, 0]),
        ("sequence", [2 / 8, 0, 4 / 8, 1 / 4, 0, 0, 0, 0]),
        ("sequence_sum", [2 / 4, 0, 4 / 4, 1 / 4, 0, 0, 0, 0]),
    ):
        assert token_coefficients(mask, weight, row, per=per).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("per", ["token", "sequence", "sequence_sum"])
def test_nothing_counted(per: str) -> None:
    """No counted token anywhere, or no token at all, gives zeros, not 0/0."""
    assert token_coefficients(torch.zeros(6, dtype=torch.bool), WEIGHT, ROW, per=per).tolist() == [0.0] * 6
    assert token_coefficients(MASK[:0], None, ROW[:0], per=per).tolist() == []


def test_masked_unknown_weight_is_not_read() -> None:
    """A NaN weight under a False mask does not spread."""
    weight = torch.where(MASK, WEIGHT, torch.nan)
    assert not token_coefficients(MASK, weight, ROW, per="sequence").isnan().any()


def test_dtype() -> None:
    """float32 by default, float64 for float64 weights."""
    assert token_coefficients(MASK, None, ROW, per="token").dtype == torch.float32
    assert token_coefficients(MASK, WEIGHT.double(), ROW, per="sequence").dtype == torch.float64


def test_refusals() -> None:
    """A constant without its number, a number without use, a mask that is no mask, arrays of different length."""
    with pytest.raises(ValueError, match="divide_by = None"):
        token_coefficients(MASK, None, ROW, per="constant")
    with pytest.raises(ValueError, match="divide_by = 3"):
        token_coefficients(MASK, None, ROW, per="token", divide_by=3)
    with pytest.raises(ValueError, match="must be above 0"):
        token_coefficients(MASK, None, ROW, per="constant", divide_by=0)
    with pytest.raises(ValueError, match="must be bool"):
        token_coefficients(WEIGHT, None, ROW, per="token")
    with pytest.raises(ValueError, match="as long as"):
        token_coefficients(MASK, WEIGHT[:5], ROW, per="token")
