"""Do student and teacher still look at the same tokens? Asked of some rows of every so many steps, before the update.

The answer is the metrics `overlap/...` (docs/reference/run_folder.md). The student's hidden states are those that the
loss has made; rows that it leaves out are read for this. The teacher reads the rows once more where the loss did not
ask for its hidden states. Nothing changes: no gradient, no random draw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdkit.engines.hf import HFEngine
from opdkit.measure.overlap import TokenTable, by_bucket, default_k, summary
from opdkit.metrics import Metric
from opdkit.training.metrics.agreement import Side, compare_rows, hidden_states, student_side
from opdkit.types import Asked, Example, Signal, seed_from

if TYPE_CHECKING:
    from opdkit.training.models.teacher import Teacher
    from opdkit.training.state import State

# Of every bucket of positions, and of all tokens.
BY_BUCKET = ("ratio", "mass_student", "mass_teacher", "advantage", "entropy_gap", "forward_kl", "reverse_kl")
OVERALL = (*BY_BUCKET, "student_entropy", "teacher_entropy", "top1_agreement")


class Diagnosis:
    """Of one step. What the loss reads anyway is kept for the chosen rows (`saw`), and compared while the student that
    said it still stands (`compare`): before the update that the rows belong to."""

    def __init__(self, state: State, rows: Sequence[Example]) -> None:
        section = state.diagnostics
        due = section is not None and section.due(state.step, state.num_steps)
        self._rows = _chosen(state, rows, section.rows) if section is not None and due else []
        self._state, self._section = state, section
        self._states: dict[tuple[str, int], Tensor] = {}
        self._tables: list[TokenTable] = []
        self._num_compared = 0
        started = time.monotonic()
        self._teachers = _teachers(state, self._rows)
        self._seconds = time.monotonic() - started

    def saw(self, rows: Sequence[Example], hidden_nH: Tensor) -> None:
        """The student's hidden states behind the counted tokens of some rows, one after another."""
        keys, first = {row.rollout.key for row in self._rows}, 0
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
        keys = {row.rollout.key for row in rows}
        some = [row for row in self._rows if row.rollout.key in keys]
        if not some or self._section is None:
            return
        started, state = time.monotonic(), self._state
        weights = state.optimizer.compute_weights()
        head = state.student.head(weights)
        if unread := [row for row in some if row.rollout.key not in self._states]:
            engine = HFEngine(state.student, weights=weights)
            for row, hidden_TH in zip(unread, student_side(engine.score, head).hidden(unread), strict=True):
                self._states[row.rollout.key] = hidden_TH
        student = Side(hidden=lambda asked: [self._states.pop(row.rollout.key) for row in asked], head=head)
        for teacher, said in self._teachers:
            own = [row for row in some if row.rollout.key in said]
            if not own:
                continue
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
        if not self._tables or self._section is None:
            return []
        table = TokenTable.joined(self._tables)
        metrics = [*_metrics(summary(table, OVERALL)), Metric("time/diagnostics_s", self._seconds)]
        for (first, end), bucket in by_bucket(table, self._section.bucket_tokens).items():
            metrics += _metrics(summary(bucket, BY_BUCKET), at=f"@{first}-{end}")
        return metrics


def _chosen(state: State, rows: Sequence[Example], num: int) -> list[Example]:
    """`num` of the rows that a teacher scored, drawn by who they are."""
    scored = [row for row in rows if row.signal is not None and row.rollout.answer_mask.any()]
    return sorted(scored, key=lambda row: seed_from(state.seed, state.step, *row.rollout.key, "diagnostics"))[:num]


@torch.no_grad()
def _teachers(state: State, rows: Sequence[Example]) -> list[tuple[Side, dict[tuple[str, int], Signal]]]:
    """Each teacher, and what it says of the rows that it read: from the loss's hidden states, or from a pass of its
    own, made before the first update, which a live teacher moves with."""
    asked = state.needs.teacher
    by_teacher: dict[Teacher, list[Example]] = {}
    for row in rows:
        by_teacher.setdefault(state.teacher_of(row), []).append(row)
    found = []
    for teacher, own in by_teacher.items():
        if asked is not None and asked.answer == "distribution":
            signals = [row.signal for row in own]
        else:
            answers = [row.rollout.answer_ids for row in own]
            contexts = [row.view.context_ids for row in own if row.view is not None]
            signals = [*teacher.score(contexts, answers, Asked("distribution"), temperature=1.0)]
        said = {row.rollout.key: signal for row, signal in zip(own, signals, strict=True) if signal is not None}
        found.append((Side(hidden=_hidden_of(said), head=said[own[0].rollout.key].head), said))
    return found


def _hidden_of(said: Mapping[tuple[str, int], Signal]) -> Callable[[Sequence[Example]], list[Tensor]]:
    return lambda rows: hidden_states([said[row.rollout.key] for row in rows])


def _metrics(numbers: dict[str, float | None], at: str = "") -> list[Metric]:
    return [
        Metric(f"overlap/{name}{at}", value, "sum" if name.startswith("num_") else "mean")
        for name, value in numbers.items()
    ]
