"""The proof that an episode is scored as it was sampled: made with the run's own environment before its first step.

A row of several turns is sampled piece by piece and scored in one. So a few episodes are played, and what the sampler
said of every token of the model is compared with what the student says of the whole row. A mask that is one token off
would compare other tokens, and must be told from a right one: where it would not be, the proof says that it shows
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Sampler, SamplingParams, Scorer
from opdkit.errors import UserError
from opdkit.rollouts.episodes import play
from opdkit.rollouts.stage import Stage
from opdkit.tasks.base import Task
from opdkit.training.models.student_server import EXACT, LOW
from opdkit.types import Asked, FloatArray, Problem, Rollout

NUM_EPISODES = 4
AS_SURE = 10.0  # a shifted mask must differ by so many times what is allowed


def prove_episodes(
    stage: Stage,
    *,
    sampler: Sampler,
    scorer: Scorer,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    problems: Sequence[Problem],
    seed: int,
    exact: bool,
) -> list[str]:
    """What is doubtful, a sentence each. scorer: the student, with the sampler's weights; exact: in float32.

    Raises UserError where the two differ, and where no environment begins.
    """
    whole = replace(params, top_p=1.0, top_k=0, min_p=0.0)
    played = play(
        [(problem, 0) for problem in problems[:NUM_EPISODES]],
        stage=stage,
        sampler=sampler,
        renderer=renderer,
        task=task,
        params=replace(whole, temperature=whole.temperature or 1.0),
        identity=(seed, "proof"),
        policy_version=0,
        group_size=1,
    )
    rows = [row for one in played for row in one.rollouts if row.answer_mask.any()]
    if not rows:
        return ["no episode had a turn to prove that episodes are scored as they were sampled"]
    signals = scorer.score(
        [row.prompt_ids for row in rows],
        [row.answer_ids for row in rows],
        Asked("sampled"),
        temperature=whole.temperature or 1.0,
    )
    allowed = EXACT if exact else LOW[1]
    said = [np.asarray(signal.sampled_logprob_T) for signal in signals]
    gap = float(np.max([_gap(row, said_T, 0) for row, said_T in zip(rows, said, strict=True)]))
    if not gap <= allowed:  # NaN, which `np.max` keeps, is over every limit
        raise UserError(
            f"an episode is not scored as it was sampled: a token of the model differs by {gap:.2g} nats, where "
            f"{allowed:g} is allowed; the stream, its mask or the engine is wrong, which is a fault of opdkit or "
            "of the engine: please report it"
        )
    return list(_powerless(rows, said, allowed))


def _powerless(rows: Sequence[Rollout], said: Sequence[FloatArray], allowed: float) -> Iterator[str]:
    """A mask that is one token off compares the sampler's word with the scorer's of the token before or behind."""
    shifted = [_gap(row, said_T, by) for row, said_T in zip(rows, said, strict=True) for by in (-1, 1)]
    if not min(shifted) > AS_SURE * allowed:
        yield (
            "the proof that episodes are scored as they were sampled would not see a mask that is one token off here "
            f"(log-probs side by side differ by {min(shifted):.2g} nats at most): the student's distributions are "
            "nearly all alike"
        )


def _gap(row: Rollout, said_T: FloatArray, shift: int) -> float:
    """The largest difference over the model's tokens, `shift` places apart."""
    assert row.answer_logprobs is not None
    places = np.flatnonzero(row.answer_mask)
    others = places + shift
    inside = (others >= 0) & (others < len(said_T))
    apart = np.abs(row.answer_logprobs[places[inside]].astype(np.float64) - said_T[others[inside]])
    return float(apart.max()) if len(apart) else float("inf")
