"""What DPO and SimPO share: the better answer of a group should score higher than the worse one.

    x = beta (h_better - h_worse) - margin           h: the answer's score, from the log-probs of its own tokens
    L = mean over pairs  w (-(1 - e) log sigmoid(x) - e log sigmoid(-x))

Pairs are all (better, worse) with a strict reward gap among the student's own answers to one problem, over the whole
batch. The published code (MOPD's baselines, arXiv:2605.12652) pairs inside a micro-batch, so there the objective
depends on how the batch is cut; here it does not.

w is 1, or with weights of whole answers ([weights] problems, or importance of sequences) the mean of the two answers'
weights: they weigh the pair's loss and leave its scores alone. Weights of tokens weigh the tokens inside h. Answers
without a counted token are in no pair.

Before the update, a pass without gradient gives every answer's h, and with it dL/dh, exact at the current policy and
hence for the one update that a batch is used for. It becomes the coefficients of -log p of the answer's tokens, so the
sum of terms has the gradient of L and another value: `report` says the value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import NegativeLogLikelihood
from opdkit.methods.base import Method, Report
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term
    from opdkit.losses.preference import PairLoss


class Preference(Method):
    beta: float = Field(gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # share of pairs that are believed to be the wrong way round
    scores_mean: ClassVar[bool]  # h is the mean over tokens, not their sum
    compares_rewards: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(reward=True, student=True)

    @property
    @abstractmethod
    def pair_margin(self) -> float:
        """What x is lowered by."""

    @abstractmethod
    def logprob(self, plan: PlanInputs) -> Tensor:
        """[N] whose weighted sum over an answer is its score h."""

    def comparable_R(self, plan: PlanInputs) -> Tensor:
        """[R] bool: the answers that can be in a pair."""
        return plan.graded_R

    def terms(self, plan: PlanInputs) -> list[Term]:
        pairs, share_N = self._pairs(plan)
        coef_N = -pairs.slope_R[plan.row_N] * share_N
        # Named for what its value is: the mean of it says how likely the paired answers' tokens are.
        return [losses.Term(name="nll_of_pairs", loss=NegativeLogLikelihood(), coef_N=coef_N.to(plan.weight_N.dtype))]

    def report(self, plan: PlanInputs) -> Report:
        pairs, _ = self._pairs(plan)
        numbers = {
            "num_pairs": float(pairs.num_pairs),
            "pair_accuracy": pairs.accuracy,
            "score_gap": pairs.score_gap,
            "pair_logit": pairs.logit,
        }
        return Report(loss=pairs.loss, numbers=numbers)

    def faults(self, recipe: Any) -> Iterator[str]:
        if recipe.sampling.group_size < 2:
            yield (
                f'sampling.group_size = {recipe.sampling.group_size} gives method.name = "{self.name}" no pairs: it '
                "compares answers to one problem; use 2 or more (published: 8)"
            )

    def _pairs(self, plan: PlanInputs) -> tuple[PairLoss, Tensor]:
        from opdkit.losses import preference  # torch

        num_rows = len(plan.reward_R)
        within_N = plan.tokens_within_N
        share_N = preference.token_shares(plan.mask_N, within_N, plan.row_N, num_rows, mean=self.scores_mean)
        score_R = preference.answer_scores(self.logprob(plan), share_N, plan.row_N, num_rows)
        has_tokens_R = plan.graded_R.new_zeros(num_rows).index_fill(0, plan.row_N[plan.mask_N], True)
        better_RR = preference.better_in_group(plan.reward_R, plan.group_R, self.comparable_R(plan) & has_tokens_R)
        pairs = preference.pair_loss(
            score_R,
            better_RR,
            weight_R=plan.weight_R,
            beta=self.beta,
            margin=self.pair_margin,
            label_smoothing=self.label_smoothing,
        )
        return pairs, share_N
