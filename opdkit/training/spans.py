"""What a teacher with another tokenizer said of spans of several tokens, spread over the student's; and how much it
said at all.

With L_T and L_S the sums of both sides' log-probs over a span of n student tokens, and s one token's own (the
student's, before the update), the span's advantage is A = L_T - L_S, and a token's is

    macro         A                      the score-function gradient of the reverse KL of spans
    even          L_T / n - s            these and the next sum to A over the span
    proportional  (L_T / L_S - 1) s      arXiv:2606.09456

A token is taken to have been given the log-prob s + its advantage, so every loss on sampled tokens has it.

Letters: N counted tokens of the batch, T tokens of an answer, n those of them that are in spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opdkit.errors import UserError
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.metrics import Metric
from opdkit.training.batch import Batch
from opdkit.types import FloatArray, Rollout, Signal, Spans, SpanSpread

BY_STUDENT: tuple[SpanSpread, ...] = ("macro", "proportional")  # which ask what the student says of the tokens
LEAST_LOGPROB = 1e-8  # of a span: below it the student was sure of it, and each token has the same part
LEAST_SHARE = 0.05  # of a step's tokens; a teacher that is heard on fewer teaches something else than the recipe says

Told = tuple[Rollout, Spans | None]


def spread_spans(batch: Batch, inputs: PlanInputs) -> PlanInputs:
    """The log-probs of the views that spread a span by what the student says of its tokens; the batch has them too."""
    views = [view for view in inputs.view_logprob if any(_spread_of(e.signals.get(view)) for e in batch.examples)]
    if not views:
        return inputs
    assert inputs.student_logprob_N is not None
    own = batch.per_row(inputs.student_logprob_N)
    for view in views:
        signals = {e.rollout.key: e.signals[view] for e in batch.examples if _spread_of(e.signals.get(view))}
        batch.replace_signals(
            view, {e.rollout.key: spread(signals[e.rollout.key], own_T) for e, own_T in own if e.rollout.key in signals}
        )
    inputs = replace(
        inputs,
        view_logprob={**inputs.view_logprob, **{view: batch.said(view, "sampled_logprob_T") for view in views}},
        has_view={**inputs.has_view, **{view: batch.has_view(view) for view in views}},
    )
    return replace(inputs, mask_N=inputs.mask_N & inputs.countable_N)


def spread(signal: Signal, own_T: FloatArray) -> Signal:
    """own_T: the student's log-probs, NaN where unknown; of a span with an unknown token nothing is said."""
    spans, told_T = signal.spans, signal.sampled_logprob_T
    assert spans is not None and told_T is not None
    index_T = np.where(spans.said_T, spans.index_T, -1)
    index_n = index_T[index_T >= 0]
    told_n, own_n = (array_T[index_T >= 0].astype(np.float64) for array_T in (told_T, own_T))
    size_n, told_sum_n, own_sum_n = (
        np.bincount(index_n, weights=weights)[index_n] for weights in (np.ones(len(index_n)), told_n, own_n)
    )
    advantage_n = told_sum_n - own_sum_n
    if spans.spread == "proportional":
        sure_n = np.abs(own_sum_n) < LEAST_LOGPROB
        by_share_n = (told_sum_n / np.where(sure_n, 1.0, own_sum_n) - 1) * own_n
        advantage_n = np.where(sure_n, advantage_n / size_n, by_share_n)
    given_n = np.where((size_n == 1) & ~np.isnan(own_n), told_n, own_n + advantage_n)
    given_T = told_T.copy()
    given_T[index_T >= 0] = given_n
    said_T = spans.said_T & ~np.isnan(given_T)
    return replace(signal, sampled_logprob_T=given_T, spans=replace(spans, said_T=said_T))


def _spread_of(signal: Signal | None) -> bool:
    return signal is not None and signal.spans is not None and signal.spans.spread in BY_STUDENT


def check_coverage(told: Sequence[Told]) -> None:
    """told: answers of a step, with what aligned teachers say of them. Raises UserError where that is next to
    nothing."""
    share = (span_shares(told) or {}).get("said")
    if share is not None and share < LEAST_SHARE:
        raise UserError(
            f"a teacher with another tokenizer says something of {100 * share:.1f} % of this step's tokens, so next to "
            "nothing is taught: the answers are hardly text, or full of special tokens; look at them, let the student "
            'learn the format first (method.name = "sft"), or compare spans too (teacher.span = "macro")'
        )


def describe_spans(where: str, told: Sequence[Told]) -> list[Metric]:
    """How much of the counted tokens aligned teachers say, under `where`; nothing where no teacher is aligned."""
    shares = span_shares(told)
    if shares is None:
        return []
    return [Metric(f"{where}/share_{name}", value) for name, value in shares.items()]


def span_shares(told: Sequence[Told]) -> dict[str, float | None] | None:
    """Of the counted tokens. one_to_one, merged (in a span with more tokens) and masked (in none) sum to 1."""
    columns = [
        (spans.said_T[c], spans.is_single_T[c], spans.index_T[c] >= 0, spans.has_digit_T[c])
        for spans, c in ((spans, rollout.answer_mask) for rollout, spans in told if spans is not None)
    ]
    if not columns or not sum(len(said_T) for said_T, *_ in columns):
        return None
    said_N, single_N, in_span_N, digit_N = (np.concatenate(column) for column in zip(*columns, strict=True))
    return {
        "said": float(said_N.mean()),
        "one_to_one": float(single_N.mean()),
        "merged": float((in_span_N & ~single_N).mean()),
        "masked": float((~in_span_N).mean()),
        "digits": float(digit_N.mean()),
        "digits_one_to_one": float(single_N[digit_N].mean()) if digit_N.any() else None,
    }
