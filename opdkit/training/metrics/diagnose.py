"""Do student and teacher still look at the same tokens? Asked of some rows of every so many steps, before the update.

The answer is the metrics `overlap/...` (docs/reference/run_folder.md). It costs one more pass of the student over those
rows and, where the loss did not already ask for its hidden states, one of the teacher. It changes nothing: no gradient,
no random draw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from opdkit.engines.hf import HFEngine
from opdkit.measure.overlap import TokenTable, by_bucket, default_k, summary
from opdkit.metrics import Metric
from opdkit.training.metrics.agreement import Side, compare_rows, known_side, student_side, teacher_side
from opdkit.types import Example, seed_from

if TYPE_CHECKING:
    from opdkit.training.models.teacher import Teacher
    from opdkit.training.state import State

# Of every bucket of positions, and of all tokens.
BY_BUCKET = ("ratio", "mass_student", "mass_teacher", "advantage", "entropy_gap", "forward_kl", "reverse_kl")
OVERALL = (*BY_BUCKET, "student_entropy", "teacher_entropy", "top1_agreement")


@torch.no_grad()
def diagnose(state: State, rows: Sequence[Example]) -> list[Metric]:
    """The metrics of this step; none where no diagnostics are due or no row was read by a teacher."""
    section = state.diagnostics
    if section is None or not section.due(state.step, state.num_steps):
        return []
    chosen = _chosen(state, rows, section.rows)
    if not chosen:
        return []
    started = time.monotonic()
    weights = state.optimizer.compute_weights()
    engine = HFEngine(state.student, max_tokens_per_batch=state.max_tokens_per_micro_batch, weights=weights)
    teachers: dict[Teacher, list[Example]] = {}
    for row in chosen:
        teachers.setdefault(state.teacher_of(row), []).append(row)
    tables = [
        compare_rows(
            own,
            student_side(engine.score, state.student.head(weights)),
            _side(state, teacher, own),
            k=section.k or default_k(state.student.num_tokens),
            temperature=state.method.loss_temperature,
            device=state.student.device,
        )
        for teacher, own in teachers.items()
    ]
    starts = np.cumsum([0, *(len(own) for own in teachers.values())])[:-1]
    table = TokenTable.joined([replace(t, row_N=t.row_N + s) for t, s in zip(tables, starts, strict=True)])
    seconds = time.monotonic() - started
    metrics = [*_metrics(summary(table, OVERALL)), Metric("time/diagnostics_s", seconds)]
    for (first, end), bucket in by_bucket(table, section.bucket_tokens).items():
        metrics += _metrics(summary(bucket, BY_BUCKET), at=f"@{first}-{end}")
    return metrics


def _chosen(state: State, rows: Sequence[Example], num: int) -> list[Example]:
    """`num` of the rows that a teacher scored, drawn by who they are."""
    scored = [row for row in rows if row.signal is not None and row.rollout.answer_mask.any()]
    return sorted(scored, key=lambda row: seed_from(state.seed, state.step, *row.rollout.key, "diagnostics"))[:num]


def _side(state: State, teacher: Teacher, rows: Sequence[Example]) -> Side:
    """The teacher that read these rows."""
    asked = state.needs.teacher
    if asked is not None and asked.answer == "distribution":
        return known_side(rows)
    return teacher_side(teacher.score, teacher.head())


def _metrics(numbers: dict[str, float | None], at: str = "") -> list[Metric]:
    return [
        Metric(f"overlap/{name}{at}", value, "sum" if name.startswith("num_") else "mean")
        for name, value in numbers.items()
    ]
