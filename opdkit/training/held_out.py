"""How far the student is from its target on problems that it does not learn from (`eval.divergence`).

The student answers them as it does in training, every view reads the answers, and both directions of the KL are
computed exactly at each token, against the target that the method compares with. Nothing is learned, and no draw of the
training is another one for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from opdkit import losses
from opdkit.losses.spec import Divergence, Support, Target
from opdkit.measure.held_out import KINDS, HeldOut
from opdkit.measure.intervals import Estimate, estimate_mean
from opdkit.methods.base import Method
from opdkit.methods.distillation import DistillationBase
from opdkit.methods.weighting import Weights
from opdkit.training.answers import Answers
from opdkit.training.backward import Learned, parts_of_terms, read
from opdkit.training.batch import Batch
from opdkit.training.deal import deal_rows
from opdkit.training.plan import inputs_of
from opdkit.training.state import State
from opdkit.training.views import join, score, view_groups
from opdkit.types import Example, Needs, Problem, seed_from


@dataclass(frozen=True, slots=True)
class _Comparison:
    """In place of a method: what is asked of the views."""

    needs: Needs
    loss_temperature: float
    answer_source: str = "student"

    @property
    def required_views(self) -> tuple[str, ...]:
        return tuple(self.needs.views)


def held_out(state: State, answers: Answers, problems: Sequence[Problem], *, most: int) -> HeldOut:
    """Of `most` of the problems, drawn by the seed; `sampling.group_size` answers to each. Changes nothing of state."""
    chosen = sorted(problems, key=lambda problem: seed_from(state.seed, "held out", problem.id))[:most]
    target = target_of(state.method)
    asked = target.asks(Divergence("reverse_kl", Support("full")))
    comparison = cast(Method, _Comparison(Needs(views=asked), state.method.loss_temperature))
    state = replace(state, method=comparison, weights=Weights(), diagnostics=None, spool=None)
    groups = answers.held_out(chosen, state.step)
    for teacher in state.teachers:
        teacher.before_step(state.step)
    views = view_groups(state, groups)
    deal = deal_rows(state, [groups], views)
    rows = join(groups, views, score(state, groups, views, deal))
    batch = Batch(rows, state.student.device, deal)
    tokens, compared_N = _compared(state, batch, target)
    for model in state.models:
        model.positions.clear()  # what steps count of their own passes
    for teacher in state.teachers:
        teacher.metrics()
    by_row = {kind: _row_sums(batch, tokens.get(kind, batch.new_per_token())) for kind in KINDS}
    num_R = _row_sums(batch, compared_N.double())
    return {
        "reverse_kl": _over_problems(rows, by_row["reverse_kl"], num_R),
        "forward_kl": _over_problems(rows, by_row["forward_kl"], num_R),
        "num_tokens": int(compared_N.sum()),
        "num_rows": len(rows),
        "num_rows_not_compared": int((num_R == 0).sum()),
    }


def target_of(method: Method) -> Target:
    """What the method compares the student with; of one that compares rewards alone, or asks by token: its teacher."""
    return method.compared if isinstance(method, DistillationBase) else Target()


@torch.no_grad()
def _compared(state: State, batch: Batch, target: Target) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    """([N] by kind, [N] which tokens were compared)."""
    inputs = inputs_of(state, batch)
    said_N = inputs.mask_N & inputs.said_by(*target.views)
    weights = state.optimizer.compute_weights()
    terms = [
        losses.Term(name=kind, loss=Divergence(kind, Support("full")), coef_N=said_N.to(torch.float32), target=target)
        for kind in KINDS
    ]
    seen = Learned()
    state.optimizer.make_ready()
    for part, of_part in state.student.in_step([*parts_of_terms(state, batch, terms)], lambda: weights):
        seen.add(read(state, batch, part, of_part, weights), part.tokens_n, batch.num_tokens)
    return seen.of_all_ranks(state.ranks, batch).tokens, said_N


def _row_sums(batch: Batch, values_N: torch.Tensor) -> np.ndarray:
    """[R], a token of no value counting 0."""
    sums_R = torch.zeros(len(batch.examples), dtype=torch.float64, device=values_N.device)
    return sums_R.index_add_(0, batch.row_N, values_N.double().nan_to_num(0.0)).cpu().numpy()


def _over_problems(rows: Sequence[Example], sum_R: np.ndarray, num_R: np.ndarray) -> Estimate:
    sums: dict[str, float] = {}
    nums: dict[str, float] = {}
    for row, total, num in zip(rows, sum_R, num_R, strict=True):
        sums[row.problem.id] = sums.get(row.problem.id, 0.0) + total
        nums[row.problem.id] = nums.get(row.problem.id, 0.0) + num
    return estimate_mean([sums[key] / nums[key] for key in sums if nums[key]], scale=None)
