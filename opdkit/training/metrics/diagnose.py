"""Do student and teacher still look at the same tokens? Asked of some rows of every so many steps, before the update.

The answer is the metrics `overlap/...` (docs/reference/run_folder.md). The hidden states of both are those that the
loss and the scoring have made; rows that the loss leaves out are read for this. Nothing changes: no gradient, no draw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdkit.engines.hf import HFEngine
from opdkit.measure.overlap import TokenTable, by_bucket, default_k, summary
from opdkit.metrics import Metric
from opdkit.training.metrics.agreement import Side, compare_rows, heard_tokens, hidden_states, student_side
from opdkit.types import Asked, Example, Group, Rollout, Signal, View, seed_from

if TYPE_CHECKING:
    from opdkit.training.deal import Deal
    from opdkit.training.models.base_teacher import Teacher
    from opdkit.training.state import State

Key = tuple[str, int]  # of a rollout
_DISTRIBUTION = Asked("distribution")

# Of every bucket of positions, and of all tokens.
BY_BUCKET = ("ratio", "mass_student", "mass_teacher", "advantage", "entropy_gap", "forward_kl", "reverse_kl")
OVERALL = (*BY_BUCKET, "student_entropy", "teacher_entropy", "top1_agreement")


class Diagnosis:
    """Of one step. What the loss and the teachers read anyway is kept for the chosen rows (`saw`, `heard`), and
    compared while the student that said it still stands (`compare`): before the update that the rows belong to."""

    def __init__(self, state: State, groups: Sequence[Group], views: Sequence[Mapping[str, View]], deal: Deal) -> None:
        """views: what is read for each rollout of the groups (`views.view_groups`)."""
        section = state.diagnostics
        self._due = section is not None and section.due(state.step, state.num_steps)
        chosen = _chosen(state, groups, views, section.rows) if section is not None and self._due else []
        self._chosen = [rollout for rollout in chosen if deal.is_own(rollout.key)]
        self._state, self._section = state, section
        self._states: dict[Key, Tensor] = {}
        self._said: dict[Teacher, dict[Key, Signal]] = {}
        self._tables: list[TokenTable] = []
        self._num_compared = 0
        self._seconds = 0.0

    @property
    def chosen(self) -> Collection[Key]:
        """The rollouts whose teacher's hidden states are wanted of the pass that scores them."""
        return {rollout.key for rollout in self._chosen}

    def heard(self, teacher: Teacher, rollout: Rollout, signal: Signal) -> None:
        """A teacher's hidden states behind a chosen rollout, with their head."""
        self._said.setdefault(teacher, {})[rollout.key] = signal

    def saw(self, rows: Sequence[Example], hidden_nH: Tensor) -> None:
        """The student's hidden states behind the counted tokens of some rows, one after another."""
        keys, first = self.chosen, 0
        for row in rows if keys else ():
            counted_T = torch.from_numpy(row.rollout.answer_mask)
            end = first + int(counted_T.sum())
            if row.rollout.key in keys:
                hidden_TH = torch.zeros(len(counted_T), hidden_nH.shape[-1], dtype=hidden_nH.dtype)
                hidden_TH[counted_T] = hidden_nH[first:end].detach().cpu()
                self._states[row.rollout.key] = hidden_TH
            first = end

    @torch.no_grad()
    def compare(self, rows: Sequence[Example]) -> None:
        """Those of the chosen that are among `rows`, which the student is about to learn from."""
        chosen, state = self.chosen, self._state
        some = [row for row in rows if row.rollout.key in chosen]
        in_parts = state.student.shards is not None  # then a pass is made by all ranks, or by none
        if self._section is None or not (some or (in_parts and self._due)):
            return
        started = time.monotonic()
        weights = state.optimizer.compute_weights()
        head = state.student.head(weights)
        unread = [row for row in some if row.rollout.key not in self._states]
        if unread or in_parts:
            engine = HFEngine(state.student, weights=weights)
            for row, hidden_TH in zip(unread, student_side(engine.score, head).hidden(unread), strict=True):
                self._states[row.rollout.key] = hidden_TH
        student = Side(hidden=lambda asked: [self._states.pop(row.rollout.key) for row in asked], head=head)
        for said in self._said.values():
            own = [row for row in some if row.rollout.key in said]
            own = heard_tokens(own, [said[row.rollout.key].spans for row in own])
            if not any(row.rollout.answer_mask.any() for row in own):
                continue
            teacher = Side(hidden=_hidden_of(said), head=said[own[0].rollout.key].head)
            table = compare_rows(
                own,
                student,
                teacher,
                k=self._section.k or default_k(state.student.num_tokens),
                temperature=state.method.loss_temperature,
                device=state.student.device,
            )
            self._tables.append(replace(table, row_N=table.row_N + self._num_compared))
            self._num_compared += len(own)
        self._seconds += time.monotonic() - started

    def metrics(self) -> list[Metric]:
        """Of this step; none where no diagnostics are due or no row was read by a teacher."""
        tables = self._state.ranks.joined(self._tables) if self._due else []
        if not tables or self._section is None:
            return []
        table = TokenTable.joined(tables)
        metrics = [*_metrics(summary(table, OVERALL)), Metric("time/diagnostics_s", self._seconds)]
        for (first, end), bucket in by_bucket(table, self._section.bucket_tokens).items():
            metrics += _metrics(summary(bucket, BY_BUCKET), at=f"@{first}-{end}")
        return metrics


def _chosen(state: State, groups: Sequence[Group], views: Sequence[Mapping[str, View]], num: int) -> list[Rollout]:
    """`num` of the rollouts that a teacher reads, drawn by who they are."""
    problems = [group.problem for group in groups for _ in group.rollouts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    read = []
    for problem, rollout, of_row in zip(problems, rollouts, views, strict=True):
        if "teacher" in of_row and rollout.answer_mask.any():
            teacher = state.viewers[state.reader("teacher", problem)].teacher
            if teacher.can_say(_DISTRIBUTION) and teacher.fits(of_row["teacher"].context_ids, rollout.answer_ids):
                read.append(rollout)
    return sorted(read, key=lambda one: seed_from(state.seed, state.step, *one.key, "diagnostics"))[:num]


def _hidden_of(said: Mapping[tuple[str, int], Signal]) -> Callable[[Sequence[Example]], list[Tensor]]:
    return lambda rows: hidden_states([said[row.rollout.key] for row in rows])


def _metrics(numbers: dict[str, float | None], at: str = "") -> list[Metric]:
    return [
        Metric(f"overlap/{name}{at}", value, "sum" if name.startswith("num_") else "mean")
        for name, value in numbers.items()
    ]
