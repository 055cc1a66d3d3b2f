"""How the loss and the two models change along an answer: means over the tokens at the same place, from saved rows.

Letters: T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from opdkit.errors import UserError
from opdkit.reporting.figures.curves import Curve, Point, overlay
from opdkit.reporting.figures.series import legend
from opdkit.reporting.figures.tokens import loss_parts
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.run import RunContents, row_files
from opdkit.run.rows import load_rows
from opdkit.types import Example

NUM_BINS = 24
MIN_TOKENS = 5  # a mean of fewer says nothing, and is a gap

Values = npt.NDArray[np.floating] | None  # [T], NaN where unknown


def position_panels(run: RunContents) -> Html | None:
    """The last saved step beside the first one. None where the rows do not say what was taught."""
    words = "Means over the tokens at the same place of the saved answers, without those the loss left out."
    steps = {run.rows_step: run.rows} if run.rows_step is not None else {}
    first = min(row_files(run.folder), default=None)
    if first is not None and first != run.rows_step:
        try:
            steps = {first: load_rows(row_files(run.folder)[first]), **steps}
        except UserError as error:
            words += f" {error}."
    width = max((len(row.rollout.answer_ids) for rows in steps.values() for row in rows), default=0)
    figures, names = [], [f"step {step}" for step in reversed(steps)]
    for title, values in QUANTITIES.items():
        curves = [_curve(rows, values, width) for rows in reversed(steps.values())]
        if any(any(curve) for curve in curves):
            figures.append(overlay(title, curves, names=names, along="token", smooth=False))
    if not figures:
        return None
    return join(
        tag("h3", "Along the answer"),
        legend(names, words),
        tag("div", *figures, class_="panels"),
    )


def _loss(row: Example) -> Values:
    """Of all terms together, per unit of coefficient, so that a curve does not fall with the length of the answers."""
    parts_T = loss_parts(row)
    if parts_T is None or row.taught is None:
        return None
    coef_T = np.abs(row.taught.coef_ST.astype(np.float64)).sum(0)
    return np.where(coef_T > 0, parts_T / np.where(coef_T > 0, coef_T, 1.0), np.nan)


def _ratio(row: Example) -> Values:
    """log p student - log p teacher of the sampled token. Its mean over the student's own tokens estimates
    KL(student || teacher)."""
    if row.taught is None or row.signal is None or row.signal.sampled_logprob_T is None:
        return None
    return row.taught.student_logprob_T - row.signal.sampled_logprob_T


def _entropy(row: Example) -> Values:
    return None if row.taught is None else row.taught.student_entropy_T


def _teacher_entropy(row: Example) -> Values:
    return None if row.signal is None else row.signal.entropy_T


QUANTITIES: dict[str, Callable[[Example], Values]] = {
    "Token loss": _loss,
    "KL to the teacher, one sample": _ratio,
    "Student's entropy, nats": _entropy,
    "Teacher's entropy, nats": _teacher_entropy,
}


def _curve(rows: Sequence[Example], values: Callable[[Example], Values], width: int) -> Curve:
    """One point for each of `NUM_BINS` stretches of [0, width) (fewer for short answers), in its middle."""
    num_bins = min(NUM_BINS, width)
    sums, counts = np.zeros(num_bins), np.zeros(num_bins)
    for row in rows:
        value_T = values(row)
        if value_T is None:
            continue
        known = np.isfinite(value_T) & row.rollout.answer_mask
        bins = np.arange(len(value_T)) * num_bins // width
        sums += np.bincount(bins[known], weights=value_T[known], minlength=num_bins)
        counts += np.bincount(bins[known], minlength=num_bins)
    return [
        Point((index + 0.5) * width / num_bins + 0.5, float(sums[index] / counts[index]))
        if counts[index] >= MIN_TOKENS
        else None
        for index in range(num_bins)
    ]
