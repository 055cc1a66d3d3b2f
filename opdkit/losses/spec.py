"""What a loss is, as data: frozen, checked when built, and free of torch, so that a recipe is refused in milliseconds.

Every loss scores one token from two lists of log-probabilities, the student's and the teacher's, over the entries its
`Support` names. The mathematics is in `divergence.py` and `surrogate.py`; `terms.py` joins a spec to its coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from opdkit.errors import UserError
from opdkit.losses.names import DivergenceKind, EntryWeight, JsdScale, SupportKind, SurrogateForm, TailKind, TargetKind
from opdkit.types import Asked

# What the teacher must be able to answer for each support. Entries chosen by the student can be any id at all, so they
# need the teacher's whole distribution; an intersection only ever holds entries the teacher listed itself.
_TEACHER_ANSWER = {
    "full": "distribution",
    "sampled": "sampled",
    "student_topk": "distribution",
    "teacher_topk": "topk",
    "union": "distribution",
    "intersection": "topk",
    "symmetric_difference": "distribution",
}
_MIXED = ("jsd", "skewed_forward_kl", "skewed_reverse_kl")


def _check_name(what: str, value: str, allowed: object) -> None:
    names = get_args(allowed)
    if value not in names:
        raise UserError(f"{what} = {value!r} is not one of {', '.join(names)}.")


@dataclass(frozen=True, slots=True)
class Target:
    """What a loss compares the student with: a combination of named views.

    logits   softmax of the weighted sum of the views' logits, which is prod q_v^a_v, renormalised. Weights need not sum
             to one and may be negative: extrapolation (a > 1), contrast (right hint - wrong hint)
    mixture  the weighted sum of the views' probabilities; weights are above 0 and sum to 1
    One view of weight 1 is that view. Raises UserError for weights that name no distribution.
    """

    weights: tuple[tuple[str, float], ...] = (("teacher", 1.0),)  # in the order of names: equal targets compare equal
    kind: TargetKind = "logits"

    @classmethod
    def of(cls, weights: Mapping[str, float], kind: TargetKind = "logits") -> Target:
        return cls(tuple(sorted(weights.items())), kind)

    def __post_init__(self) -> None:
        _check_name("target", self.kind, TargetKind)
        shown = "{" + ",".join(f" {view} = {weight:g}" for view, weight in self.weights) + " }"
        if not self.weights or not all(math.isfinite(weight) and weight != 0 for _, weight in self.weights):
            raise UserError(
                f"{'target' if self.kind == 'logits' else 'mixture'} = {shown} must name one view or more, each with a "
                "finite weight other than 0."
            )
        if self.kind == "mixture":
            total = sum(weight for _, weight in self.weights)
            if min(weight for _, weight in self.weights) < 0 or not math.isclose(total, 1, abs_tol=1e-9):
                raise UserError(
                    f"mixture = {shown} must have weights above 0 that sum to 1, as probabilities do; they sum to "
                    f"{total:g}. A weighted sum of logits (target) may have any weights."
                )

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(view for view, _ in self.weights)

    @property
    def only(self) -> str | None:
        """The view that is the whole target; None for a combination."""
        return self.views[0] if len(self.weights) == 1 and self.weights[0][1] == 1 else None

    def asks(self, loss: LossSpec) -> dict[str, Asked]:
        """What each view of this target must say for `loss`."""
        if loss.asks is None:
            return {}
        if self.only is not None:
            return {self.only: loss.asks}
        mixed_at_sample = self.kind == "mixture" and loss.support.kind == "sampled"
        return dict.fromkeys(
            self.views, Asked("sampled" if mixed_at_sample or loss.omits_normaliser else "distribution")
        )


@dataclass(frozen=True, slots=True)
class Support:
    """Which vocabulary entries a loss compares.

    full                  every token of the vocabulary
    sampled               the sampled token alone
    student_topk          the k likeliest entries of the student; teacher_topk: of the teacher
    union                 both top-k lists, an entry that is in both counted once
    intersection          entries that are in both top-k lists (may be empty)
    symmetric_difference  entries that are in exactly one of them (may be empty)

    k is the length of each list, at the loss temperature; a k above the vocabulary size means the whole vocabulary.
    """

    kind: SupportKind = "full"
    k: int | None = None

    def __post_init__(self) -> None:
        _check_name("support", self.kind, SupportKind)
        if self.kind in ("full", "sampled"):
            if self.k is not None:
                raise UserError(f"support {self.kind!r} has no k, but k = {self.k} was given; leave k out.")
        elif self.k is None or self.k < 1:
            raise UserError(f"support {self.kind!r} needs k >= 1, the length of a top-k list; k = {self.k} was given.")

    @property
    def asks(self) -> Asked:
        """What the target must say of these entries."""
        answer = _TEACHER_ANSWER[self.kind]
        return Asked(answer, self.k if answer == "topk" else None)  # type: ignore[arg-type]

    @property
    def has_one_entry(self) -> bool:
        """True if no token can have more than one entry."""
        return self.kind == "sampled" or (self.k == 1 and self.kind in ("student_topk", "teacher_topk", "intersection"))


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence between teacher and student on a support.

    kind  forward_kl            KL(teacher || student)
          reverse_kl            KL(student || teacher)
          jsd                   (1 - a) KL(student || m) + a KL(teacher || m)
          skewed_forward_kl     KL(teacher || m)
          skewed_reverse_kl     KL(student || m)
          mixed_kl              (1 - b) KL(teacher || student) + b KL(student || teacher), b = `reverse_share`
          renyi                 1 / (r - 1) log sum teacher^r student^(1 - r), the Renyi divergence of `order` r of the
                                teacher from the student; forward_kl as r -> 1 (SR-OPSD, arXiv:2608.09745)
    with a = `teacher_share` and m = (1 - a) student + a teacher. DistiLLM (arXiv:2402.03898) writes its skew KL with
    alpha = teacher_share and its skew reverse KL with alpha = 1 - teacher_share.

    scale (jsd only): "continuous" divides by a (1 - a), so that the loss meets forward_kl as a -> 0 and reverse_kl as
    a -> 1, and is exactly that at the ends; "published" leaves it undivided (GKD, OPSD, SDPO): it shrinks to 0 at both.

    tail: what becomes of the mass outside the support (see `tail.py`); without effect when the support is full.

    token_clip: c caps a token's loss at c without turning its gradient: D * min(1, c / D), the factor held constant.
    entry_clip: cap every entry's term before summing, as OPSD and PW-OPSD publish it. Kept for parity: a capped entry
    gives no gradient, so the rest can push the student AWAY from the teacher's favourite token.
    logprob_floor: raise both sides' log-probabilities to at least this before anything else (verl's top-k loss: -10).

    Raises UserError for a combination that is meaningless or identically zero.
    """

    kind: DivergenceKind
    support: Support = Support()
    tail: TailKind = "bucket"
    teacher_share: float | None = None
    scale: JsdScale = "continuous"
    reverse_share: float | None = None
    order: float | None = None
    token_clip: float | None = None
    entry_clip: float | None = None
    logprob_floor: float | None = None
    uses_advantage: ClassVar[bool] = False
    takes_old_logprob: ClassVar[bool] = False
    omits_normaliser: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_name("divergence", self.kind, DivergenceKind)
        _check_name("tail", self.tail, TailKind)
        _check_name("scale", self.scale, JsdScale)
        self._check_share()
        if self.scale != "continuous" and self.kind != "jsd":
            raise UserError(f"scale = {self.scale!r} concerns jsd only, not {self.kind!r}; leave it out.")
        self._check_own("reverse_share", "mixed_kl", "the ends are forward_kl and reverse_kl")
        self._check_own("order", "renyi", "at 1 it is forward_kl")
        if self.kind == "renyi" and self.entry_clip is not None:
            raise UserError("entry_clip caps the terms of a sum over entries; 'renyi' is no such sum; use token_clip.")
        if self.tail == "renormalise" and self.support.has_one_entry:
            raise UserError(
                f"tail = 'renormalise' on the single entry of support {self.support.kind!r} gives both sides "
                "probability 1, so the loss is identically zero; use tail = 'bucket' or a larger k."
            )
        for name, clip in (("token_clip", self.token_clip), ("entry_clip", self.entry_clip)):
            if clip is not None and not clip > 0:
                raise UserError(f"{name} = {clip} must be above 0.")
        if self.token_clip is not None and self.entry_clip is not None:
            raise UserError(
                f"token_clip = {self.token_clip} and entry_clip = {self.entry_clip} are two ways to clip one loss; "
                "keep token_clip, or entry_clip for what OPSD published."
            )
        if self.logprob_floor is not None and not self.logprob_floor < 0:
            raise UserError(f"logprob_floor = {self.logprob_floor} must be below 0: it is a log-probability.")

    def _check_own(self, key: str, kind: DivergenceKind, why: str) -> None:
        value = getattr(self, key)
        if self.kind != kind and value is not None:
            raise UserError(f"{key} = {value} concerns {kind!r} only, not {self.kind!r}; leave it out.")
        if self.kind == kind and (value is None or not 0 < value < 1):
            raise UserError(f"divergence {kind!r} needs {key} above 0 and below 1 ({why}); it is {value}.")

    def _check_share(self) -> None:
        share = self.teacher_share
        if self.kind not in _MIXED:
            if share is not None:
                raise UserError(f"teacher_share = {share} has no meaning for {self.kind!r}; leave it out.")
            return
        if share is None or not 0 <= share <= 1:
            raise UserError(f"divergence {self.kind!r} needs teacher_share between 0 and 1; it is {share}.")
        zero_at: tuple[int, ...] = {"jsd": (), "skewed_forward_kl": (1,), "skewed_reverse_kl": (0,)}[self.kind]
        if self.kind == "jsd" and self.scale == "published":
            zero_at = (0, 1)
        if share in zero_at:
            raise UserError(
                f"{self.kind!r} with teacher_share = {share} and scale = {self.scale!r} is identically zero; "
                "name the limit you mean, 'forward_kl' or 'reverse_kl', instead."
            )

    @property
    def asks(self) -> Asked:
        return self.support.asks


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """-log p of the token in the answer: supervised fine-tuning."""

    support: ClassVar[Support] = Support("sampled")
    asks: ClassVar[Asked | None] = None
    uses_advantage: ClassVar[bool] = False
    takes_old_logprob: ClassVar[bool] = False
    omits_normaliser: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Policy gradient on the sampled token, with an advantage A given per token (`Term.advantage_N`).

    Without `Term.old_logprob_N` the loss is -A log p (one update per batch, so the ratio is 1). With it, the PPO form
    (arXiv:1707.06347, eq. 7): max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = p / p_old, and with
    `dual_clip` = c (arXiv:1912.09729, eq. 5) at most -A c where A < 0.
    """

    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    support: ClassVar[Support] = Support("sampled")
    asks: ClassVar[Asked | None] = None
    uses_advantage: ClassVar[bool] = True
    takes_old_logprob: ClassVar[bool] = True
    omits_normaliser: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise UserError(
                f"clip_low = {self.clip_low} must be above 0 and at most 1: the ratio is kept above 1 - clip_low."
            )
        if self.clip_high is not None and not self.clip_high > 0:
            raise UserError(f"clip_high = {self.clip_high} must be above 0: the ratio is kept below 1 + clip_high.")
        if self.dual_clip is not None and not (1 < self.dual_clip < math.inf):
            raise UserError(f"dual_clip = {self.dual_clip} must be above 1 (arXiv:1912.09729 uses 3).")

    @property
    def clips(self) -> bool:
        return (self.clip_low, self.clip_high, self.dual_clip) != (None, None, None)


@dataclass(frozen=True, slots=True)
class TeacherAdvantage:
    """Sampled-token on-policy distillation: -A log p with A = log q - log p, teacher minus student, held constant.

    Its gradient is an unbiased one-sample estimate of the gradient of KL(student || teacher) at the token's position;
    its value is not a divergence. For a target that combines logits, log q = sum a_v log q_v(y) without the
    combination's normaliser, as ExOPD publishes it (arXiv:2602.12125): that is one number for all tokens of a position,
    so the expected gradient is the same, and each view need only say its log-prob of the sampled token. form "ratio" is
    -A r with r = p / p held constant, which is 1: the same gradient with the value -A, as EOPD reports it (its PPO clip
    of r never acts).
    """

    form: SurrogateForm = "log_prob"
    support: ClassVar[Support] = Support("sampled")
    asks: ClassVar[Asked | None] = Asked("sampled")
    uses_advantage: ClassVar[bool] = False
    takes_old_logprob: ClassVar[bool] = False
    omits_normaliser: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class EntryAdvantage:
    """Policy gradient over the entries of a support, as "Rethinking On-Policy Distillation" publishes it.

    - sum over entries A r,  A = -w (log p - log q),  r = p / p held constant, which is 1; A is constant.
    weight: w in proportion to the student's or the teacher's probability, or the same for every entry ("none"). The
    weights of a token sum to 1, but on the symmetric difference they are the plain probabilities, or 1. log p and
    log q are those of the full vocabulary, not renormalised. It is not a divergence; its value may be negative.
    Raises UserError for the sampled token alone, where every weight is 1.
    """

    support: Support
    weight: EntryWeight = "student_p"
    uses_advantage: ClassVar[bool] = False
    takes_old_logprob: ClassVar[bool] = False
    omits_normaliser: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_name("entry weight", self.weight, EntryWeight)
        if self.support.kind == "sampled":
            raise UserError("one sampled token has no entries to weigh; use PolicyGradient or TeacherAdvantage for it.")

    @property
    def asks(self) -> Asked:
        return self.support.asks

    @property
    def weights_sum_to_one(self) -> bool:
        return self.support.kind != "symmetric_difference"


@dataclass(frozen=True, slots=True)
class KLEstimate:
    """Distance to the teacher (a reference) from the sampled token: k3 = e^d - d - 1, d = log q - log p; never below 0.

    On the student's own samples its mean is KL(student || teacher), but its gradient, (1 - e^d) times that of log p, is
    in the mean that of KL(teacher || student). verl calls it low_var_kl, and cuts it off above 10, where its gradient
    would be largest; here only d is bounded, at 20. John Schulman, "Approximating KL divergence" (2020).
    """

    support: ClassVar[Support] = Support("sampled")
    asks: ClassVar[Asked | None] = Asked("sampled")
    uses_advantage: ClassVar[bool] = False
    takes_old_logprob: ClassVar[bool] = False
    omits_normaliser: ClassVar[bool] = False


LossSpec = Divergence | NegativeLogLikelihood | PolicyGradient | TeacherAdvantage | EntryAdvantage | KLEstimate
