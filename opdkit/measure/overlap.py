"""Do student and teacher look at the same tokens? Overlap, mass, advantage, entropy gap and divergence, by position.

After "Rethinking On-Policy Distillation" (arXiv:2604.13016), for every method: the numbers need both models' lists of
likeliest ids at the answer's positions, whatever the loss reads. At a token let p be the student's and q the teacher's
distribution, S and T their k likeliest ids, I what is in both:

    ratio            |I| / k, mean over tokens
    mass_student     p(I), mass_teacher q(I), mean over tokens where I is not empty
    advantage        three definitions, see `ADVANTAGES`; the paper's unless a name says otherwise
    entropy_gap      |H(q) - H(p)|; forward_kl KL(q || p) and reverse_kl KL(p || q) over the full vocabulary

`token_table` turns lists into a few numbers a token; all else is a mean over such numbers, so a table can be cut
another way (buckets, relative position, right and wrong answers) without a model. NaN: not defined at that token.

Letters: N tokens, K entries of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BUCKET_TOKENS = 1024  # of the paper's figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Both models on N answer tokens, nats over the full vocabulary: the arrays of `losses.Comparison`."""

    student_ids_NK: Ints  # S, likeliest first
    student_logprob_NK: Floats  # log p of S
    teacher_at_student_NK: Floats  # log q of S
    teacher_ids_NK: Ints  # T
    teacher_logprob_NK: Floats  # log q of T
    student_at_teacher_NK: Floats  # log p of T
    student_sampled_N: Floats  # log p of the token that stands there
    teacher_sampled_N: Floats
    student_entropy_N: Floats
    teacher_entropy_N: Floats
    forward_kl_N: Floats
    reverse_kl_N: Floats

    def first(self, k: int) -> Compared:
        """With lists of the k likeliest only."""
        cut = {f.name: getattr(self, f.name)[:, :k] for f in fields(self) if f.name.endswith("NK")}
        return Compared(**{f.name: cut.get(f.name, getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """One after the other; lists of one length."""
        return Compared(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @property
    def k(self) -> int:
        return self.student_ids_NK.shape[1]

    def shared(self) -> tuple[Bools, Bools]:
        """([N, K] which entries of S are in T, [N, K] which of T are in S)."""
        equal_NKK = self.student_ids_NK[:, :, None] == self.teacher_ids_NK[:, None, :]
        return equal_NKK.any(2), equal_NKK.any(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """Numbers of N tokens, a column a quantity, and where each token stands. This is what is saved."""

    row_N: Ints  # which answer, from 0
    index_N: Ints  # position in its answer, from 0
    length_N: Ints  # tokens of its answer
    columns: Mapping[str, Floats]

    def where(self, chosen_N: Bools) -> TokenTable:
        return TokenTable(
            row_N=self.row_N[chosen_N],
            index_N=self.index_N[chosen_N],
            length_N=self.length_N[chosen_N],
            columns={name: values_N[chosen_N] for name, values_N in self.columns.items()},
        )

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> TokenTable:
        """One after the other; rows keep their numbers."""
        return TokenTable(
            row_N=np.concatenate([t.row_N for t in tables]),
            index_N=np.concatenate([t.index_N for t in tables]),
            length_N=np.concatenate([t.length_N for t in tables]),
            columns={name: np.concatenate([t.columns[name] for t in tables]) for name in tables[0].columns},
        )

    @property
    def relative_N(self) -> Floats:
        """(i - 0.5) / n of the i-th of n tokens: PW-OPSD's relative position."""
        return (self.index_N + 0.5) / self.length_N


def token_table(
    compared: Compared,
    *,
    row_N: Ints,
    index_N: Ints,
    length_N: Ints,
    k: int | None = None,
    masses_at: Sequence[int] = (),
) -> TokenTable:
    """What is kept of the lists. Lists need memory of N k^2 bytes here: hand over a part of the tokens at a time.

    k: of the overlap; None: all that is listed. masses_at: the three masses of lists also at these lengths.
    """
    lists = {
        "student_top_mass": compared.student_logprob_NK,
        "teacher_top_mass": compared.teacher_logprob_NK,
        "teacher_mass_on_student_top": compared.teacher_at_student_NK,
    }
    masses = {
        f"{name}@{most}": np.exp(logprob_NK[:, :most]).sum(1)
        for most in masses_at
        for name, logprob_NK in lists.items()
    }
    compared = compared.first(compared.k if k is None else k)
    in_teacher_NK, in_student_NK = compared.shared()
    p_NK, q_NK = np.exp(compared.student_logprob_NK), np.exp(compared.teacher_logprob_NK)
    num_N = in_teacher_NK.sum(1)
    some_N = num_N > 0
    columns = {
        "ratio": num_N / compared.k,
        "mass_student": np.where(some_N, (p_NK * in_teacher_NK).sum(1), np.nan),
        "mass_teacher": np.where(some_N, (q_NK * in_student_NK).sum(1), np.nan),
        **{name: advantage_N(compared, in_teacher_NK) for name, advantage_N in ADVANTAGES.items()},
        "entropy_gap": np.abs(compared.teacher_entropy_N - compared.student_entropy_N),
        "student_entropy": compared.student_entropy_N,
        "teacher_entropy": compared.teacher_entropy_N,
        "forward_kl": compared.forward_kl_N,
        "reverse_kl": compared.reverse_kl_N,
        "student_logprob": compared.student_sampled_N,
        "teacher_logprob": compared.teacher_sampled_N,
        "student_top_mass": p_NK.sum(1),  # p(S)
        "teacher_top_mass": q_NK.sum(1),  # q(T)
        "teacher_mass_on_student_top": np.exp(compared.teacher_at_student_NK).sum(1),  # q(S)
        "top1_agreement": (compared.student_ids_NK[:, 0] == compared.teacher_ids_NK[:, 0]).astype(np.float64),
        **masses,
    }
    return TokenTable(row_N=row_N, index_N=index_N, length_N=length_N, columns=columns)


def paper_advantage(compared: Compared, in_teacher_NK: Bools) -> Floats:
    """[N] mean over v in I of p'(v) (log q'(v) - log p'(v)), p' and q' renormalised on I (arXiv:2604.13016).

    At most 0 in sum over I; 0 where both agree on I; NaN where I is empty.
    """
    p_NK = _normalised(compared.student_logprob_NK, in_teacher_NK)
    q_NK = _normalised(compared.teacher_at_student_NK, in_teacher_NK)
    terms_NK = np.where(in_teacher_NK, np.exp(p_NK) * (q_NK - p_NK), 0.0)
    return _mean_over_entries(terms_NK, in_teacher_NK)


def verl_advantage(compared: Compared, in_teacher_NK: Bools) -> Floats:
    """[N] mean over v in I of -q(v) (log q(v) - log p(v)), nothing renormalised (verl main, PR #6469)."""
    p_NK, q_NK = compared.student_logprob_NK, compared.teacher_at_student_NK
    terms_NK = np.where(in_teacher_NK, -np.exp(q_NK) * (q_NK - p_NK), 0.0)
    return _mean_over_entries(terms_NK, in_teacher_NK)


def thunlp_advantage(compared: Compared, in_teacher_NK: Bools) -> Floats:
    """[N] mean over v in I of A(v) = -p'(v) (log p(v) - log q(v)), p' renormalised on S: the released code's reward of
    its default strategy (only_stu, student_p).

    Its mean over a batch is over entries, not over tokens: see `mean_of`.
    """
    p_NK, q_NK = compared.student_logprob_NK, compared.teacher_at_student_NK
    weight_NK = np.exp(_normalised(p_NK, np.ones_like(in_teacher_NK)))
    return _mean_over_entries(np.where(in_teacher_NK, -weight_NK * (p_NK - q_NK), 0.0), in_teacher_NK)


ADVANTAGES: Mapping[str, Callable[[Compared, Bools], Floats]] = {  # of the lists, and which entries of S are in T
    "advantage": paper_advantage,
    "advantage_verl": verl_advantage,
    "advantage_thunlp": thunlp_advantage,
}


def mean_of(table: TokenTable, name: str) -> float | None:
    """Of one column over the tokens where it is defined; None if there are none.

    "advantage_thunlp" is weighed by the number of entries in I, as its code's mean over all entries of a batch is.
    """
    values_N = table.columns[name]
    known_N = ~np.isnan(values_N)
    if not known_N.any():
        return None
    weight_N = table.columns["ratio"][known_N] if name == "advantage_thunlp" else None
    return float(np.average(values_N[known_N], weights=weight_N))


def summary(table: TokenTable, names: Sequence[str] | None = None) -> dict[str, float | None]:
    """The mean of every column (or of those named), and the number of tokens, with and without any overlap."""
    return {
        "num_tokens": float(len(table.row_N)),
        "num_tokens_without_overlap": float((table.columns["ratio"] == 0).sum()),
        **{name: mean_of(table, name) for name in (names or table.columns)},
    }


def by_bucket(table: TokenTable, bucket_tokens: int = BUCKET_TOKENS) -> dict[tuple[int, int], TokenTable]:
    """(first, last + 1) -> the tokens at these positions of their answers. Buckets without a token are left out."""
    bucket_N = table.index_N // bucket_tokens
    return {
        (int(b) * bucket_tokens, (int(b) + 1) * bucket_tokens): table.where(bucket_N == b) for b in np.unique(bucket_N)
    }


def by_relative_position(table: TokenTable, num_bins: int = 10) -> dict[tuple[float, float], TokenTable]:
    """(from, to) of the relative position -> its tokens. Every answer weighs by its length."""
    bin_N = np.minimum((table.relative_N * num_bins).astype(np.int64), num_bins - 1)
    return {(int(b) / num_bins, (int(b) + 1) / num_bins): table.where(bin_N == b) for b in np.unique(bin_N)}


def default_k(num_ids: int) -> int:
    """16 (the paper's k), or an eighth of a small vocabulary, of which two random lists share an eighth; at least 4:
    lists of 2 or 3 hardly change while the models do."""
    return min(num_ids, max(4, min(16, num_ids // 8)))


def _normalised(logprob_NK: Floats, valid_NK: Bools) -> Floats:
    """Log-probs renormalised over the valid entries; 0 at the others."""
    kept_NK = np.where(valid_NK, logprob_NK, -np.inf)
    top_N1 = np.max(kept_NK, axis=1, keepdims=True, initial=-1e30)
    total_N1 = top_N1 + np.log(np.maximum(np.exp(kept_NK - top_N1).sum(1, keepdims=True), 1e-300))
    return np.where(valid_NK, logprob_NK - total_N1, 0.0)


def _mean_over_entries(terms_NK: Floats, valid_NK: Bools) -> Floats:
    num_N = valid_NK.sum(1)
    return np.where(num_N > 0, terms_NK.sum(1) / np.maximum(num_N, 1), np.nan)
