"""One training step, as a straight line. It knows no method, no paper and no engine by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opdkit.contexts import build_views
from opdkit.metrics import Metric
from opdkit.train.backward import backward
from opdkit.train.batch import Batch
from opdkit.train.describe import describe_batch, describe_context, describe_rows, describe_teacher, describe_weights
from opdkit.train.diagnose import diagnose
from opdkit.train.optimizer import StepResult
from opdkit.train.plan import plan
from opdkit.train.resources import Resources
from opdkit.train.sampler_gap import sampler_gap
from opdkit.train.state import State
from opdkit.train.taught import with_taught, without_hidden_states
from opdkit.types import Example, Group, Problem, TeacherSignal, TeacherView


def train_step(state: State, problems: Sequence[Problem]) -> tuple[list[Example], list[Metric]]:
    """Sample, score, learn. Returns every row of the step, also those that taught nothing, and the step's metrics."""
    resources = Resources(state.student.device)
    with resources.during("sample"):
        groups = state.sample(problems, state.step)
    with resources.during("score"):
        views = view_groups(state, groups)
        signals = score(state, groups, views)
    rows = join(groups, views, signals)
    agreement = diagnose(state, rows)
    with resources.during("update"):
        parts = enumerate(parts_of(groups, rows, state.updates_per_step))
        updates = [update(state, part, own_rows, first=number == 0) for number, (part, own_rows) in parts]
        if state.teacher is not None and any(not result.skipped for _, _, result in updates):
            state.teacher.after_step()
    state.step += 1
    rows = [row for own_rows, _, _ in updates for row in own_rows]
    told = [metric for _, metrics, _ in updates for metric in metrics]
    if state.needs.teacher != "none":
        told = [*describe_teacher(rows), *describe_context(state.context, groups, rows), *agreement, *told]
    no_gradient = Metric("train/num_steps_without_gradient", float(all(r.grad_norm == 0 for _, _, r in updates)), "sum")
    return rows, [*describe_rows(rows), *told, no_gradient, *resources.metrics()]


def update(
    state: State, groups: Sequence[Group], rows: list[Example], *, first: bool
) -> tuple[list[Example], list[Metric], StepResult]:
    """One movement of the weights: coefficients of all these rows, gradients, the optimizer. Returns the rows with what
    they were taught, and the metrics. first: of the step."""
    batch = Batch(rows, state.student.device)
    terms, report, inputs = plan(state, batch, groups)
    learned = backward(state, batch, terms)
    learned.fill(inputs)
    rows = with_taught(without_hidden_states(rows, batch, learned.tokens), batch, terms, learned.tokens, inputs)
    result = state.optimizer.step(state.step)
    metrics = [
        *sampler_gap(state, batch, learned.tokens.get("logprob"), first=first),
        *describe_batch(terms, learned.tokens, learned.num_empty_support),
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


def view_groups(state: State, groups: Sequence[Group]) -> list[TeacherView | None]:
    """What the teacher reads for each rollout; None where it has nothing to read."""
    if state.needs.teacher == "none":
        return [None for group in groups for _ in group.rollouts]
    assert state.teacher is not None
    return build_views(groups, state.context, state.teacher.renderer, identity=(state.seed, state.step, "context"))


def score(state: State, groups: Sequence[Group], views: Sequence[TeacherView | None]) -> list[TeacherSignal | None]:
    """What the teacher says of every rollout it has a view of; None also where that is longer than its positions."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    room = state.teacher.model.max_positions if state.teacher else None
    views = [
        view if view and (room is None or len(view.context_ids) + len(rollout.answer_ids) <= room) else None
        for view, rollout in zip(views, rollouts, strict=True)
    ]
    read = [(view, rollout) for view, rollout in zip(views, rollouts, strict=True) if view is not None]
    if not read:
        return [None] * len(rollouts)
    assert state.teacher is not None
    said = iter(
        state.teacher.score(
            [view.context_ids for view, _ in read],
            [rollout.answer_ids for _, rollout in read],
            state.needs,
            temperature=state.method.loss_temperature,
        )
    )
    return [None if view is None else next(said) for view in views]


def join(
    groups: Sequence[Group], views: Sequence[TeacherView | None], signals: Sequence[TeacherSignal | None]
) -> list[Example]:
    """From here on nothing is parallel."""
    asked = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    return [
        Example(problem=problem, rollout=rollout, view=view, signal=signal)
        for (problem, rollout), view, signal in zip(asked, views, signals, strict=True)
    ]
