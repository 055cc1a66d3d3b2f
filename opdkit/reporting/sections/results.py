"""The table of what evaluations found, beside the figure of their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opdkit.reporting.html.document import small, table
from opdkit.reporting.html.markup import Html, join
from opdkit.reporting.html.numbers import UNKNOWN, compact, score
from opdkit.reporting.run import Entry, Measured


def results_table(entries: Sequence[Entry]) -> Html:
    """pass@k, maj@n, length and what could not be counted, beside avg@n."""
    columns = _columns([entry.measured for entry in entries])
    rows = [[entry.label, *(show(entry.measured) for _, show in columns)] for entry in entries]
    return join(table(["", *(title for title, _ in columns)], rows), small(WORDS))


WORDS = (
    "avg: mean reward of one answer. pass@k: at least one of k answers is right. maj: the most frequent final answer "
    "is right. Tokens: mean length. Cut: stopped by the length limit. No answer: no final answer that the grader could "
    "read."
)

Column = tuple[str, Callable[[Measured], str]]  # title, and what stands in it for a result


def _columns(results: Sequence[Measured]) -> list[Column]:
    """Only what some result has."""
    samples = {m.samples for m in results}
    n = f"{max(samples)}" if len(samples) == 1 else "n"
    columns: list[Column] = [(f"avg@{n}", lambda m: score(m.avg.value))]
    shown = {k for m in results for k in m.passes if k & (k - 1) == 0 or k == m.samples}  # 2, 4, 8, ... and n
    columns += [_pass(k) for k in sorted(shown - {1})]
    if max(samples) > 1:
        columns.append((f"maj@{n}", lambda m: score(m.maj.value)))
    return columns + [_count(name) for name in _COUNT_TITLES if any(name in m.counts for m in results)]


_COUNT_TITLES = {
    "mean_answer_tokens": "tokens",
    "num_truncated": "cut",
    "num_no_answer": "no answer",
    "num_ungraded": "ungraded",
}


def _pass(k: int) -> Column:
    return f"pass@{k}", lambda m: score(m.passes[k].value) if k in m.passes else UNKNOWN


def _count(name: str) -> Column:
    return _COUNT_TITLES[name], lambda m: compact(m.counts.get(name))
