"""`opdkit analyse position`: where along its answers can the student rely on the teacher?

    <out>/position.json     disagreement by relative position; viability of branches; how well position predicts it
    <out>/position.svg      both along the answer
    <out>/branches.jsonl    every branch, as it is graded: a second call samples only what is missing

Branches leave saved answers where the teacher prefers another token (at most one in each stretch of an answer); the
student goes on behind the teacher's token, and the answer is graded. Definitions: `measure/position.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.analysis.overlap import MAX_TOKENS_PER_BATCH, source_names
from opdkit.analysis.two_models import Models, Pair, Reading, Source, read_source
from opdkit.contexts.render import Renderer
from opdkit.contexts.transcript import check_one_turn
from opdkit.engines.base import SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.load import model_digest
from opdkit.measure.overlap import TokenTable, by_relative_position, default_k, summary
from opdkit.measure.position import Branch, by_position, predictors
from opdkit.reporting.figures.overlap import position_figure
from opdkit.rollouts.single_turn import grade
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.folder import atomic_write
from opdkit.run.jsonl import append_lines, open_lines
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import check_identity
from opdkit.tasks.base import Task
from opdkit.tasks.guard import make_task
from opdkit.tasks.options import resolve_task
from opdkit.training.metrics.agreement import ComparedPart, compare_parts, student_side, teacher_side
from opdkit.types import Example, Rollout, seed_from

BRANCHES_PER_PART = 64  # what a crash can cost
NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionOptions:
    source: Path
    reading: Reading
    per_answer: int = 4  # branches, at most one in each of so many stretches of an answer
    continuations: int = 2  # of each branch
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class _Fork:
    """A place to leave an answer at, and the branch as far as it is known before it is sampled."""

    row: Example
    token: int  # the teacher's
    branch: Branch


def analyse_position(options: PositionOptions, *, console: Console) -> dict[str, Any]:
    """Compare, branch, grade, write; returns what position.json holds. Raises UserError, Interrupted."""
    (name,) = source_names([options.source])
    out = options.out or Path("runs") / "position" / name
    with Lock.on_folder(out):
        return _analyse_position(options, name, out, console)


def _analyse_position(options: PositionOptions, name: str, out: Path, console: Console) -> dict[str, Any]:
    source = read_source(options.source, name, options.reading)
    check_one_turn((row.rollout for row in source.rows), "opdkit analyse position")
    interrupt, models = Interrupt(console), Models(options.reading.device, options.reading.trust_remote_code)
    pair = models.pair(source, options.reading)
    say(console, f"{source.name}: {pair.told()}")
    params = _params(source, pair)
    told = resolve_task(source.recipe["data"]["task"] if source.recipe else pair.rows[0].problem.task)
    asked = {
        "rows": source.rows_digest,  # another step, or a run made anew, has other answers to the same problems
        "student": source.student,
        "student_files": model_digest(Path(source.student)) if source.student else None,
        "teacher": source.teacher,
        "teacher_files": model_digest(Path(source.teacher)) if source.teacher else None,
        "sampling": params.identity,
        "task": told.text,
        "continuations": options.continuations,
        "seed": options.reading.seed,
    }
    task = make_task(told)
    try:
        with interrupt.listening():
            table, forks = _compare(source, pair, options, console, interrupt)
            branches = _branched(forks, pair, params, task.main, asked, out, options, console, interrupt)
    finally:
        task.close()
    found: dict[str, Any] = {
        **asked,
        "num_answers": len(pair.rows),
        "num_left_out": pair.num_left_out,
        "by_relative_position": [
            {"from": start, "to": end, **summary(part)}
            for (start, end), part in by_relative_position(table, NUM_BINS).items()
        ],
        "branches": by_position(branches, NUM_BINS),
        "predictors": predictors(branches) if branches else {},
        "num_branches": len(branches),
    }
    atomic_write(out / "position.json", json.dumps(found, indent=1) + "\n")
    atomic_write(out / "position.svg", position_figure(found["by_relative_position"], found["branches"]))
    say(console, f"wrote {out / 'position.json'} and position.svg")
    return found


def _params(source: Source, pair: Pair) -> SamplingParams:
    """As the run sampled; for rows without a recipe the plain distribution, and the longest answer as the cap."""
    if source.recipe is None:
        return SamplingParams(max_answer_tokens=max(len(row.rollout.answer_ids) for row in pair.rows))
    names = ("temperature", "top_p", "top_k", "min_p", "max_answer_tokens")
    return SamplingParams(**{name: source.recipe["sampling"][name] for name in names})


def _compare(
    source: Source, pair: Pair, options: PositionOptions, console: Console, interrupt: Interrupt
) -> tuple[TokenTable, list[_Fork]]:
    student, teacher = (HFEngine(m, max_tokens_per_batch=MAX_TOKENS_PER_BATCH) for m in (pair.student, pair.teacher))
    tables, forks = [], []
    with Bar(console, f"{source.name}: both read", len(pair.rows)) as bar:

        def heard(done: int, total: int) -> None:
            bar.update(done)
            interrupt.check()

        for part in compare_parts(
            pair.rows,
            student_side(student.score, pair.student.head()),
            teacher_side(teacher.score, pair.teacher.head()),
            k=default_k(pair.student.num_tokens),
            temperature=source.temperature,
            device=pair.student.device,
            progress=heard,
        ):
            tables.append(part.table())
            forks += _forks(part, pair.rows, options)
    return TokenTable.joined(tables), forks


def _forks(part: ComparedPart, rows: Sequence[Example], options: PositionOptions) -> list[_Fork]:
    """In each stretch of an answer one token, drawn by the seed, of those where the teacher prefers another one."""
    said = part.compared
    chosen: dict[tuple[int, int], tuple[int, _Fork]] = {}
    for n in range(len(part.row_N)):
        row, index, length = rows[part.row_N[n]], int(part.index_N[n]), int(part.length_N[n])
        token = int(said.teacher_ids_NK[n, 0])
        if token == row.rollout.answer_ids[index]:
            continue
        place = (int(part.row_N[n]), index * options.per_answer // length)
        draw = seed_from(options.reading.seed, "fork", *row.rollout.key, index)
        if place not in chosen or draw < chosen[place][0]:
            branch = Branch(
                problem_id=row.problem.id,
                sample_id=row.rollout.sample_id,
                index=index,
                length=length,
                rewards=(),
                own_reward=row.rollout.reward,
                student_entropy=float(said.student_entropy_N[n]),
                teacher_entropy=float(said.teacher_entropy_N[n]),
                reverse_kl=float(said.reverse_kl_N[n]),
                student_logprob=float(said.student_at_teacher_NK[n, 0]),
                teacher_logprob=float(said.teacher_logprob_NK[n, 0]),
            )
            chosen[place] = (draw, _Fork(row, token, branch))
    return [fork for _, fork in chosen.values()]


def _branched(
    forks: Sequence[_Fork],
    pair: Pair,
    params: SamplingParams,
    task: Task,
    asked: Mapping[str, Any],
    out: Path,
    options: PositionOptions,
    console: Console,
    interrupt: Interrupt,
) -> list[Branch]:
    path = out / "branches.jsonl"
    lines, header = open_lines(path), {"identity": json.loads(json.dumps(asked))}
    if lines:
        check_identity(path, lines[0]["identity"], header["identity"])
    else:
        append_lines(path, [header])
    known = [Branch(**{**line, "rewards": tuple(line["rewards"])}) for line in lines[1:]]
    kept = {(b.problem_id, b.sample_id, b.index): b for b in known}
    # Neighbours in length together: a part is sampled as far as its shortest prefix allows.
    missing = sorted((f for f in forks if _key(f) not in kept), key=lambda f: f.branch.index)
    engine = HFEngine(pair.student, max_tokens_per_batch=MAX_TOKENS_PER_BATCH)
    renderer = pair.student.renderer()
    with Bar(console, "branches", len(forks), done=len(forks) - len(missing)) as bar:
        for start in range(0, len(missing), BRANCHES_PER_PART):
            some = missing[start : start + BRANCHES_PER_PART]
            fresh = _grown(some, pair, params, task, engine, renderer, options)
            append_lines(path, [asdict(branch) for branch in fresh])
            kept |= {(b.problem_id, b.sample_id, b.index): b for b in fresh}
            bar.update(len(forks) - len(missing) + start + len(some))
            interrupt.check()
    return [kept[_key(fork)] for fork in forks]


def _key(fork: _Fork) -> tuple[str, int, int]:
    return fork.branch.problem_id, fork.branch.sample_id, fork.branch.index


def _grown(
    forks: Sequence[_Fork],
    pair: Pair,
    params: SamplingParams,
    task: Task,
    engine: HFEngine,
    renderer: Renderer,
    options: PositionOptions,
) -> list[Branch]:
    """The branches with their rewards. A teacher's token that ends the answer, or that the cap does, is one
    continuation of no tokens."""
    rollouts: list[tuple[_Fork, Rollout]] = []
    growing: list[tuple[_Fork, int]] = []
    for fork in forks:
        ends = fork.token in pair.student.stop_ids
        if ends or fork.branch.index + 1 >= params.max_answer_tokens:
            rollouts.append((fork, _rollout(fork, (), "stop" if ends else "length")))
        else:
            growing += [(fork, number) for number in range(options.continuations)]
    if growing:
        shortest = min(fork.branch.index for fork, _ in growing)
        sampled = engine.sample(
            [(*fork.row.rollout.prompt_ids, *_prefix(fork)) for fork, _ in growing],
            [seed_from(options.reading.seed, "branch", *_key(fork), number) for fork, number in growing],
            replace(params, max_answer_tokens=params.max_answer_tokens - shortest - 1),
        )
        for (fork, _), answer in zip(growing, sampled, strict=True):
            room = params.max_answer_tokens - fork.branch.index - 1
            cut = len(answer.answer_ids) > room
            rollouts.append((fork, _rollout(fork, answer.answer_ids[:room], "length" if cut else answer.finish)))
    graded = grade([fork.row.problem for fork, _ in rollouts], [r for _, r in rollouts], renderer, task)
    rewards: dict[tuple[str, int, int], list[float | None]] = {_key(fork): [] for fork in forks}
    for (fork, _), rollout in zip(rollouts, graded, strict=True):
        rewards[_key(fork)].append(rollout.reward)
    return [replace(fork.branch, rewards=tuple(rewards[_key(fork)])) for fork in forks]


def _prefix(fork: _Fork) -> tuple[int, ...]:
    return (*fork.row.rollout.answer_ids[: fork.branch.index], fork.token)


def _rollout(fork: _Fork, more: Sequence[int], finish: Any) -> Rollout:
    answer_ids = (*_prefix(fork), *more)
    return Rollout(
        problem_id=fork.row.problem.id,
        sample_id=fork.row.rollout.sample_id,
        policy_version=fork.row.rollout.policy_version,
        prompt_ids=fork.row.rollout.prompt_ids,
        answer_ids=answer_ids,
        answer_logprobs=None,
        answer_mask=np.arange(len(answer_ids)) > fork.branch.index,
        author=np.zeros(len(answer_ids), dtype=np.uint8),
        finish=finish,
    )
