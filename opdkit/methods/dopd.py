"""Distillation that asks, token by token, a stronger teacher or the student's own informed self.

    T = T(y | x, p) the teacher, S' = S(y | x, p) the student's live weights, both reading hints p; S(x) the student
    a = |log T - log S'|; the largest `outlier_share` of the batch is dropped, the rest mapped to [0, 1]
    a low,  T high     near_weight     reverse_kl to the teacher      both know the token
    a low,  T low      unsure_weight   reverse_kl to S(x, p)          neither does
    a high, T >= S'    1               jsd to the teacher             the teacher is ahead
    a high, T < S'     near_weight     reverse_kl to S(x, p)          the student is
    L = mean over kept tokens of  weight * divergence

reverse_kl is on the student's `k` likeliest tokens and a bucket, jsd on the full vocabulary (`teacher_share` 1/2,
undivided). The weights leave the mean's denominator alone, dropped tokens leave it. Views: "teacher", and "hinted", the
student that reads what the teacher reads.

Source: DOPD (arXiv:2606.30626), from third-party notes; no code seen. Not public, and ours: how a is mapped (lowest 0,
highest 1) and where "low" ends (`gap_cut`), and which probability is high (the teacher's, from `prob_cut` on). Its
hints are steps without the answer, for training only; by the paper one that holds the answer hurts. [context] shows a
problem's `solution`: `data.columns = { solution = "hints" }` has it read such a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from opdkit import losses
from opdkit.losses.spec import Divergence, Support, Target
from opdkit.methods.base import Averaged, Report
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.types import Asked, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from opdkit.losses import Term

HINTS = {"kind": "reference_solution"}
TEACHER, HINTED = Target(), Target.of({"hinted": 1.0})


class DOPD(Averaged):
    name: Literal["dopd"] = "dopd"
    near_weight: float = Field(0.6, ge=0)  # beta_l of the paper
    unsure_weight: float = Field(0.3, ge=0)  # beta_w
    k: int = Field(128, ge=1)  # of the student's list, for reverse_kl
    outlier_share: float = Field(0.05, ge=0, lt=1)  # of the batch's tokens, those of the largest gap
    gap_cut: float = Field(0.5, ge=0, le=1)  # of the mapped gap; above it is high
    prob_cut: float = Field(0.5, ge=0, le=1)  # of the teacher; from it on is high

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "context": HINTS,
        "views": {"hinted": {"teacher": {"kind": "self", "weights": "live"}, "context": HINTS}},
        "sampling": {"group_size": 1, "temperature": 1.0},
        "train": {"problems_per_step": 128, "lr": 5e-6, "schedule": "cosine"},
    }

    @property
    def needs(self) -> Needs:
        return Needs(views=dict.fromkeys(("teacher", "hinted"), Asked("distribution", logprob=True)))

    def routes(self, plan: PlanInputs) -> dict[str, Tensor]:
        """{route: [N] bool}, a token in one of the four or, if it is dropped, in none."""
        teacher_N = plan.view_logprob["teacher"]
        ahead_N = teacher_N - plan.view_logprob["hinted"]
        counted_N = plan.mask_N & plan.said_by("teacher", "hinted")
        largest = losses.weights.quantile(ahead_N[counted_N].abs(), 1 - self.outlier_share)
        kept_N = counted_N & (ahead_N.abs() <= largest)
        gap_N = losses.weights.unit_interval(ahead_N[kept_N].abs())
        far_N = kept_N.masked_scatter(kept_N, gap_N > self.gap_cut)
        likely_N = teacher_N.exp() >= self.prob_cut
        near_N = kept_N & ~far_N
        return {
            "both_know": near_N & likely_N,
            "neither_knows": near_N & ~likely_N,
            "teacher_ahead": far_N & (ahead_N >= 0),
            "student_ahead": far_N & (ahead_N < 0),
        }

    def terms(self, plan: PlanInputs) -> list[Term]:
        reverse_kl = Divergence("reverse_kl", Support("student_topk", self.k))
        jsd = Divergence("jsd", teacher_share=0.5, scale="published")
        own = {"both_know": self.near_weight, "neither_knows": self.unsure_weight, "student_ahead": self.near_weight}
        compared = {"teacher_ahead": (jsd, TEACHER), "both_know": (reverse_kl, TEACHER)}
        routes = self.routes(plan)
        kept_N = routes["both_know"] | routes["neither_knows"] | routes["teacher_ahead"] | routes["student_ahead"]
        terms = []
        for route, taken_N in routes.items():
            loss, target = compared.get(route, (reverse_kl, HINTED))
            weight_N = own.get(route, 1.0) * taken_N.to(plan.weight_N.dtype)
            coef_N = plan.coefficients(self.reduction, mask_N=kept_N, weight_N=weight_N, divide_by=self.divide_by)
            terms.append(losses.Term(name=route, loss=loss, coef_N=coef_N, target=target))
        return terms

    def report(self, plan: PlanInputs) -> Report:
        num_tokens = float(plan.mask_N.double().sum())
        shares = {route: float(taken_N.double().sum()) / num_tokens for route, taken_N in self.routes(plan).items()}
        return Report(numbers={f"share_{route}": share for route, share in shares.items()})

    def faults(self, recipe: Any) -> Iterator[str]:
        yield from super().faults(recipe)
        hinted = recipe.views.get("hinted")
        if hinted is not None and hinted.teacher.weights == "live" and hinted.context.kind == "none":
            yield (
                '[views.hinted] with teacher.weights = "live" and context.kind = "none" is the student itself, from '
                "which it learns nothing; give the view a context, or other weights"
            )

    def warnings(self, recipe: Any) -> Iterator[str]:
        yield from super().warnings(recipe)
        if recipe.views["hinted"].context != recipe.context:
            yield (
                "[context] and [views.hinted.context] differ: the gap is then also one of what is read, not only of "
                "who reads it; give both the same"
            )
