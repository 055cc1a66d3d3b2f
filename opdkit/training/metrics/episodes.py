"""Episodes to metrics: turns, who wrote how much, calls and what failed, how they ended, and the same turn by turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np

from opdkit.contexts.transcript import whole_episodes
from opdkit.losses.names import DivergenceKind
from opdkit.metrics import Metric
from opdkit.rollouts.stage import Counts
from opdkit.types import AUTHORS, Ended, Example, FloatArray, TurnRecord

MOST_TURNS = 16  # that have metrics of their own
_TOOL = AUTHORS.index("tool")


def describe_episodes(rows: Sequence[Example]) -> list[Metric]:
    """Of a step's rows; nothing where none is an episode. An episode in several rows counts once."""
    if not any(row.rollout.turns or row.rollout.ended != "answer" for row in rows):
        return []
    episodes = whole_episodes([row.rollout for row in rows])
    turns, num_episodes = [turn for row in rows for turn in row.rollout.turns], len(episodes)
    num_tool = sum(int((row.rollout.authors == _TOOL).sum()) for row in rows)
    num_tokens = sum(len(row.rollout.answer_ids) for row in rows)
    num_calls = sum(turn.num_calls for turn in turns)
    failures = Counter(failure for turn in turns for failure in (turn.failures or (turn.failure,)) if failure)
    ended = Counter(rollout.ended for rollout in episodes)
    return [
        Metric("rollout/turns", len(turns) / num_episodes),
        Metric("rollout/model_tokens", (num_tokens - num_tool) / num_episodes),
        Metric("rollout/tool_tokens", num_tool / num_episodes),
        Metric("rollout/tool_share", num_tool / num_tokens if num_tokens else None),
        Metric("rollout/calls", num_calls / num_episodes),
        Metric("rollout/invalid_share", failures["invalid_call"] / num_calls if num_calls else None),
        Metric("rollout/tool_error_share", failures["tool_error"] / num_calls if num_calls else None),
        Metric("rollout/num_timeouts", float(failures["timeout"]), "sum"),
        Metric("rollout/num_cut_observations", float(sum(turn.cut_tokens > 0 for turn in turns)), "sum"),
        Metric("rollout/num_control_in_observations", float(sum(turn.num_control for turn in turns)), "sum"),
        Metric("rollout/other_stop", float(sum(turn.other_stop for turn in turns)), "sum"),
        *(Metric(f"rollout/ended/{name}", ended[name] / num_episodes) for name in get_args(Ended)),
        *_of_environment(turns),
        Metric("time/env_s", sum(turn.env_seconds for turn in turns), "sum"),
        *_by_turn(rows, num_episodes),
    ]


def describe_counts(counts: Counts) -> list[Metric]:
    """Of what was sampled since the last call; nothing where no turn was."""
    if not counts.num_turns:
        return []
    return [
        Metric("rollout/reencoded_share", counts.num_reencoded / counts.num_turns),
        Metric("rollout/stop_text_share", counts.num_at_text / counts.num_turns),
        Metric("rollout/template_drift_tokens", float(np.mean(counts.drift)) if counts.drift else None),
    ]


def _of_environment(turns: Sequence[TurnRecord]) -> Iterator[Metric]:
    """The means of the environment's own numbers, over the turns that have them."""
    for name in sorted({name for turn in turns for name in turn.info}):
        told = [turn.info[name] for turn in turns if name in turn.info]
        yield Metric(f"env/{''.join(c if c.isalnum() or c in '_.-' else '_' for c in name)}", float(np.mean(told)))


def _by_turn(rows: Sequence[Example], num_episodes: int) -> Iterator[Metric]:
    """Numbers of turn k, over the episodes that reached it."""
    most = max((int(row.rollout.turn_numbers.max(initial=-1)) for row in rows), default=-1) + 1
    for k in range(min(most, MOST_TURNS)):
        own = [(row, (row.rollout.turn_numbers == k) & (row.rollout.authors != _TOOL)) for row in rows]
        own = [(row, own_T) for row, own_T in own if own_T.any()]
        records = [_record(row, k) for row, _ in own]
        rewards = [turn.reward for turn in records if turn is not None and turn.reward is not None]
        unsure = [row.taught.student_entropy_T[own_T] for row, own_T in own if row.taught is not None]
        yield Metric(f"turn/{k}/share", len(own) / num_episodes)
        yield Metric(f"turn/{k}/tokens", float(np.mean([own_T.sum() for _, own_T in own])) if own else None)
        yield Metric(f"turn/{k}/teacher_kl", _mean([_teacher_kl(row)[own_T] for row, own_T in own]))
        yield Metric(f"turn/{k}/entropy", _mean(unsure))
        yield Metric(f"turn/{k}/reward", float(np.mean(rewards)) if rewards else None)


def _record(row: Example, k: int) -> TurnRecord | None:
    place = k - int(row.rollout.turn_numbers.min(initial=k))
    return row.rollout.turns[place] if place < len(row.rollout.turns) else None


def _teacher_kl(row: Example) -> FloatArray:
    """[T] the divergence that was taught; of sampled tokens alone log p - log q, its one-sample estimate."""
    taught, signal = row.taught, row.signal
    nothing_T = np.full(len(row.rollout.answer_ids), np.nan, dtype=np.float32)
    if taught is None or signal is None:
        return nothing_T
    if signal.sampled_logprob_T is not None:
        return np.asarray(taught.student_logprob_T - signal.sampled_logprob_T)
    found = [
        loss_T for name, loss_T in zip(taught.terms, taught.loss_ST, strict=True) if name in get_args(DivergenceKind)
    ]
    return np.asarray(found[0]) if found else nothing_T


def _mean(arrays: Sequence[FloatArray]) -> float | None:
    values = np.concatenate([np.zeros(0, dtype=np.float32), *arrays])
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None
