"""Which turns of an episode count, and how much. Letters: N tokens of the batch, U its turns, E episodes of K turns."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opdkit import losses
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.base import Named, NotNegative
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

Fraction = Annotated[float, Field(ge=0, le=1)]


class ByTurn(Named, ABC):
    def faults(self, recipe: Any) -> Iterator[str]:
        if recipe.episode is None:
            yield (
                f'weights.turns.name = "{self.name}" weighs turns of an episode, and there is no [episode]; add one, '
                "or remove it"
            )


class TurnOPD(ByTurn):
    """TurnOPD (arXiv:2607.05804): from the mean over tokens to the mean over turns while the run goes on.

    A token's part of the mean is (1 - l) / N + l / (E K_e n_ek), l from `start` to `end` on a line. The form and the
    line are ours: the paper's schedule was not seen.
    """

    name: Literal["turnopd"] = "turnopd"
    start: Fraction = 0.0  # l at the first step; 0: every token counts the same
    end: Fraction = 1.0  # l behind the last step; 1: every turn of an episode counts the same

    def apply(self, plan: PlanInputs) -> PlanInputs:
        share = self.start + (self.end - self.start) * plan.progress
        alike = replace(plan, weight_N=plan.weight_N.new_ones(len(plan.weight_N)))
        by_token_N, by_turn_N = alike.coefficients("token"), alike.coefficients("turn")  # by domain
        return plan.weighed(1 - share + share * (by_turn_N / by_token_N).where(plan.mask_N, 1.0))

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        if getattr(recipe.method, "reduction", "token") != "token":
            yield (
                f'weights.turns.name = "turnopd" goes from the mean over tokens to that over turns, but '
                f'method.reduction = "{recipe.method.reduction}"; set it to "token"'
            )


class SageOPD(ByTurn):
    """SAGE-OPD (arXiv:2606.19659): turns that need no teaching are skipped, tokens count by the teacher's confidence.

    A turn is skipped if log p - log q of its sampled tokens is on average at most `min_gap`: the teacher likes what was
    done as much as the student did. A token of the others counts e^(-confidence H), H the teacher's entropy; the mean
    over all counted tokens, skipped ones too, is 1, so that the loss keeps its scale. Only the abstract was seen: there
    the teacher is asked to judge a turn, here its log-probs are.
    """

    name: Literal["sage_opd"] = "sage_opd"
    min_gap: Annotated[float, Field(allow_inf_nan=False)] = 0.0  # nats a token; turns with less are skipped
    confidence: NotNegative = 1.0  # how fast weights fall with the teacher's entropy; 0: all tokens of a turn alike

    @property
    def needs(self) -> Needs:
        return Needs(views={"teacher": Asked("sampled", entropy=True)}, student=True)

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.teacher_logprob_N is not None and plan.student_logprob_N is not None
        assert plan.teacher_entropy_N is not None
        known_N = self.known_N(plan) & plan.mask_N
        some, factor_N = plan.take(known_N), plan.weight_N.new_ones(len(plan.weight_N))
        assert some.teacher_logprob_N is not None and some.student_logprob_N is not None
        assert some.teacher_entropy_N is not None
        unit_N = turns_of(some)
        gap_N = (some.student_logprob_N - some.teacher_logprob_N).double()
        num_U = unit_N.bincount()
        mean_U = gap_N.new_zeros(len(num_U)).index_add_(0, unit_N, gap_N) / num_U.clamp(min=1)
        own_N = losses.weights.certainty(some.teacher_entropy_N, self.confidence) * (mean_U > self.min_gap)[unit_N]
        total = own_N.sum()
        factor_N[known_N] = (own_N * len(own_N) / total if total > 0 else own_N).to(factor_N.dtype)
        return plan.weighed(factor_N)


class TCOD(ByTurn):
    """TCOD (arXiv:2604.24005): a curriculum over turns. "f2b": the first ones, and more of them as the run goes on;
    "b2f": the last ones first. D of `most` turns count, D on a line from 1 to `most` at `until` of the run."""

    name: Literal["tcod"] = "tcod"
    order: Literal["f2b", "b2f"] = "f2b"  # from the front to the back, or the reverse
    most: Annotated[int, Field(gt=0)] = 8  # turns; as many as episode.max_turns
    until: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the run; from then on all turns count

    def apply(self, plan: PlanInputs) -> PlanInputs:
        assert plan.turn_N is not None
        depth = 1 + (self.most - 1) * min(1.0, plan.progress / self.until)
        row_N = plan.row_N if plan.episode_R is None else plan.episode_R[plan.row_N]
        last_E = plan.turn_N.new_zeros(int(row_N.max()) + 1 if len(row_N) else 0)
        last_E = last_E.scatter_reduce(0, row_N, plan.turn_N, "amax")
        place_N = plan.turn_N if self.order == "f2b" else last_E[row_N] - plan.turn_N
        return replace(plan, mask_N=plan.mask_N & (place_N < depth))


def turns_of(plan: PlanInputs) -> Tensor:
    """[N] which turn of the batch each token is of."""
    assert plan.turn_N is not None
    return losses.units(plan.row_N if plan.episode_R is None else plan.episode_R[plan.row_N], plan.turn_N)


TURN_WEIGHTS: dict[str, type[Named]] = {"turnopd": TurnOPD, "sage_opd": SageOPD, "tcod": TCOD}
