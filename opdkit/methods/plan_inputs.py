"""What a method may know of a batch when it makes its terms.

The whole batch: all micro-batches, and with several ranks those of all, each of which computes all coefficients and
keeps those of its own rows. Letters: N counted answer tokens, R rows (rollouts), C readings of a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from opdkit import losses
from opdkit.losses.names import Reduction
from opdkit.types import base_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything known about the batch before the first backward. Flat, without padding."""

    row_N: Tensor  # long: which row the token belongs to
    index_N: Tensor  # long: position in its answer, from 0
    group_R: Tensor  # long: which problem the row answers
    reward_R: Tensor  # float64; only meaningful where graded_R
    graded_R: Tensor  # bool: the grader gave a score
    mask_N: Tensor  # bool: which tokens are counted at all; changes denominators. At first `countable_N`
    weight_N: Tensor  # how much each counts ([weights]); changes none
    # What of weight_N belongs to whole answers ([weights] problems), and what is left of it; None: nothing, all of it.
    weight_R: Tensor | None = None
    within_N: Tensor | None = None
    sampled_logprob_N: Tensor | None  # nats, under the sampling distribution; None: the answers were not sampled
    # The rest is there if the method's `needs` ask for it. Nats, at the loss temperature.
    view_logprob: Mapping[str, Tensor] = field(default_factory=dict)  # [N] by view, of the sampled token
    view_entropy: Mapping[str, Tensor] = field(default_factory=dict)
    student_logprob_N: Tensor | None  # of the sampled token, before this step's update
    student_entropy_N: Tensor | None
    student_scores: Mapping[str, Tensor] = field(default_factory=dict)  # [N] each: losses that [weights] asked for
    pass_rate_R: Tensor | None = None  # float64, of the row's problem, if [weights] asked; NaN: no answer is graded
    seed_R: Sequence[int] = ()  # one a row, from identity
    num_ids: int | None = None  # of the vocabulary
    step: int  # optimizer steps taken so far
    progress: float  # step / steps of the run, in [0, 1)
    # [N] bool by view: which tokens it says something of; of the others its numbers are NaN. Not listed: of all.
    has_view: Mapping[str, Tensor] = field(default_factory=dict)
    required_views: tuple[str, ...] = ()  # `Method.required_views`
    turn_N: Tensor | None = None  # long: which turn of the model the token belongs to, from 0
    # float64: what the token's turn earned by itself, the last of an episode with the verdict on the whole. Only
    # meaningful where the row is graded; None: no row is an episode.
    turn_reward_N: Tensor | None = None
    # long: rows of one number are parts of one episode, which is graded, and counts, once. None: each is one.
    episode_R: Tensor | None = None
    author_N: Tensor | None = None  # long: who wrote it, as places in `types.AUTHORS`
    domain_N: Tensor | None = None  # long: which of `num_domains` has a mean of its own; None: all tokens have one mean
    num_domains: int = 1

    @property
    def teacher_logprob_N(self) -> Tensor | None:
        """[N] the view "teacher", of the sampled token."""
        return self.view_logprob.get("teacher")

    @property
    def teacher_entropy_N(self) -> Tensor | None:
        return self.view_entropy.get("teacher")

    def said_by(self, *views: str) -> Tensor:
        """[N] bool: the tokens that all of these views say something of (one that repeats: in one of its readings)."""
        said_N = self.mask_N.new_ones(len(self.mask_N))
        for view in views:
            found = [has_N for name, has_N in self.has_view.items() if view in (name, base_name(name))]
            said_N = said_N & reduce(or_, found) if found else said_N
        return said_N

    def readings(self, view: str) -> list[Tensor]:
        """C times [N]: log-probs of the sampled token under each reading of a view that repeats; NaN: missing."""
        return [logprob_N for name, logprob_N in self.view_logprob.items() if base_name(name) == view]

    def target_logprob(self, target: losses.Target) -> Tensor:
        """[N] log-prob of the sampled token under a combination of views: that of a mixture, or the weighted sum of the
        views' own, which lacks the normaliser of the combination (one number for all tokens of a position)."""
        parts = [(self.view_logprob[view], weight) for view, weight in target.weights]
        return losses.combined(parts, target.kind)

    @property
    def countable_N(self) -> Tensor:
        """[N] bool: the tokens that some term can count. The student is not asked about the others."""
        return self.said_by(*self.required_views)

    def take(self, keep_N: Tensor) -> PlanInputs:
        """The same rows with only these of their tokens: what a view did not score must be in no sum over tokens."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {
            name: x_N[keep_N] for name, x_N in arrays.items() if name.endswith("_N") and x_N is not None
        }
        for name in ("student_scores", "has_view", "view_logprob", "view_entropy"):
            taken[name] = {key: x_N[keep_N] for key, x_N in arrays[name].items()}
        return replace(self, **taken)

    def weighed(self, weight_N: Tensor | None = None, *, weight_R: Tensor | None = None) -> PlanInputs:
        """With every token, or every answer as a whole, counting so much more."""
        within_N, rows_R, all_N = self.tokens_within_N, self.weight_R, self.weight_N
        if weight_N is not None:
            within_N, all_N = within_N * weight_N, all_N * weight_N
        if weight_R is not None:
            rows_R, all_N = (
                weight_R if rows_R is None else rows_R * weight_R,
                all_N * weight_R[self.row_N].to(all_N.dtype),
            )
        return replace(self, weight_N=all_N, weight_R=rows_R, within_N=None if rows_R is None else within_N)

    @property
    def first_R(self) -> Tensor:
        """[R] bool: the first row of each episode, which stands for it where answers are compared."""
        if self.episode_R is None:
            return self.graded_R | ~self.graded_R
        places = self.episode_R.new_full((int(self.episode_R.max()) + 1,), len(self.episode_R))
        rows = self.episode_R.new_tensor(range(len(self.episode_R)))
        places = places.scatter_reduce(0, self.episode_R, rows, "amin")
        return rows == places[self.episode_R]

    def of_episodes(self, value_R: Tensor) -> Tensor:
        """[R] each row with the value of its episode's first row."""
        if self.episode_R is None:
            return value_R
        first_R = self.first_R
        of_E = value_R.new_zeros(int(self.episode_R.max()) + 1)
        of_E[self.episode_R[first_R]] = value_R[first_R]
        return of_E[self.episode_R]

    @property
    def tokens_within_N(self) -> Tensor:
        """[N] how much each token counts inside its answer, whatever the answer counts."""
        return self.weight_N if self.within_N is None else self.within_N

    def coefficients(
        self,
        per: Reduction,
        *,
        mask_N: Tensor | None = None,
        weight_N: Tensor | None = None,
        divide_by: float | None = None,
        views: Sequence[str] = (),
        dilute: bool = False,
    ) -> Tensor:
        """[N] coefficients of the method's own mask and weight together with those of the recipe's [weights].

        views   those whose word the term needs: tokens without one of them leave the term, and its mean
        dilute  they leave the term but stay in the denominator, as if their loss were 0
        """
        mask_N = self.mask_N if mask_N is None else self.mask_N & mask_N
        weight_N = self.weight_N if weight_N is None else self.weight_N * weight_N
        if dilute:
            weight_N = weight_N.masked_fill(~self.said_by(*views), 0.0)
        else:
            mask_N = mask_N & self.said_by(*views)
        return losses.token_coefficients(
            mask_N,
            weight_N,
            self.row_N if self.episode_R is None else self.episode_R[self.row_N],
            per=per,
            divide_by=divide_by,
            domain_N=self.domain_N,
            num_domains=self.num_domains,
            turn_N=self.turn_N,
        )
