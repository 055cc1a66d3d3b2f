"""From the answers that `opdkit fit` asked for to the facts that its rules read (`measure/fit.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opdkit.contexts.render import Renderer
from opdkit.measure.accuracy import answers_of, problem_scores
from opdkit.measure.fit_facts import Continuation, Facts, Pattern, Spread
from opdkit.measure.intervals import Difference, estimate_difference, estimate_mean, paired_difference
from opdkit.measure.overlap import TokenTable, summary
from opdkit.measure.ranking import METRICS, problem_metrics
from opdkit.recipe import Recipe
from opdkit.training.models.sides import Sides
from opdkit.training.parts import Parts
from opdkit.types import Example, Problem

MASSES_AT = (4, 16, 64)  # Rethinking OPD: a list of 1 is worst, lists of 4, 16 and 64 are about equal
THINK_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>", "<reasoning>", "</reasoning>", "<|channel|>analysis")


@dataclass(frozen=True, slots=True)
class Answered:
    """What was asked and answered. `read`: the student's answers with their views; `went_on`: prefix -> (the student's
    answers, as the teacher would have gone on from there)."""

    problems: Sequence[Problem]
    prompt_limit: int  # tokens; what is longer leaves no room for an answer, or is over data.max_prompt_tokens
    share_long_prompts: float  # of the data's problems
    rows: Sequence[Example]
    read: Sequence[Example]
    went_on: Mapping[int, tuple[Sequence[Example], Sequence[Example]]]
    heard: Mapping[str, float | None] | None = None  # `span_shares`, of a teacher with another tokenizer


def facts_of(recipe: Recipe, parts: Parts, sides: Sides, answered: Answered, table: TokenTable, k: int) -> Facts:
    """`table` is of `answered.read`, with lists of k and the masses of `MASSES_AT`."""
    rows = answered.rows
    lengths = [len(row.rollout.answer_ids) for row in rows]
    prompts = [len(parts.renderer.prompt_ids(problem.messages)) for problem in answered.problems]
    scores = problem_scores(answers_of([row.rollout for row in rows]))
    rates = [s.num_correct / s.num_graded for s in scores if s.num_graded]
    overlap = summary(table)
    masses, coverage = _masses(overlap)
    method = recipe.method
    return Facts(
        k=k,
        num_ids=parts.student.num_tokens,
        overlap=overlap,
        first_token=summary(table.where(table.index_N == 0)),
        top_mass=masses,
        coverage=coverage,
        student=estimate_mean([s.mean_reward for s in scores]),
        gain=_gain(answered),
        continuations=[
            Continuation(prefix_tokens=prefix, advantage=_advantage(own, went_on), num_answers=len(own))
            for prefix, (own, went_on) in answered.went_on.items()
        ],
        reward_auc=_reward_auc(answered.read, table),
        pass_rates=rates,
        answer_tokens=_spread(lengths),
        prompt_tokens=_spread(prompts),
        max_answer_tokens=recipe.sampling.max_answer_tokens,
        max_prompt_tokens=answered.prompt_limit,
        share_truncated=sum(row.rollout.finish == "length" for row in rows) / len(rows),
        share_unread=1 - len(answered.read) / len(rows),
        share_long_prompts=answered.share_long_prompts,
        pattern=_pattern(parts, sides, answered, table),
        context=recipe.context.kind,
        divergence=getattr(method, "divergence", None),
        support=getattr(method, "support", None),
        heard=answered.heard,
    )


def _masses(overlap: Mapping[str, float | None]) -> tuple[dict[int, float], dict[int, float]]:
    """k -> (the smaller of both sides' mass on their own lists; the teacher's on the student's), where measured."""
    masses, coverage = {}, {}
    for most in MASSES_AT:
        student, teacher, covered = (
            overlap.get(f"{name}@{most}")
            for name in ("student_top_mass", "teacher_top_mass", "teacher_mass_on_student_top")
        )
        if student is not None and teacher is not None and covered is not None:
            masses[most], coverage[most] = min(student, teacher), covered
    return masses, coverage


def _gain(answered: Answered) -> Difference | None:
    """The teacher's reward minus the student's, over the problems that both answered and that could be graded."""
    if 0 not in answered.went_on:
        return None
    _, gone_on = answered.went_on[0]
    means = []
    for rows in (answered.rows, gone_on):
        scores = problem_scores(answers_of([row.rollout for row in rows]))
        means.append({s.problem_id: s.mean_reward for s in scores if s.mean_reward is not None})
    both = means[0].keys() & means[1].keys()
    student, teacher = ({name: side[name] for name in both} for side in means)
    return paired_difference(student, teacher) if both else None


def _advantage(own: Sequence[Example], gone_on: Sequence[Example]) -> Difference:
    """Mean over problems of (the teacher's reward - the answer's own). The answer itself is what the student made of
    that prefix, so it is not sampled again."""
    rewards: dict[str, list[tuple[float, float]]] = {}
    for row, other in zip(own, gone_on, strict=True):
        assert row.rollout.key == other.rollout.key
        if row.rollout.reward is not None and other.rollout.reward is not None:
            rewards.setdefault(row.problem.id, []).append((row.rollout.reward, other.rollout.reward))
    own_P, went_on_P = np.array([np.mean(some, axis=0) for some in rewards.values()]).reshape(-1, 2).T
    return estimate_difference(own_P, went_on_P)


def _reward_auc(read: Sequence[Example], table: TokenTable) -> float | None:
    """Of the mean log q - log p of an answer for its correctness, over all answers; None where all are alike."""
    reward_N = table.columns["teacher_logprob"] - table.columns["student_logprob"]
    sums = np.bincount(table.row_N, weights=reward_N, minlength=len(read))
    scores = sums / np.maximum(np.bincount(table.row_N, minlength=len(read)), 1)
    graded = np.array([row.rollout.reward is not None for row in read])
    rewards = np.array([row.rollout.reward for row in read if row.rollout.reward is not None])
    if not len(rewards):
        return None
    found = problem_metrics(scores[graded][None], rewards[None], (rewards >= 1.0)[None])
    value = float(found[0, METRICS.index("success_auc")])
    return None if np.isnan(value) else value


def _pattern(parts: Parts, sides: Sides, answered: Answered, table: TokenTable) -> Pattern:
    teacher, student = parts.teacher, parts.renderer
    assert teacher is not None and sides.teacher is not None
    prompts = [problem.messages for problem in answered.problems]
    finished = np.array([row.rollout.finish == "stop" for row in answered.read])
    last_N = (table.index_N == table.length_N - 1) & finished[table.row_N]
    stops = [
        float(np.exp(table.columns[f"{side}_logprob"][last_N]).mean()) if last_N.any() else None
        for side in ("student", "teacher")
    ]
    theirs = answered.went_on[0][1] if 0 in answered.went_on else []
    return Pattern(
        student_opening=sides.student.opening(prompts[0]),
        teacher_opening=sides.teacher.opening(prompts[0]),
        same_prompts=all(student.prompt_ids(m) == teacher.renderer.prompt_ids(m) for m in prompts),
        same_stop_ids=sides.student.stops.ids == sides.teacher.stops.ids,
        student_think=_think_share(student, answered.rows),
        teacher_think=_think_share(teacher.renderer, theirs) if theirs else None,
        student_stop=stops[0],
        teacher_stop=stops[1],
    )


def _think_share(renderer: Renderer, rows: Sequence[Example]) -> float:
    texts = [renderer.tokenizer.decode(row.rollout.answer_ids, skip_special_tokens=False) for row in rows]
    return sum(any(tag in text for tag in THINK_TAGS) for text in texts) / len(texts)


def _spread(lengths: Sequence[int]) -> Spread:
    median, p90 = np.percentile(lengths, [50, 90])
    return Spread(median=float(median), p90=float(p90), longest=max(lengths))
