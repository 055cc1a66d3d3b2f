"""Problems in, groups of rollouts out, graded where they can be, whoever wrote the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opdkit.contexts.render import Renderer
from opdkit.contexts.transcript import last_turn
from opdkit.engines.base import Progress, Sampled, Sampler, SamplingParams
from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks
from opdkit.rollouts.episodes import Played, play
from opdkit.rollouts.stage import Stage
from opdkit.tasks.base import Task, can_grade
from opdkit.types import AUTHORS, Group, Problem, Rollout, seed_from

Answer = Rollout | Played  # of one turn, or an episode


def sample_share(
    problems: Sequence[Problem],
    *,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    group_size: int,
    identity: tuple[int | str, ...],
    policy_version: int,
    progress: Progress | None = None,
    read: Mapping[str, Sequence[int]] | None = None,
    ranks: Ranks = ALONE,
    stage: Stage | None = None,
) -> Sequence[Answer]:
    """This rank's share of `group_size` graded answers to every problem; of all shares `groups_of` makes the groups.

    read: as in `sample_rollouts`. stage: where answers are episodes of several turns.
    """
    asked = [(problem, sample_id) for problem in problems for sample_id in range(group_size)]
    if stage is not None:
        return play(
            ranks.share(asked),
            stage=stage,
            sampler=sampler,
            renderer=renderer,
            task=task,
            params=params,
            identity=identity,
            policy_version=policy_version,
            group_size=group_size,
            progress=progress,
        )
    return sample_rollouts(
        ranks.share(asked),
        sampler=sampler,
        renderer=renderer,
        task=task,
        params=params,
        identity=identity,
        policy_version=policy_version,
        progress=progress,
        read=read,
    )


def groups_of(problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Group]:
    """answers: equally many to each problem, in their order."""
    size = len(answers) // max(1, len(problems))
    return [_group(problem, answers[i * size : (i + 1) * size]) for i, problem in enumerate(problems)]


def _group(problem: Problem, answers: Sequence[Answer]) -> Group:
    """The problem is asked as its episodes began; one whose environment did not begin says nothing of that."""
    played = [one for one in answers if isinstance(one, Played)]
    if not played:
        return Group(problem=problem, rollouts=tuple(one for one in answers if isinstance(one, Rollout)))
    began = next((one for one in played if one.why is None), played[0])
    return Group(problem=began.asked(problem), rollouts=tuple(r for one in played for r in one.rollouts))


def sample_rollouts(
    asked: Sequence[tuple[Problem, int]],
    *,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    identity: tuple[int | str, ...],
    policy_version: int,
    progress: Progress | None = None,
    read: Mapping[str, Sequence[int]] | None = None,
    kept: Callable[[list[Rollout]], None] | None = None,
    stage: Stage | None = None,
) -> list[Rollout]:
    """A graded answer to every (problem, sample id).

    read: problem id -> what the sampler reads in place of the problem's own prompt, which the rollout keeps.
    kept: gets every rollout once, graded, a few at a time as they are finished; also those before an `Interrupted`.
    The seed of an answer is (identity, problem id, sample id): the same on one rank or eight, in any order, and after a
    resume. `identity` says which run, which step and what for. stage: as in `sample_share`; of an episode in several
    rows the last one comes back.
    """
    if stage is not None:
        played = play(
            asked,
            stage=stage,
            sampler=sampler,
            renderer=renderer,
            task=task,
            params=params,
            identity=identity,
            policy_version=policy_version,
            group_size=1 + max((sample_id for _, sample_id in asked), default=0),
            progress=progress,
            kept=None if kept is None else lambda played: kept([one.answer for one in played]),
        )
        return [one.answer for one in played]
    prompts = {problem.id: renderer.asked_ids(problem) for problem, _ in asked}
    graded: dict[int, Rollout] = {}

    def finished(answers: Mapping[int, Sampled]) -> None:
        rollouts = [
            Rollout(
                problem_id=asked[index][0].id,
                sample_id=asked[index][1],
                policy_version=policy_version,
                prompt_ids=prompts[asked[index][0].id],
                answer_ids=answer.answer_ids,
                answer_logprobs=answer.logprobs_T,
                uncut_logprobs=answer.uncut_logprobs_T,
                answer_mask=np.ones(len(answer.answer_ids), dtype=np.bool_),
                finish=answer.finish,
            )
            for index, answer in answers.items()
        ]
        fresh = grade([asked[index][0] for index in answers], rollouts, renderer, task)
        graded.update(zip(answers, fresh, strict=True))
        if kept is not None and fresh:
            kept(fresh)

    sampler.sample(
        [(read or {}).get(problem.id, prompts[problem.id]) for problem, _ in asked],
        [seed_from(*identity, problem.id, sample_id) for problem, sample_id in asked],
        params,
        progress,
        finished,
    )
    return [graded[index] for index in range(len(asked))]


def grade(problems: Sequence[Problem], rollouts: Sequence[Rollout], renderer: Renderer, task: Task) -> list[Rollout]:
    """The rollouts with their rewards. The grader is not asked of problems that it cannot grade (no gold answer, no
    task): their rewards stay unknown."""
    items = [
        (problem, renderer.answer_text(last_turn(rollout)))
        for problem, rollout in zip(problems, rollouts, strict=True)
        if can_grade(task, problem)
    ]
    grades = iter(task.grade(items) if items else ())
    graded = []
    for problem, rollout in zip(problems, rollouts, strict=True):
        if can_grade(task, problem):
            g = next(grades)
            rollout = replace(rollout, reward=g.score, parsed=g.parsed, feedback=g.feedback)
        graded.append(rollout)
    return graded


def dataset_groups(
    problems: Sequence[Problem], *, renderer: Renderer, stop_id: int, max_answer_tokens: int, policy_version: int
) -> list[Group]:
    """The data set's own solutions as answers, one to a problem, each closed by the stop token.

    A solution over the limit is cut and ends with finish "length": its end was not seen, so it is not taught to stop.
    """
    groups = []
    for problem in problems:
        if problem.solution is None:
            raise UserError(
                f'method.name = "sft" with answers = "dataset" trains on solutions, but problem {problem.id} has none; '
                'use data with a solution column, or answers = "teacher"'
            )
        ids = renderer.encode(renderer.beginning_of(problem.solution, max_answer_tokens))
        finished = len(ids) < max_answer_tokens
        answer_ids = (*ids, stop_id) if finished else ids[:max_answer_tokens]
        rollout = Rollout(
            problem_id=problem.id,
            sample_id=0,
            policy_version=policy_version,
            prompt_ids=renderer.asked_ids(problem),
            answer_ids=answer_ids,
            answer_logprobs=None,
            answer_mask=np.ones(len(answer_ids), dtype=np.bool_),
            finish="stop" if finished else "length",
        )
        groups.append(written_by("data", Group(problem=problem, rollouts=(rollout,))))
    return groups


def written_by(author: str, group: Group) -> Group:
    """The same answers, every token of them by this one of AUTHORS."""
    number = AUTHORS.index(author)
    rollouts = (replace(r, author=np.full(len(r.answer_ids), number, dtype=np.uint8)) for r in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


def read_by(renderer: Renderer, group: Group) -> Group:
    """The same answers behind the prompt as another model reads it (its own chat template)."""
    prompt_ids = renderer.asked_ids(group.problem)
    return replace(group, rollouts=tuple(replace(rollout, prompt_ids=prompt_ids) for rollout in group.rollouts))
