"""Rows and token losses to metrics. Everything truncated, ungraded, left out or skipped has a name here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opdkit import losses
from opdkit.contexts.transcript import last_turn, whole_episodes
from opdkit.measure.repetition import ends_in_a_loop
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting import Weights
from opdkit.metrics import Metric
from opdkit.training.batch import Batch
from opdkit.training.metrics.episodes import describe_episodes
from opdkit.training.spans import describe_spans
from opdkit.training.state import State
from opdkit.types import Example, Group, Rollout


def describe_rows(rows: Sequence[Example]) -> list[Metric]:
    rollouts = [row.rollout for row in rows]
    graded = [(r.problem_id, r.reward) for r in whole_episodes(rollouts) if r.reward is not None]
    lengths = [len(r.answer_ids) for r in rollouts]
    metrics = [
        Metric("rollout/answer_tokens", float(np.mean(lengths))),
        Metric("rollout/max_answer_tokens", float(max(lengths)), "max"),
        Metric("rollout/tokens", float(sum(lengths)), "sum"),
        Metric("rollout/num_rows", float(len(rollouts)), "sum"),
        Metric("rollout/num_truncated", float(sum(r.finish == "length" for r in rollouts)), "sum"),
        Metric("rollout/num_looping", float(sum(ends_in_a_loop(last_turn(r)) for r in rollouts)), "sum"),
        # A data set's own solution is not an answer that anybody was asked to grade.
        Metric(
            "rollout/num_ungraded",
            float(sum(r.reward is None and r.answer_logprobs is not None for r in rollouts)),
            "sum",
        ),
        Metric("rollout/num_no_answer", float(_num_no_answer(rollouts)), "sum"),
    ]
    if graded:
        rewards = [reward for _, reward in graded]
        metrics += [
            Metric("rollout/reward", float(np.mean(rewards))),
            Metric("rollout/max_reward", max(rewards), "max"),
        ]
        metrics += _group_metrics(graded)
    return [*metrics, *describe_episodes(rows)]


def _num_no_answer(rollouts: Sequence[Rollout]) -> int:
    """Graded, and no final answer was found. An environment that grades may look for none in any episode."""
    if all(r.turns and r.parsed is None for r in rollouts if r.reward is not None):
        return 0
    return sum(r.reward is not None and r.parsed is None for r in rollouts)


def describe_views(state: State, groups: Sequence[Group], rows: Sequence[Example]) -> list[Metric]:
    """What was read for each view, and shown; with a route also by each of its views."""
    metrics: list[Metric] = []
    for view in state.needs.views:
        where = view if view == "teacher" else f"views/{view}"
        told = describe_view(state, view, where, rows)
        for reader in state.readers(view):
            own_rows = [row for row in rows if state.reader(view, row.problem) == reader]
            own_groups = [group for group in groups if state.reader(view, group.problem) == reader]
            if reader != view:
                told += describe_view(state, view, f"views/{reader}", own_rows)
            where = "context" if reader == "teacher" else f"views/{reader}/context"
            told += describe_context(state, view, reader, where, own_groups, own_rows)
        metrics = [*told, *metrics]
    return metrics


def describe_view(state: State, view: str, where: str, rows: Sequence[Example]) -> list[Metric]:
    """How much of these rows is read for a view, and of which it says nothing; under `where`."""
    names = state.readings(view)
    read = [(row.views[name], row.rollout) for row in rows for name in names if name in row.signals]
    counts = {
        "tokens": sum(len(shown.context_ids) + len(rollout.answer_ids) for shown, rollout in read),
        "num_truncated_tokens": sum(shown.num_truncated_tokens for shown, _ in read),
        "num_rows_without_view": sum(not any(name in row.views for name in names) for row in rows),
        "num_rows_too_long": sum(any(name in row.views and name not in row.signals for name in names) for row in rows),
    }
    told = [(row.rollout, row.signals[name].spans) for row in rows for name in names if name in row.signals]
    metrics = [Metric(f"{where}/{name}", float(count), "sum") for name, count in counts.items()]
    return [*metrics, *describe_spans(where, told)]


def describe_context(
    state: State, view: str, reader: str, where: str, groups: Sequence[Group], rows: Sequence[Example]
) -> list[Metric]:
    """What a view's reader was shown beside the problem of these rows, under `where`, as shares of all readings, by the
    kinds in order; a combination that no answer of the step was shown has no metric."""
    context, names = state.viewers[reader].context, state.readings(view)
    if context.kind == "none" or not rows:
        return []
    read = [row.views[name].shown if name in row.signals else () for row in rows for name in names]
    shares = {"nothing": 0, **dict(sorted(Counter("_".join(shown) or "nothing" for shown in read).items()))}
    metrics = [Metric(f"{where}/share_{kinds}", count / len(read)) for kinds, count in shares.items()]
    if context.shows_successes:
        solved = [any(context.is_success(rollout) for rollout in group.rollouts) for group in groups]
        metrics.append(Metric(f"{where}/share_of_groups_with_success", float(np.mean(solved))))
    return metrics


def describe_batch(
    terms: Sequence[losses.Term], tokens: Mapping[str, Tensor], num_empty: Mapping[str, int]
) -> list[Metric]:
    """Means per counted token, how many tokens counted, and how many had nothing to compare."""
    metrics = []
    for term in terms:
        metrics += [
            Metric(f"loss/{term.name}", _mean(tokens, term.name)),
            Metric(f"loss/{term.name}_tokens", float((term.coef_N != 0).sum()), "sum"),
            Metric(f"loss/{term.name}_empty_supports", float(num_empty.get(term.name, 0)), "sum"),
            *_clipped(term, tokens),
        ]
    return [*metrics, *(Metric(f"student/{name}", _mean(tokens, name)) for name in ("entropy", "logprob"))]


def describe_routes(
    state: State, batch: Batch, terms: Sequence[losses.Term], tokens: Mapping[str, Tensor]
) -> list[Metric]:
    """By each view of a route: the mean loss per token of the terms that ask the teacher, over the rows it read. None
    where it read none."""
    if state.route is None:
        return []
    readers = [state.reader("teacher", row.problem) for row in batch.examples]
    asking = [term for term in terms if "teacher" in term.asks and term.name in tokens]
    metrics = []
    for reader in state.route.readers:
        own_R = torch.tensor([name == reader for name in readers], dtype=torch.bool, device=batch.device)
        own_N = own_R[batch.row_N]
        means = [_mean({"own": tokens[term.name][own_N & (term.coef_N != 0)]}, "own") for term in asking]
        known = [mean for mean in means if mean is not None]
        metrics.append(Metric(f"views/{reader}/loss", sum(known) if known else None))
    return metrics


def describe_weights(inputs: PlanInputs, weights: Weights) -> list[Metric]:
    """What [weights] made of the tokens that some term can count: whom it counts, and how much. The method may count
    fewer."""
    countable_N, counted_N = inputs.countable_N, inputs.mask_N
    num_rows, weight_N = len(inputs.row_N[countable_N].unique()), inputs.weight_N[counted_N]
    trained_rows = inputs.row_N[counted_N & (inputs.weight_N != 0)].unique()
    compares = bool(weights.needs.views)
    silent_rows = inputs.row_N[countable_N & ~inputs.said_by(*weights.needs.views)].unique()
    return [
        Metric("weights/share_of_tokens_counted", float(counted_N[countable_N].double().mean())),
        Metric("weights/mean", float(weight_N.double().mean()) if len(weight_N) else None),
        Metric("weights/max", float(weight_N.max()) if len(weight_N) else None, "max"),
        Metric("weights/num_rows_without_weight", float(num_rows - len(trained_rows)), "sum"),
        *([Metric("weights/num_rows_not_compared", float(len(silent_rows)), "sum")] if compares else ()),
    ]


def _clipped(term: losses.Term, tokens: Mapping[str, Tensor]) -> list[Metric]:
    """For a loss with a clip: the share of tokens it acted on, and the share of the loss that it took."""
    unclipped_N = tokens.get(f"{term.name}/unclipped")
    counted_N = term.coef_N != 0
    if unclipped_N is None or not counted_N.any():
        return []
    unclipped_N, loss_N, coef_N = (x[counted_N].double() for x in (unclipped_N, tokens[term.name], term.coef_N))
    whole, left = float((coef_N * unclipped_N).sum()), float((coef_N * loss_N).sum())
    return [
        Metric(f"loss/{term.name}_share_of_tokens_clipped", float((loss_N != unclipped_N).double().mean())),
        Metric(f"loss/{term.name}_share_of_loss_clipped", (whole - left) / whole if whole > 0 else None),
    ]


def _group_metrics(graded: Sequence[tuple[str, float]]) -> list[Metric]:
    """graded: the problem and the reward of each answer."""
    groups: dict[str, list[float]] = {}
    for problem_id, reward in graded:
        groups.setdefault(problem_id, []).append(reward)
    same = [len(set(rewards)) == 1 for rewards in groups.values() if len(rewards) > 1]
    return [Metric("rollout/share_of_groups_with_one_reward", float(np.mean(same)))] if same else []


def _mean(tokens: Mapping[str, Tensor], name: str) -> float | None:
    """Over the tokens it was computed for; None if there are none."""
    if name not in tokens:
        return None
    computed = tokens[name][~tokens[name].isnan()]
    return float(computed.double().mean()) if len(computed) else None
