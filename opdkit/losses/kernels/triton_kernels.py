"""The elementwise mathematics of `head_loss` on a chunk of a head's output, as Triton kernels; `kernel.py` calls them.

    statistics   one program a row, one reading of both sides: normalisers, the student's entropy, both KL sums
    mixed_sums   the same for losses of a mixture m, whose sums need the normalisers first
    gradients    one program a tile: the gradient with respect to the student's output, written over it

All run in the dtype of the arrays (fp32; fp64 in tests), and add in a fixed order: no atomics. Raw outputs become
logits as in `Head.logits`: scaled, or capped by c tanh(. / c), and divided by the temperature. Each number of a head is
a constant of the kernel, since Triton rounds what is passed at run time to fp32.
Letters: n rows, V vocabulary; z student's and y teacher's logits, p and q their probabilities, m mixture, s share.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

# What is scored over the full vocabulary: nothing; (1 - s) forward + s reverse KL; losses of a mixture.
NOTHING, KL, JSD, SKEWED_FORWARD_KL, SKEWED_REVERSE_KL = (tl.constexpr(number) for number in range(5))
MAX_LOG_RATIO = tl.constexpr(80.0)  # as in divergence.py
LOWEST = tl.constexpr(-1e30)  # below any logit, and finite: 0 times it is 0


@triton.jit
def _tanh(x):
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _load(output_ptr, row, row_stride, ids, num_tokens, factor: tl.constexpr, cap: tl.constexpr, warmth: tl.constexpr):
    """Logits / temperature of some ids of a row, LOWEST beyond the vocabulary."""
    raw = tl.load(output_ptr + row * row_stride + ids, mask=ids < num_tokens, other=0.0)
    logits = _tanh(raw * (factor / cap)) * (cap / warmth) if cap > 0 else raw * (factor / warmth)
    return tl.where(ids < num_tokens, logits, LOWEST)


@triton.jit
def _gaps(student, teacher, share: tl.constexpr):
    """(log p - log m, log q - log m) for m = (1 - s) p + s q, from the nearer side."""
    ratio = tl.minimum(tl.maximum(teacher - student, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    if share <= 0.5:
        student_gap = -tl.log((1 - share) + share * tl.exp(ratio))
        teacher_gap = student_gap + ratio
    else:
        teacher_gap = -tl.log(share + (1 - share) * tl.exp(-ratio))
        student_gap = teacher_gap - ratio
    return student_gap, teacher_gap


@triton.jit
def _mixed(student, teacher, kind: tl.constexpr, share: tl.constexpr, scale: tl.constexpr):
    """(term, its derivative by log p) of an entry, for the losses of a mixture: `divergence.py`, entry by entry."""
    student_gap, teacher_gap = _gaps(student, teacher, share)
    if kind == JSD:
        gradient = tl.exp(student) * student_gap * (scale * (1 - share))
        term = gradient + tl.exp(teacher) * teacher_gap * (scale * share)
    elif kind == SKEWED_FORWARD_KL:
        term = tl.exp(teacher) * teacher_gap
        gradient = tl.exp(student_gap + teacher) * (share - 1)
    else:
        term = tl.exp(student) * student_gap
        gradient = term + tl.exp(teacher_gap + student) * share
    return term, gradient


@triton.jit
def statistics(
    student_ptr, teacher_ptr, found_ptr, num_tokens, student_stride, teacher_stride,
    s_factor: tl.constexpr, s_cap: tl.constexpr, t_factor: tl.constexpr, t_cap: tl.constexpr, warmth: tl.constexpr,
    with_teacher: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """[n, 5] per row: log sum e^z, entropy of p, log sum e^y, sum q (y - z), sum p (z - y).

    Every lane keeps a maximum and sums of its own, and they meet at the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    zero = tl.zeros([block], dtype=student_ptr.dtype.element_ty)
    z_max, z_sum, z_below, z_gap = zero + LOWEST, zero, zero, zero
    y_max, y_sum, y_gap = zero + LOWEST, zero, zero
    for start in range(0, num_tokens, block):
        ids = start + lanes
        z = _load(student_ptr, row, student_stride, ids, num_tokens, s_factor, s_cap, warmth)
        now = tl.maximum(z_max, z)
        shrink, weight = tl.exp(z_max - now), tl.where(ids < num_tokens, tl.exp(z - now), 0.0)
        z_below = (z_below + z_sum * (z_max - now)) * shrink + weight * (z - now)
        z_sum, z_max = z_sum * shrink + weight, now
        if with_teacher:
            y = _load(teacher_ptr, row, teacher_stride, ids, num_tokens, t_factor, t_cap, warmth)
            z_gap = z_gap * shrink + weight * (z - y)
            now = tl.maximum(y_max, y)
            shrink, weight = tl.exp(y_max - now), tl.where(ids < num_tokens, tl.exp(y - now), 0.0)
            y_sum, y_gap, y_max = y_sum * shrink + weight, y_gap * shrink + weight * (y - z), now
    best = tl.max(z_max, 0)
    weight = tl.exp(z_max - best)
    total = tl.sum(z_sum * weight, 0)
    below = tl.sum((z_below + z_sum * (z_max - best)) * weight, 0) / total
    tl.store(found_ptr + row * 5, best + tl.log(total))
    tl.store(found_ptr + row * 5 + 1, tl.log(total) - below)
    if with_teacher:
        tl.store(found_ptr + row * 5 + 4, tl.sum(z_gap * weight, 0) / total)
        best = tl.max(y_max, 0)
        weight = tl.exp(y_max - best)
        total = tl.sum(y_sum * weight, 0)
        tl.store(found_ptr + row * 5 + 2, best + tl.log(total))
        tl.store(found_ptr + row * 5 + 3, tl.sum(y_gap * weight, 0) / total)


@triton.jit
def mixed_sums(
    student_ptr, teacher_ptr, found_ptr, sums_ptr, num_tokens, student_stride, teacher_stride,
    s_factor: tl.constexpr, s_cap: tl.constexpr, t_factor: tl.constexpr, t_cap: tl.constexpr, warmth: tl.constexpr,
    kind: tl.constexpr, share: tl.constexpr, scale: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """[n, 2] per row: the sum of an entry's terms, and of their derivatives."""
    row = tl.program_id(0).to(tl.int64)
    z_norm, y_norm = tl.load(found_ptr + row * 5), tl.load(found_ptr + row * 5 + 2)
    value = tl.zeros([block], dtype=student_ptr.dtype.element_ty)
    slope = value
    for start in range(0, num_tokens, block):
        ids = start + tl.arange(0, block)
        z = _load(student_ptr, row, student_stride, ids, num_tokens, s_factor, s_cap, warmth)
        y = _load(teacher_ptr, row, teacher_stride, ids, num_tokens, t_factor, t_cap, warmth)
        term, gradient = _mixed(z - z_norm, y - y_norm, kind, share, scale)
        value += tl.where(ids < num_tokens, term, 0.0)
        slope += tl.where(ids < num_tokens, gradient, 0.0)
    tl.store(sums_ptr + row * 2, tl.sum(value, 0))
    tl.store(sums_ptr + row * 2 + 1, tl.sum(slope, 0))


@triton.jit
def gradients(
    student_ptr, teacher_ptr, found_ptr, coef_ptr, num_tokens, student_stride, teacher_stride,
    s_factor: tl.constexpr, s_cap: tl.constexpr, t_factor: tl.constexpr, t_cap: tl.constexpr, warmth: tl.constexpr,
    kind: tl.constexpr, share: tl.constexpr, scale: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """(coef * dd/da - p * total) times the slope of the soft cap, over the student's output. coef, total: [n, 2]."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * block + tl.arange(0, block)
    z = _load(student_ptr, row, student_stride, ids, num_tokens, s_factor, s_cap, warmth)
    student = z - tl.load(found_ptr + row * 5)
    prob = tl.exp(student)
    gradient = -prob * tl.load(coef_ptr + row * 2 + 1)
    if kind != NOTHING:
        y = _load(teacher_ptr, row, teacher_stride, ids, num_tokens, t_factor, t_cap, warmth)
        teacher = y - tl.load(found_ptr + row * 5 + 2)
        if kind == KL:
            wanted = prob * (student - teacher + 1) * share - tl.exp(teacher) * (1 - share)
        else:
            wanted = _mixed(student, teacher, kind, share, scale)[1]
        gradient += wanted * tl.load(coef_ptr + row * 2)
    if s_cap > 0:
        bent = z * (warmth / s_cap)
        gradient *= 1 - bent * bent
    tl.store(student_ptr + row * student_stride + ids, gradient, mask=ids < num_tokens)
