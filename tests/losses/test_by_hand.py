"""Numbers one can do in the head, and properties that follow from the definitions."""

from __future__ import annotations

from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from opdkit.losses import Divergence, PolicyGradient, Support, group_centred, logprobs, teacher_minus_student
from opdkit.losses.divergence import Sides, divergence, mixture_gaps
from opdkit.losses.support import Entries, TargetScores, select
from opdkit.losses.surrogate import negative_log_likelihood, policy_gradient, teacher_advantage
from opdkit.losses.tail import apply_tail


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def score(spec: Divergence, student: list[float], teacher: list[float]) -> tuple[float, list[float]]:
    """(value, gradient with respect to log p) of one token over all its entries."""
    ids = None if spec.support.kind == "full" else torch.arange(len(student))[None]
    value, gradient, _ = divergence(spec, Entries(ids, logs(student), logs(teacher)))
    return value.item(), gradient()[0].tolist()


def test_divergences_between_two_coins() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(q || p) = 1/4 ln 1/2 + 3/4 ln 3/2, KL(p || q) = 1/2 ln 4/3, and halves of the
    two against m = (3/8, 5/8) for the JSD. The gradients are -q, p (ln p/q + 1), (1 - s) p ln p/m."""
    p, q = [0.5, 0.5], [0.25, 0.75]
    assert score(Divergence("forward_kl"), p, q) == (
        pytest.approx(0.25 * log(0.5) + 0.75 * log(1.5)),
        pytest.approx([-0.25, -0.75]),
    )
    assert score(Divergence("reverse_kl"), p, q) == (
        pytest.approx(0.5 * log(4 / 3)),
        pytest.approx([0.5 * (log(2) + 1), 0.5 * (log(2 / 3) + 1)]),
    )
    to_student = 0.5 * log(4 / 3) + 0.5 * log(4 / 5)
    to_teacher = 0.25 * log(2 / 3) + 0.75 * log(6 / 5)
    published = Divergence("jsd", teacher_share=0.5, scale="published")
    assert score(published, p, q)[0] == pytest.approx((to_student + to_teacher) / 2)
    assert score(published, p, q)[1] == pytest.approx([0.25 * log(4 / 3), 0.25 * log(4 / 5)])
    assert score(Divergence("jsd", teacher_share=0.5), p, q)[0] == pytest.approx(2 * (to_student + to_teacher))
    assert score(Divergence("skewed_forward_kl", teacher_share=0.5), p, q)[0] == pytest.approx(to_teacher)
    assert score(Divergence("skewed_reverse_kl", teacher_share=0.5), p, q)[0] == pytest.approx(to_student)


def test_ends_of_the_mixture() -> None:
    """teacher_share 0 makes the continuous JSD and the skewed forward KL forward_kl, KL(teacher || student); 1 makes
    the JSD and the skewed reverse KL reverse_kl. The published JSD is nearly nothing near either end."""
    p, q = [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]
    forward, reverse = score(Divergence("forward_kl"), p, q), score(Divergence("reverse_kl"), p, q)
    assert score(Divergence("jsd", teacher_share=0.0), p, q) == forward
    assert score(Divergence("jsd", teacher_share=1.0), p, q) == reverse
    assert score(Divergence("skewed_forward_kl", teacher_share=0.0), p, q)[0] == pytest.approx(forward[0])
    assert score(Divergence("skewed_reverse_kl", teacher_share=1.0), p, q)[0] == pytest.approx(reverse[0])
    assert score(Divergence("jsd", teacher_share=1e-6), p, q)[0] == pytest.approx(forward[0], rel=1e-5)
    assert score(Divergence("jsd", teacher_share=1 - 1e-6), p, q)[0] == pytest.approx(reverse[0], rel=1e-5)
    assert score(Divergence("jsd", teacher_share=1e-6, scale="published"), p, q)[0] < 1e-6


def test_continuous_jsd_is_exact_in_fp32_near_its_ends() -> None:
    """At teacher_share 1e-4, where the textbook form loses four digits to cancellation, fp32 is within 1e-5 of fp64."""
    student, teacher = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    for share in (1e-4, 1 - 1e-4):
        spec = Divergence("jsd", teacher_share=share)
        exact, single = (
            divergence(spec, Entries(None, student.to(d), teacher.to(d)))[0] for d in (torch.float64, torch.float32)
        )
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["jsd", "skewed_forward_kl", "skewed_reverse_kl"])
def test_mixtures_of_far_apart_sides_stay_finite(kind: str) -> None:
    """Log-ratios of +-300 nats, beyond the range of exp in fp32, give finite values and gradients; each side's gap to
    the mixture is then the log of its share, ln 1/(1 - s) and ln 1/s."""
    far = torch.tensor([[-300.0, 0.0]]), torch.tensor([[0.0, -300.0]])
    value, gradient, _ = divergence(Divergence(kind, teacher_share=0.3), Entries(None, *far))
    assert value.isfinite().all() and gradient().isfinite().all()
    gaps = mixture_gaps(Sides(*far, None, None), 0.3)
    assert gaps[0][0, 1].item() == pytest.approx(-log(0.7)) and gaps[1][0, 0].item() == pytest.approx(-log(0.3))


def test_published_entry_clip_reverses_the_gradient() -> None:
    """The worked example of why `entry_clip` is not a default: with the clip at 0.05 the teacher's favourite token gets
    a positive logit gradient (its probability falls), without it a negative one."""
    student, teacher = [0.5, 0.3, 0.2], [0.9, 0.06, 0.04]
    for clip, expected in ((None, [-0.4, 0.24, 0.16]), (0.05, [0.05, -0.03, -0.02])):
        grad = torch.tensor(score(Divergence("forward_kl", entry_clip=clip), student, teacher)[1])
        logit_grad = grad - torch.tensor(student) * grad.sum()
        torch.testing.assert_close(logit_grad, torch.tensor(expected))


def test_tails() -> None:
    """Entries (1/2, 1/4) of a distribution: the bucket adds 1/4, renormalising gives (2/3, 1/3), drop adds nothing."""
    student, teacher = logs([0.5, 0.25]), logs([0.2, 0.2])
    for tail, p, q in (
        ("bucket", [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]),
        ("renormalise", [2 / 3, 1 / 3], [0.5, 0.5]),
        ("renormalise_teacher", [0.5, 0.25], [0.5, 0.5]),
        ("drop", [0.5, 0.25], [0.2, 0.2]),
    ):
        got = apply_tail(tail, student, teacher)
        assert got[0].exp()[0].tolist() == pytest.approx(p) and got[1].exp()[0].tolist() == pytest.approx(q)


def test_bucket_makes_a_lower_bound() -> None:
    """The divergence with a bucket is positive and at most the full one; without the tail it may be negative."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 20, 30, generator=random, dtype=torch.float64).log_softmax(-1)
    ids = teacher.topk(4, -1).indices
    for kind in ("forward_kl", "reverse_kl"):
        full = divergence(Divergence(kind), Entries(None, student, teacher))[0]
        entries = Entries(ids, student.gather(-1, ids), teacher.gather(-1, ids))
        bucket = divergence(Divergence(kind, Support("teacher_topk", 4)), entries)[0]
        assert (bucket > 0).all() and (bucket <= full).all()
    dropped = divergence(Divergence("reverse_kl", Support("teacher_topk", 4), "drop"), entries)[0]
    assert (dropped < 0).any()


def test_full_mass_inside_meets_the_published_clamp() -> None:
    """If the support holds all the mass, the bucket is 1 - exp(-1e-7), finite, and gives no gradient."""
    student, teacher, through = apply_tail("bucket", logs([0.5, 0.5]), logs([0.25, 0.75]))
    assert student[0, 2].exp().item() == pytest.approx(1e-7, rel=1e-6)
    assert teacher[0, 2].isfinite()
    assert through(torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)).abs().max() == 0


def test_supports() -> None:
    """Student's two best of four entries are {0, 1}, the teacher's {1, 2}; the union counts entry 1 once."""
    student, teacher = logs([0.5, 0.3, 0.15, 0.05]), logs([0.1, 0.4, 0.3, 0.2])
    for kind, expected in (
        ("student_topk", {0, 1}),
        ("teacher_topk", {1, 2}),
        ("union", {0, 1, 2}),
        ("intersection", {1}),
        ("symmetric_difference", {0, 2}),
    ):
        entries = select(Support(kind, 2), student, None, TargetScores(teacher), torch.tensor([3]))
        assert entries.ids_nE is not None and entries.teacher_nE is not None
        valid = torch.ones_like(entries.ids_nE, dtype=torch.bool) if entries.valid_nE is None else entries.valid_nE
        ids = entries.ids_nE[valid].tolist()
        assert len(ids) == len(set(ids)) and set(ids) == expected
        assert entries.student_nE[valid].tolist() == student[0, ids].tolist()
        assert entries.teacher_nE[valid].tolist() == teacher[0, ids].tolist()
    sampled = select(Support("sampled"), student, None, TargetScores(teacher), torch.tensor([3]))
    assert sampled.student_nE.item() == log(0.05) and sampled.teacher_nE is not None
    assert sampled.teacher_nE.item() == log(0.2)


@pytest.mark.parametrize("size", [31, 1000, 1024, 4099])
def test_topk_by_groups_is_exact(size: int) -> None:
    """Top-k through column groups finds what sorting the row finds, in falling order, remainder columns included."""
    row = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    row[0, -1], row[1, 0] = 99.0, 99.0
    for k in (1, 3, 7, min(size, 40)):
        got, wanted = logprobs.topk(row, k), row.topk(k, dim=-1)
        assert got[0].equal(wanted.values) and got[1].equal(wanted.indices)


def test_surrogates() -> None:
    """-a with slope -1; -A a with slope -A, A = b - a held constant."""
    student, teacher = torch.tensor([-2.0, -0.5]), torch.tensor([-1.0, -1.0])
    value, gradient = negative_log_likelihood(student)
    assert value.tolist() == [2.0, 0.5] and gradient().tolist() == [-1.0, -1.0]
    value, gradient = teacher_advantage(student, teacher)
    assert value.tolist() == [2.0, -0.25] and gradient().tolist() == [-1.0, 0.5]


def test_ppo_clip_and_dual_clip() -> None:
    """Ratios 2, 1/2, 1 and 5 under clip 0.2 and dual clip 3. A good token stops counting above 1.2 and a bad one below
    0.8; on the other side the ratio stays free, for a bad token up to 3."""
    spec = PolicyGradient(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0, 5.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    old = torch.full((6,), -3.0, dtype=torch.float64)
    value, gradient = policy_gradient(spec, old + ratio.log(), advantage, old)
    assert value.tolist() == pytest.approx([-1.2, -0.5, 2.0, 0.8, -1.0, 3.0])
    assert gradient().tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0, -1.0, 0.0])
    assert policy_gradient(PolicyGradient(), old, advantage, None)[0].tolist() == (3 * advantage).tolist()
    one_sided = policy_gradient(PolicyGradient(clip_high=0.2), old + ratio.log(), advantage, old)[0]
    assert one_sided.tolist() == pytest.approx([-1.2, -0.5, 2.0, 0.5, -1.0, 5.0])


def test_ratio_cannot_overflow() -> None:
    """A log-ratio of 100 counts as exp(20), as published, and gives no gradient."""
    student, old, advantage = torch.tensor([0.0]), torch.tensor([-100.0]), torch.tensor([-1.0])
    value, gradient = policy_gradient(PolicyGradient(), student, advantage, old)
    assert value.item() == pytest.approx(exp(20), rel=1e-5) and value.item() < inf
    assert gradient().item() == 0.0


def test_group_advantages() -> None:
    """Rewards 1, 0, 0 have mean 1/3 and unbiased standard deviation 1/sqrt(3); a group of one keeps its reward."""
    reward, group = torch.tensor([1.0, 5.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([0, 1, 0, 0])
    assert group_centred(reward, group, "none").tolist() == pytest.approx([2 / 3, 5, -1 / 3, -1 / 3])
    root = 3**0.5
    assert group_centred(reward, group, "unbiased").tolist() == pytest.approx(
        [2 / root, 5, -1 / root, -1 / root], rel=1e-5
    )
    assert group_centred(torch.ones(3), torch.zeros(3, dtype=torch.long), "unbiased").tolist() == [0, 0, 0]
    assert teacher_minus_student(torch.tensor([-1.0]), torch.tensor([-3.0], requires_grad=True)).tolist() == [2.0]
