"""One training step, as a straight line. It knows no method, no paper and no engine by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opdkit import losses
from opdkit.contexts import Context, build_views
from opdkit.engines.model import LanguageModel
from opdkit.losses.spec import LossSpec, NegativeLogLikelihood, TeacherAdvantage
from opdkit.methods.base import Method, PlanInputs, Report
from opdkit.methods.weighting import Weights
from opdkit.metrics import Metric
from opdkit.recipe import DiagnosticsSection
from opdkit.train.batch import Batch, Part, StudentStats
from opdkit.train.describe import describe_batch, describe_rows, describe_weights
from opdkit.train.diagnose import diagnose
from opdkit.train.optimizer import Optimizer
from opdkit.train.taught import with_taught
from opdkit.train.teacher import Teacher
from opdkit.types import Example, Group, Needs, Problem, TeacherSignal, TeacherView

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
    updates_per_step: int
    num_steps: int
    seed: int
    weights: Weights = field(default_factory=Weights)
    diagnostics: DiagnosticsSection | None = None
    step: int = 0  # steps taken
    # Since the run began, saved in checkpoints:
    counters: dict[str, float] = field(default_factory=dict)
    pass_rates: dict[str, float] = field(default_factory=dict)  # of problems whose first one is kept

    @property
    def needs(self) -> Needs:
        return self.method.needs | self.weights.needs


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
    return rows, [*describe_rows(rows, asks_teacher=asks_teacher(state)), *agreement, *told]


def update(state: State, groups: Sequence[Group], rows: list[Example]) -> tuple[list[Example], list[Metric], bool]:
    """One movement of the weights: coefficients of all these rows, gradients, the optimizer. Returns the rows with what
    they were taught, the metrics, and whether the weights moved."""
    absent = [row for row in rows if asks_teacher(state) and row.signal is None]
    batch = Batch([row for row in rows if not asks_teacher(state) or row.signal is not None], state.student.device)
    terms, report, inputs = plan(state, batch, absent, groups)
    learned = backward(state, batch, terms)
    if inputs is not None:
        learned.fill(inputs)
    rows = with_taught(without_hidden_states(rows, batch, learned), batch, terms, learned.tokens)
    result = state.optimizer.step(state.step)
    metrics = [
        *describe_batch(terms, learned.tokens, learned.num_empty_support),
        *(describe_weights(inputs) if inputs is not None and state.weights.parts else ()),
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


def asks_teacher(state: State) -> bool:
    return state.needs.teacher != "none"


def view_groups(state: State, groups: Sequence[Group]) -> list[TeacherView | None]:
    """What the teacher reads for each rollout; None where it has nothing to read."""
    if not asks_teacher(state):
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
        seen |= {f"{name}/unclipped": value_n for name, value_n in out.unclipped_loss.items()}
        if "teacher" in out.view_sampled_logprob:
            seen["teacher_logprob"] = out.view_sampled_logprob["teacher"]
        for name, seen_n in seen.items():
            self.tokens.setdefault(name, seen_n.new_full((num_tokens,), torch.nan))[tokens_n] = seen_n

    def fill(self, inputs: PlanInputs) -> None:
        """Tokens that the loss left out, with what was known of them before the update."""
        known = {
            "entropy": inputs.student_entropy_N,
            "logprob": inputs.student_logprob_N,
            "teacher_logprob": inputs.teacher_logprob_N,
        }
        for name, known_N in known.items():
            if known_N is not None:
                seen_N = self.tokens.get(name, known_N)
                self.tokens[name] = torch.where(seen_N.isnan(), known_N.to(seen_N.dtype), seen_N)


def plan(
    state: State, batch: Batch, absent: Sequence[Example], groups: Sequence[Group]
) -> tuple[list[losses.Term], Report, PlanInputs | None]:
    """Every coefficient of the batch, before the first backward; what the method says of it; what both were made of."""
    if not batch.num_tokens:  # nobody had anything to read: the metrics say so, and the step changes nothing
        return [], Report(), None
    inputs = batch.plan_inputs(
        step=state.step,
        progress=state.step / state.num_steps,
        seed=state.seed,
        num_ids=state.student.num_tokens,
        student=student_stats(state, batch),
        pass_rates=state.weights.pass_rates(groups, state.pass_rates),
        absent=absent,
    )
    inputs = state.weights.apply(inputs)
    return state.method.terms(inputs), state.method.report(inputs), inputs


@torch.no_grad()
def student_stats(state: State, batch: Batch) -> StudentStats | None:
    """A pass without gradient, only made where coefficients depend on the student; None elsewhere."""
    asked = asked_before_the_update(state)
    if not asked:
        return None
    student, weights, teacher_head = state.student, state.optimizer.compute_weights(), head_of_teacher(state)
    head, ones_N = student.head(weights), torch.ones(batch.num_tokens, device=batch.device)
    terms = [losses.Term(name=name, loss=loss, coef_N=ones_N) for name, loss in asked.items()]
    seen = Learned()
    for part in batch.parts(state.max_tokens_per_micro_batch):
        out = losses.head_loss(
            hidden_of(student, part, weights),
            head,
            batch.ids_N[part.tokens_n],
            [term.take(part.tokens_n) for term in terms],
            batch.teacher_tokens(part, state.needs, teacher_head),
            temperature=state.method.loss_temperature,
        )
        seen.add(out, part.tokens_n, batch.num_tokens)
    scores = {name: seen.tokens[name] for name in asked}
    return StudentStats(seen.tokens["logprob"], seen.tokens["entropy"], scores, seen.tokens.get("teacher_logprob"))


def asked_before_the_update(state: State) -> dict[str, LossSpec]:
    """What must be scored for every token before coefficients are made, by name."""
    asked, asking = state.weights.scores, [state.method.needs, *(part.needs for part in state.weights.parts)]
    if state.needs.teacher == "distribution" and any(needs.teacher in ("sampled", "topk") for needs in asking):
        asked["teacher"] = TeacherAdvantage()  # whoever asked for log-probs gets them, read from hidden states
    if state.needs.student and not asked:
        asked["student"] = NegativeLogLikelihood()
    return asked


def hidden_of(student: LanguageModel, part: Part, weights: Mapping[str, Tensor] | None) -> Tensor:
    """[n, H] the student's hidden states behind the counted tokens of a part."""
    hidden = student.hidden(
        [row.rollout.prompt_ids for row in part.rows], [row.rollout.answer_ids for row in part.rows], weights=weights
    )
    return hidden if part.counted_n is None else hidden[part.counted_n]


def without_hidden_states(rows: list[Example], batch: Batch, learned: Learned) -> list[Example]:
    """The rows as they are kept: the teacher's hidden states give way to its log-probs of the sampled tokens, which the
    loss has just read from them (NaN for tokens it did not compute)."""
    known_N = learned.tokens.get("teacher_logprob")
    said = {} if known_N is None else {e.rollout.key: logprob_T for e, logprob_T in batch.per_row(known_N)}
    return [
        row
        if row.signal is None or row.signal.hidden_TH is None
        else replace(row, signal=replace(row.signal, hidden_TH=None, sampled_logprob_T=said.get(row.rollout.key)))
        for row in rows
    ]


def head_of_teacher(state: State) -> losses.Head | None:
    return state.teacher.head() if state.teacher and state.needs.teacher == "distribution" else None


def backward(state: State, batch: Batch, terms: Sequence[losses.Term]) -> Learned:
    """Gradients of the whole batch, a micro-batch at a time."""
    student, method = state.student, state.method
    teacher_head = head_of_teacher(state)
    learned = Learned()
    if not any(bool((term.coef_N != 0).any()) for term in terms):
        return learned  # nothing is counted anywhere: no gradient, and the optimizer will not move on memory alone
    for part in batch.parts(state.max_tokens_per_micro_batch):
        weights = state.optimizer.compute_weights()
        out = losses.head_loss(
            hidden_of(student, part, weights),
            student.head(weights),
            batch.ids_N[part.tokens_n],
            [term.take(part.tokens_n) for term in terms],
            batch.teacher_tokens(part, state.needs, teacher_head),
            temperature=method.loss_temperature,
        )
        out.loss.backward()
        learned.add(out, part.tokens_n, batch.num_tokens)
    return learned
