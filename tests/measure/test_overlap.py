"""Overlap numbers that can be done in the head. The published cases are in tests/parity/test_published_overlap.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opdkit.measure.overlap import (
    Compared,
    TokenTable,
    by_bucket,
    by_relative_position,
    default_k,
    mean_of,
    summary,
    token_table,
)


def compared(*tokens: tuple[list[float], list[float]], k: int = 2) -> Compared:
    """From the student's and the teacher's probabilities of a small vocabulary, token by token."""
    p_NV, q_NV = (np.array([token[side] for token in tokens]) for side in (0, 1))
    s_NK, t_NK = (np.argsort(-prob_NV, axis=1, kind="stable")[:, :k] for prob_NV in (p_NV, q_NV))
    p, q = np.log(p_NV), np.log(q_NV)
    return Compared(
        student_ids_NK=s_NK,
        student_logprob_NK=np.take_along_axis(p, s_NK, 1),
        teacher_at_student_NK=np.take_along_axis(q, s_NK, 1),
        teacher_ids_NK=t_NK,
        teacher_logprob_NK=np.take_along_axis(q, t_NK, 1),
        student_at_teacher_NK=np.take_along_axis(p, t_NK, 1),
        student_sampled_N=p[:, 0],
        teacher_sampled_N=q[:, 0],
        student_entropy_N=-(p_NV * p).sum(1),
        teacher_entropy_N=-(q_NV * q).sum(1),
        forward_kl_N=(q_NV * (q - p)).sum(1),
        reverse_kl_N=(p_NV * (p - q)).sum(1),
    )


def table_of(some: Compared, index: list[int] | None = None, length: int = 4) -> TokenTable:
    num = len(some.student_sampled_N)
    index_N = np.arange(num) if index is None else np.array(index)
    return token_table(some, row_N=np.zeros(num, dtype=np.int64), index_N=index_N, length_N=np.full(num, length))


ONE_SHARED = ([0.5, 0.3, 0.15, 0.05], [0.4, 0.1, 0.3, 0.2])  # S = {0, 1}, T = {0, 2}
NOTHING_SHARED = ([0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.5, 0.3])  # S = {0, 1}, T = {2, 3}
EQUAL = ([0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.15, 0.05])


def test_one_shared_id_of_two() -> None:
    """Half of the list is shared; the masses are both sides' probability of that one id."""
    got = summary(table_of(compared(ONE_SHARED)))
    assert got["ratio"] == 0.5
    assert got["mass_student"] == pytest.approx(0.5) and got["mass_teacher"] == pytest.approx(0.4)
    assert got["teacher_mass_on_student_top"] == pytest.approx(0.5)
    assert got["num_tokens"] == 1 and got["num_tokens_without_overlap"] == 0


def test_one_shared_id_under_three_definitions() -> None:
    """One id renormalised on itself is certain on both sides: 0 by the paper. verl: -0.4 log(0.4/0.5). thunlp:
    0.5/0.8 log(0.4/0.5)."""
    table = table_of(compared(ONE_SHARED))
    assert mean_of(table, "advantage") == pytest.approx(0.0, abs=1e-12)
    assert mean_of(table, "advantage_verl") == pytest.approx(-0.4 * math.log(0.8))
    assert mean_of(table, "advantage_thunlp") == pytest.approx(0.5 / 0.8 * math.log(0.8))


def test_equal_models_share_everything_and_differ_in_nothing() -> None:
    got = summary(table_of(compared(EQUAL)))
    assert got["ratio"] == got["top1_agreement"] == 1
    for name in ("advantage", "advantage_verl", "advantage_thunlp", "entropy_gap", "forward_kl", "reverse_kl"):
        assert got[name] == pytest.approx(0.0, abs=1e-12), name


def test_a_token_without_overlap_is_counted_and_leaves_the_masses() -> None:
    """Ratio: mean of 1/2 and 0. Masses and advantages: of the first token alone, not dragged to 0 by the second."""
    got = summary(table_of(compared(ONE_SHARED, NOTHING_SHARED)))
    assert got["ratio"] == 0.25 and got["num_tokens_without_overlap"] == 1
    assert got["mass_student"] == pytest.approx(0.5)
    nothing = summary(table_of(compared(NOTHING_SHARED)))
    assert nothing["ratio"] == 0 and nothing["mass_student"] is None and nothing["advantage"] is None


def test_thunlp_weighs_by_shared_entries() -> None:
    """A token with two shared ids counts twice beside one with one: a mean over entries, as its code takes it."""
    both = table_of(compared(ONE_SHARED, EQUAL))
    one = mean_of(table_of(compared(ONE_SHARED)), "advantage_thunlp")
    assert one is not None
    assert mean_of(both, "advantage_thunlp") == pytest.approx(one / 3)


def test_a_shorter_list_is_a_prefix() -> None:
    """The two likeliest of lists of four are the lists of two: one scoring serves every smaller k."""
    assert summary(table_of(compared(ONE_SHARED, k=4).first(2))) == summary(table_of(compared(ONE_SHARED, k=2)))


def test_buckets_are_positions_of_the_answer() -> None:
    """Positions 0 and 1023 are the first bucket, 1024 the second, 5000 the fifth; empty buckets are not there."""
    table = table_of(compared(EQUAL, EQUAL, ONE_SHARED, EQUAL), index=[0, 1023, 1024, 5000], length=5001)
    assert {bucket: len(part.row_N) for bucket, part in by_bucket(table).items()} == {
        (0, 1024): 2,
        (1024, 2048): 1,
        (4096, 5120): 1,
    }


def test_relative_position_is_the_midpoint() -> None:
    """The four tokens of an answer stand at 1/8, 3/8, 5/8, 7/8 (PW-OPSD: (i - 0.5) / n)."""
    table = table_of(compared(*[EQUAL] * 4))
    assert table.relative_N.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert list(by_relative_position(table, 2)) == [(0.0, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize(("num_ids", "k"), [(151_936, 16), (128, 16), (21, 4), (4, 4), (3, 3)])
def test_default_k_is_an_eighth_between_4_and_16(num_ids: int, k: int) -> None:
    assert default_k(num_ids) == k
