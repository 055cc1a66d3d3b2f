"""One training step, as a straight line. It knows no method, no paper and no engine by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opdkit.contexts import build_views
from opdkit.metrics import Metric
from opdkit.train.backward import backward
from opdkit.train.batch import Batch
from opdkit.train.describe import describe_batch, describe_rows, describe_weights
from opdkit.train.diagnose import diagnose
from opdkit.train.plan import plan
from opdkit.train.state import State
from opdkit.train.taught import with_taught, without_hidden_states
from opdkit.types import Example, Group, Problem, TeacherSignal, TeacherView


def train_step(state: State, problems: Sequence[Problem]) -> tuple[list[Example], list[Metric]]:
    """Sample, score, learn. Returns every row of the step, also those that taught nothing, and the step's metrics."""
    groups = state.sample(problems, state.step)
    views = view_groups(state, groups)
    signals = score(state, groups, views)
    rows = join(groups, views, signals)
    agreement = diagnose(state, rows)
    updates = [update(state, part, own_rows) for part, own_rows in parts_of(groups, rows, state.updates_per_step)]
    if state.teacher is not None and any(moved for _, _, moved in updates):
        state.teacher.after_step()
    state.step += 1
    rows = [row for own_rows, _, _ in updates for row in own_rows]
    told = [metric for _, metrics, _ in updates for metric in metrics]
    return rows, [*describe_rows(rows, asks_teacher=state.needs.teacher != "none"), *agreement, *told]


def update(state: State, groups: Sequence[Group], rows: list[Example]) -> tuple[list[Example], list[Metric], bool]:
    """One movement of the weights: coefficients of all these rows, gradients, the optimizer. Returns the rows with what
    they were taught, the metrics, and whether the weights moved."""
    batch = Batch(rows, state.student.device)
    terms, report, inputs = plan(state, batch, groups)
    learned = backward(state, batch, terms)
    learned.fill(inputs)
    rows = with_taught(without_hidden_states(rows, batch, learned.tokens), batch, terms, learned.tokens, inputs)
    result = state.optimizer.step(state.step)
    metrics = [
        *describe_batch(terms, learned.tokens, learned.num_empty_support),
        *(describe_weights(inputs, state.weights) if terms and state.weights.parts else ()),
        *(Metric(f"method/{name}", number) for name, number in report.numbers.items()),
        Metric("train/loss", learned.loss if report.loss is None else report.loss),
        Metric("train/grad_norm", result.grad_norm),
        Metric("train/lr", state.optimizer.lr(state.step), "last"),
        Metric("train/num_skipped_steps", float(result.skipped), "sum"),
    ]
    return rows, metrics, not result.skipped


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
