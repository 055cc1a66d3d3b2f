"""One training step, as a straight line. It knows no method, no paper and no engine by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opdkit.engines.memory import enough_memory
from opdkit.metrics import Metric
from opdkit.training.backward import backward
from opdkit.training.batch import Batch
from opdkit.training.deal import Deal, deal_rows
from opdkit.training.metrics.describe import (
    describe_batch,
    describe_routes,
    describe_rows,
    describe_views,
    describe_weights,
)
from opdkit.training.metrics.diagnose import Diagnosis
from opdkit.training.metrics.resources import Resources
from opdkit.training.metrics.sampler_gap import lag_metrics, sampler_gap
from opdkit.training.metrics.taught import with_taught, without_hidden_states
from opdkit.training.models.optimizer import StepResult
from opdkit.training.plan import plan
from opdkit.training.state import State
from opdkit.training.views import join, score, view_groups
from opdkit.types import Example, Group, Problem

LESS_TO_LEARN = (
    "lower train.max_tokens_per_micro_batch, set model.gradient_checkpointing = true, train.optimizer = "
    '"adamw_8bit", train.master_dtype = "bfloat16" or [model.lora], and on CUDA '
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"
)


def train_step(state: State, problems: Sequence[Problem]) -> tuple[list[Example], list[Metric]]:
    """Sample, score, learn. Returns every row of the step, also those that taught nothing, and the step's metrics."""
    resources = Resources(state.student.device)
    with resources.during("sample"):
        groups = state.sample(problems, state.step)
    with resources.during("score", lambda: state.models):
        for teacher in state.teachers:
            teacher.before_step(state.step)
        views = view_groups(state, groups)
        deal = deal_rows(state, [part for part, _ in parts_of(groups, (), state.updates_per_step)], views)
        agreement = Diagnosis(state, groups, views, deal)
        signals = score(state, groups, views, deal, agreement.chosen, agreement.heard)
    rows = join(groups, views, signals)
    with resources.during("update", lambda: state.models):
        parts = enumerate(parts_of(groups, rows, state.updates_per_step))
        with enough_memory("learning", LESS_TO_LEARN):
            updates = [
                update(state, part, own_rows, agreement, deal, first=number == 0) for number, (part, own_rows) in parts
            ]
        if any(not result.skipped for _, _, result in updates):
            for teacher in state.teachers:
                teacher.after_step()
    state.step += 1
    rows = deal.with_lists([row for own_rows, _, _ in updates for row in own_rows])
    told = [metric for _, metrics, _ in updates for metric in metrics]
    told = [*agreement.metrics(), *describe_views(state, groups, rows), *told]
    no_gradient = Metric("train/num_steps_without_gradient", float(all(r.grad_norm == 0 for _, _, r in updates)), "sum")
    if state.spool is not None:
        told += state.spool.metrics()
    counted = [*resources.metrics(), *(metric for teacher in state.teachers for metric in teacher.metrics())]
    return rows, [*describe_rows(rows), *told, no_gradient, *state.ranks.joined(counted)]


def update(
    state: State, groups: Sequence[Group], rows: list[Example], agreement: Diagnosis, deal: Deal, *, first: bool
) -> tuple[list[Example], list[Metric], StepResult]:
    """One movement of the weights: coefficients of all these rows, gradients, the optimizer. Returns the rows with what
    they were taught, and the metrics. first: of the step."""
    batch = Batch(rows, state.student.device, deal)
    terms, report, inputs = plan(state, batch, groups)
    learned = backward(state, batch, terms, agreement.saw)
    agreement.compare(rows)
    learned.fill(inputs)
    rows = with_taught(without_hidden_states(rows, batch, learned.tokens), batch, terms, learned.tokens, inputs)
    result = state.optimizer.step(state.step)
    metrics = [
        *sampler_gap(state, batch, learned.tokens.get("logprob"), first=first),
        *lag_metrics(state, batch, learned.tokens.get("logprob")),
        *describe_batch(terms, learned.tokens, learned.num_empty_support),
        *describe_routes(state, batch, terms, learned.tokens),
        *(describe_weights(inputs, state.weights) if terms and state.weights.parts else ()),
        *(Metric(f"method/{name}", number) for name, number in report.numbers.items()),
        Metric("train/loss", learned.loss if report.loss is None else report.loss),
        Metric("train/grad_norm", result.grad_norm),
        Metric("train/lr", state.optimizer.lr(state.step), "last"),
        Metric("train/num_skipped_steps", float(result.skipped), "sum"),
    ]
    return rows, metrics, result


def parts_of(
    groups: Sequence[Group], rows: Sequence[Example], count: int
) -> Iterator[tuple[Sequence[Group], list[Example]]]:
    """The step's groups and their rows, in `count` runs of whole groups of nearly equal number (never an empty one)."""
    count = min(count, len(groups))
    row = 0
    for number in range(count):
        part = groups[number * len(groups) // count : (number + 1) * len(groups) // count]
        size = sum(len(group.rollouts) for group in part)
        yield part, list(rows[row : row + size])
        row += size
