"""Policy gradient without a teacher or a reward: the student's unlikely tokens are pushed down, and nothing else.

    selected: the sampled tokens in the lowest `share` of log S(y)
    A = -1/2 - (H - H_min) / (2 (H_max - H_min)), in [-1, -1/2]; H the student's entropy at the token; 0 of all others
    L = -1/N sum over tokens  A log S(y)          N = all counted tokens

The control that every claim of distillation needs: it knows nothing that the student does not know. `advantage =
"constant"` is its own control, A = -1/2.

Source: OPSA (arXiv:2608.31046), whose code was not obtainable. Not public, and each a key here: whether the lowest
share is that of each answer (`share_of`) or of the batch, and whether H_min and H_max are (`entropy_range_of`); by
default both are of the batch, over all its counted tokens. No ratio to the sampler: exact while a batch is used for one
update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opdkit import losses
from opdkit.losses.spec import PolicyGradient
from opdkit.methods.base import Averaged, Report
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term


class OPSA(Averaged):
    name: Literal["opsa"] = "opsa"
    share: float = Field(0.2, gt=0, le=1)  # of the sampled tokens, the least likely
    share_of: Literal["batch", "answer"] = "batch"  # of an answer: at least one token of each
    advantage: Literal["entropy", "constant"] = "entropy"  # constant: -1/2
    entropy_range_of: Literal["batch", "answer"] = "batch"  # advantage = "entropy": whose H_min and H_max

    @model_validator(mode="after")
    def _range_has_a_use(self) -> Self:
        if self.advantage == "constant" and self.entropy_range_of != "batch":
            raise ValueError(
                f'method.entropy_range_of = "{self.entropy_range_of}" has no use for advantage = "constant"; remove it'
            )
        return self

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sampling": {"group_size": 1, "temperature": 1.0, "max_answer_tokens": 12000},
        "train": {"problems_per_step": 64, "lr": 1e-6},
    }

    @property
    def needs(self) -> Needs:
        return Needs(student=True)

    def selected_N(self, plan: PlanInputs) -> Tensor:
        """[N] bool: counted tokens among the least likely."""
        assert plan.student_logprob_N is not None
        counted_N = plan.mask_N
        logprob_N, row_N = plan.student_logprob_N[counted_N], plan.row_N[counted_N]
        if self.share_of == "answer":
            low_N = losses.weights.keep_best(-logprob_N, row_N, self.share)
        else:
            low_N = logprob_N <= losses.weights.quantile(logprob_N, self.share)
        return counted_N.masked_scatter(counted_N, low_N)

    def advantage_N(self, plan: PlanInputs) -> Tensor:
        """[N] A of the tokens that may be selected."""
        assert plan.student_entropy_N is not None
        counted_N, entropy_N = plan.mask_N, plan.student_entropy_N
        if self.advantage == "constant":
            return entropy_N.new_full((len(entropy_N),), -0.5)
        if self.entropy_range_of == "answer":
            unsure_N = losses.weights.unit_interval_of_row(entropy_N[counted_N], plan.row_N[counted_N])
        else:
            unsure_N = losses.weights.unit_interval(entropy_N[counted_N])
        return -0.5 - entropy_N.new_zeros(len(entropy_N)).masked_scatter(counted_N, unsure_N) / 2

    def terms(self, plan: PlanInputs) -> list[Term]:
        selected_N = self.selected_N(plan).to(plan.weight_N.dtype)
        coef_N = plan.coefficients(self.reduction, weight_N=selected_N, divide_by=self.divide_by)
        return [losses.Term(name="opsa", loss=PolicyGradient(), coef_N=coef_N, advantage_N=self.advantage_N(plan))]

    def report(self, plan: PlanInputs) -> Report:
        selected_N = self.selected_N(plan)
        numbers = {"share_of_tokens_selected": float(selected_N[plan.mask_N].double().mean())}
        if selected_N.any():
            numbers["mean_advantage"] = float(self.advantage_N(plan)[selected_N].double().mean())
        return Report(numbers=numbers)

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if recipe.train.updates_per_step > 1 and not self.is_corrected(recipe):
            yield (
                f'method.name = "opsa" has no ratio to the sampler, but with train.updates_per_step = '
                f"{recipe.train.updates_per_step} an earlier student drew most tokens; set it to 1, or add [weights] "
                "importance"
            )
