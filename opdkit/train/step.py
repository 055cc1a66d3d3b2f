"""One training step, as a straight line. It knows no method, no paper and no engine by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opdkit import losses
from opdkit.contexts import Context, build_views
from opdkit.engines.model import LanguageModel
from opdkit.methods.base import Method, Report
from opdkit.metrics import Metric
from opdkit.train.batch import Batch, Part, StudentStats
from opdkit.train.describe import describe_batch, describe_rows
from opdkit.train.optimizer import Optimizer
from opdkit.train.teacher import Teacher
from opdkit.types import Example, Group, Problem, TeacherSignal, TeacherView

Sample = Callable[[Sequence[Problem], int], list[Group]]  # (problems, step) -> graded groups


@dataclass(slots=True)
class State:
    """What a step reads and changes."""

    student: LanguageModel
    optimizer: Optimizer
    teacher: Teacher | None
    method: Method
    context: Context
    sample: Sample
    max_tokens_per_micro_batch: int
    num_steps: int
    seed: int
    step: int = 0  # steps taken
    counters: dict[str, float] = field(default_factory=dict)  # since the run began, saved in checkpoints


def train_step(state: State, problems: Sequence[Problem]) -> tuple[list[Example], list[Metric]]:
    """Sample, score, learn. Returns every row of the step, also those that taught nothing, and the step's metrics."""
    groups = state.sample(problems, state.step)
    views = view_groups(state, groups)
    signals = score(state, groups, views)
    rows = join(groups, views, signals)
    absent = [row for row in rows if asks_teacher(state) and row.signal is None]
    batch = Batch([row for row in rows if not asks_teacher(state) or row.signal is not None], state.student.device)
    terms, report = plan(state, batch, absent)
    learned = backward(state, batch, terms)
    rows = without_hidden_states(rows, batch, learned)
    result = state.optimizer.step(state.step)
    if state.teacher is not None and not result.skipped:
        state.teacher.after_step()
    state.step += 1
    metrics = [
        *describe_rows(rows, asks_teacher=asks_teacher(state)),
        *describe_batch(terms, learned.tokens, learned.num_empty_support),
        *(Metric(f"method/{name}", number) for name, number in report.numbers.items()),
        Metric("train/loss", learned.loss if report.loss is None else report.loss),
        Metric("train/grad_norm", result.grad_norm),
        Metric("train/lr", state.optimizer.lr(state.step - 1), "last"),
        Metric("train/num_skipped_steps", float(result.skipped), "sum"),
    ]
    return rows, metrics


def asks_teacher(state: State) -> bool:
    return state.method.needs.teacher != "none"


def view_groups(state: State, groups: Sequence[Group]) -> list[TeacherView | None]:
    """What the teacher reads for each rollout; None where it has nothing to read, or more than it has positions for."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not asks_teacher(state):
        return [None] * len(rollouts)
    assert state.teacher is not None
    renderer, room = state.teacher.renderer, state.teacher.model.max_positions
    views = build_views(groups, state.context, renderer, identity=(state.seed, state.step, "context"))
    return [
        view if view and (room is None or len(view.context_ids) + len(rollout.answer_ids) <= room) else None
        for view, rollout in zip(views, rollouts, strict=True)
    ]


def score(state: State, groups: Sequence[Group], views: Sequence[TeacherView | None]) -> list[TeacherSignal | None]:
    """What the teacher says of every rollout it has a view of."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    read = [(view, rollout) for view, rollout in zip(views, rollouts, strict=True) if view is not None]
    if not read:
        return [None] * len(rollouts)
    assert state.teacher is not None
    said = iter(
        state.teacher.score(
            [view.context_ids for view, _ in read],
            [rollout.answer_ids for _, rollout in read],
            state.method.needs,
            temperature=state.method.loss_temperature,
        )
    )
    # A whole batch of hidden states would fill an accelerator; they wait in host memory until their micro-batch comes.
    return [None if view is None else _in_host_memory(next(said)) for view in views]


def _in_host_memory(signal: TeacherSignal) -> TeacherSignal:
    return signal if signal.hidden_TH is None else replace(signal, hidden_TH=signal.hidden_TH.cpu())


def join(
    groups: Sequence[Group], views: Sequence[TeacherView | None], signals: Sequence[TeacherSignal | None]
) -> list[Example]:
    """From here on nothing is parallel."""
    asked = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    return [
        Example(problem=problem, rollout=rollout, view=view, signal=signal)
        for (problem, rollout), view, signal in zip(asked, views, signals, strict=True)
    ]


@dataclass(slots=True)
class Learned:
    """What the passes over a batch saw. `tokens`: per name one number per counted token, NaN where not computed."""

    loss: float = 0.0
    tokens: dict[str, Tensor] = field(default_factory=dict)
    num_empty_support: Counter[str] = field(default_factory=Counter)

    def add(self, out: losses.HeadOutput, tokens_n: Tensor, num_tokens: int) -> None:
        self.loss += float(out.loss.detach())
        self.num_empty_support.update(out.num_empty_support)
        seen = {**out.token_loss, "entropy": out.entropy_N, "logprob": out.sampled_logprob_N}
        if out.teacher_sampled_logprob_N is not None:
            seen["teacher_logprob"] = out.teacher_sampled_logprob_N
        for name, seen_n in seen.items():
            self.tokens.setdefault(name, seen_n.new_full((num_tokens,), torch.nan))[tokens_n] = seen_n


def plan(state: State, batch: Batch, absent: Sequence[Example]) -> tuple[list[losses.Term], Report]:
    """Every coefficient of the batch, before the first backward; and what the method says of it."""
    if not batch.num_tokens:  # nobody had anything to read: the metrics say so, and the step changes nothing
        return [], Report()
    stats = student_stats(state, batch) if state.method.needs.student else None
    progress = state.step / state.num_steps
    inputs = batch.plan_inputs(step=state.step, progress=progress, student=stats, absent=absent)
    return state.method.terms(inputs), state.method.report(inputs)


@torch.no_grad()
def student_stats(state: State, batch: Batch) -> StudentStats:
    """A pass without gradient, only made for methods whose coefficients depend on the student."""
    student, weights = state.student, state.optimizer.compute_weights()
    head, logprob_N, entropy_N = student.head(weights), batch.new_per_token(), batch.new_per_token()
    for part in batch.parts(state.max_tokens_per_micro_batch):
        stats = losses.head_stats(
            hidden_of(student, part, weights),
            head,
            sampled_ids_N=batch.ids_N[part.tokens_n],
            entropy=True,
            temperature=state.method.loss_temperature,
        )
        assert stats.sampled_logprob_N is not None and stats.entropy_N is not None
        logprob_N[part.tokens_n], entropy_N[part.tokens_n] = stats.sampled_logprob_N, stats.entropy_N
    return StudentStats(logprob_N, entropy_N)


def hidden_of(student: LanguageModel, part: Part, weights: Mapping[str, Tensor] | None) -> Tensor:
    """[n, H] the student's hidden states behind the counted tokens of a part."""
    hidden = student.hidden(
        [row.rollout.prompt_ids for row in part.rows], [row.rollout.answer_ids for row in part.rows], weights=weights
    )
    return hidden if part.counted_n is None else hidden[part.counted_n]


def without_hidden_states(rows: list[Example], batch: Batch, learned: Learned) -> list[Example]:
    """The rows as they are kept: the teacher's hidden states give way to its log-probs of the sampled tokens, which the
    loss has just read from them (NaN for tokens it did not compute)."""
    if "teacher_logprob" not in learned.tokens:
        return rows
    said = {e.rollout.key: logprob_T for e, logprob_T in batch.per_row(learned.tokens["teacher_logprob"])}
    return [
        row
        if row.signal is None or row.signal.hidden_TH is None
        else replace(row, signal=replace(row.signal, hidden_TH=None, sampled_logprob_T=said[row.rollout.key]))
        for row in rows
    ]


def backward(state: State, batch: Batch, terms: Sequence[losses.Term]) -> Learned:
    """Gradients of the whole batch, a micro-batch at a time."""
    student, method = state.student, state.method
    teacher_head = state.teacher.head() if state.teacher and method.needs.teacher == "distribution" else None
    learned = Learned()
    for part in batch.parts(state.max_tokens_per_micro_batch):
        weights = state.optimizer.compute_weights()
        out = losses.head_loss(
            hidden_of(student, part, weights),
            student.head(weights),
            batch.ids_N[part.tokens_n],
            [term.take(part.tokens_n) for term in terms],
            batch.teacher_tokens(part, method.needs, teacher_head),
            temperature=method.loss_temperature,
        )
        out.loss.backward()
        learned.add(out, part.tokens_n, batch.num_tokens)
    return learned
