"""One episode while it lasts: the tokens so far, what became of each turn, and whether there may be another one.

    stream = P, m0, o0, m1, o1, ...     P the prompt's ids, m what was sampled, o what the environment said, as ids

It is only ever appended to: nothing sampled is encoded again, changed or taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from opdkit.contexts.suffix import Suffix
from opdkit.engines.base import Sampled
from opdkit.rollouts.environments.base import Action, Step, Transcript, Turn
from opdkit.tasks.base import Grade
from opdkit.types import AUTHORS, Ended, Finish, FloatArray, Message, Problem, Rollout, TurnRecord

_STUDENT, _TOOL = AUTHORS.index("student"), AUTHORS.index("tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """In tokens, where nothing else is said."""

    turn_tokens: int  # of one turn
    max_turns: int = 8
    observation_tokens: int = 512  # of one thing that the environment says
    whole: int | None = None  # of all turns and what is said between them; None: room for all of it
    invalid_calls: int = 3
    repeats: int = 3  # turns with the same calls and results
    env_seconds: float = 600.0
    positions: int | None = None  # that the model has, for the prompt too
    truncated: Literal["graded", "ungraded"] = "graded"

    @property
    def episode_tokens(self) -> int:
        return self.whole or self.max_turns * (self.turn_tokens + self.observation_tokens)


@dataclass(slots=True, kw_only=True)
class Row:
    """A stretch of an episode that is one row: what is read, and what follows it, token for token."""

    prompt_ids: tuple[int, ...]
    history: tuple[Message, ...] = ()  # what was said between the problem's messages and this row
    first_turn: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[FloatArray] = field(default_factory=list)
    uncut: list[FloatArray] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    author: list[int] = field(default_factory=list)
    is_cut: bool = False  # whether top-k, top-p or min-p cut a turn's distribution

    @property
    def stream(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.ids)

    def say(self, ids: Sequence[int], logprobs_T: FloatArray, uncut_T: FloatArray | None, turn: int) -> None:
        self.is_cut |= uncut_T is not None
        self._append(ids, logprobs_T, logprobs_T if uncut_T is None else uncut_T, turn, _STUDENT)

    def hear(self, ids: Sequence[int], turn: int) -> None:
        unknown_T = np.full(len(ids), np.nan, dtype=np.float32)
        self._append(ids, unknown_T, unknown_T, turn, _TOOL)

    def _append(self, ids: Sequence[int], logprobs_T: FloatArray, uncut_T: FloatArray, turn: int, author: int) -> None:
        self.ids += ids
        self.logprobs.append(logprobs_T)
        self.uncut.append(uncut_T)
        self.turn += [turn] * len(ids)
        self.author += [author] * len(ids)


@dataclass(slots=True, kw_only=True)
class Episode:
    """number: among those that are played together."""

    number: int
    problem: Problem  # with the messages of the environment's reset, and the tools that the prompt offers
    sample_id: int
    limits: Limits
    has_tools: bool = False
    in_thought: bool = False  # the prompt has opened a thought
    pending: Action | None = None  # what the environment has not answered yet
    rows: list[Row] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)  # as the environment sees them
    records: list[TurnRecord] = field(default_factory=list)
    told: tuple[Message, ...] = ()  # behind the prompt, as the environment told it anew after so many turns
    num_told: int = 0
    ended: Ended | None = None
    grade: Grade | None = None
    why: str | None = None  # it failed
    num_invalid: int = 0
    num_repeats: int = 0
    env_seconds: float = 0.0

    @property
    def row(self) -> Row:
        return self.rows[-1]

    @property
    def num_tokens(self) -> int:
        """Behind the prompt: of all turns and what was said between them, as the model reads them now."""
        return len(self.row.stream) - len(self.rows[0].prompt_ids)

    @property
    def is_failed(self) -> bool:
        return self.ended == "failure"

    @property
    def transcript(self) -> Transcript:
        assert self.ended is not None
        return Transcript(prompt=self.problem.messages, turns=tuple(self.turns), ended=self.ended)

    @property
    def has_room(self) -> bool:
        """Whether another turn can be sampled: the whole of it, as far as the model's positions go."""
        limits = self.limits
        fits = limits.positions is None or len(self.row.stream) + limits.turn_tokens <= limits.positions
        return fits and self.num_tokens < limits.episode_tokens

    def say(self, answer: Sampled) -> tuple[tuple[int, ...], Finish]:
        """Append a turn of the model, cut to what the episode has left; its ids as they were appended."""
        left = self.limits.episode_tokens - self.num_tokens
        ids, finish = answer.answer_ids[:left], answer.finish if len(answer.answer_ids) <= left else "length"
        uncut_T = None if answer.uncut_logprobs_T is None else answer.uncut_logprobs_T[:left]
        self.row.say(ids, answer.logprobs_T[:left], uncut_T, len(self.turns))
        return ids, finish

    def hears(self, suffix: Suffix) -> bool:
        """Append what the environment said, if there is room for all of it."""
        length, limits = len(suffix.ids), self.limits
        fits = limits.positions is None or len(self.row.stream) + length <= limits.positions
        if not fits or self.num_tokens + length > limits.episode_tokens:
            return False
        self.row.hear(suffix.ids, len(self.turns) - 1)
        return True

    def goes_on(self, prompt_ids: Sequence[int], history: Sequence[Message]) -> bool:
        """Append what a chat template shows behind the last turn, `prompt_ids` being its whole rendering. Where that
        does not begin with what the model has read, a row begins anew. False: there is no room for it."""
        stream, limits = self.row.stream, self.limits
        too_long = limits.positions is not None and len(prompt_ids) > limits.positions
        if too_long or len(prompt_ids) - len(self.rows[0].prompt_ids) > limits.episode_tokens:
            return False
        if tuple(prompt_ids[: len(stream)]) == stream:
            self.row.hear(prompt_ids[len(stream) :], len(self.turns) - 1)
        else:
            self.rows.append(Row(prompt_ids=tuple(prompt_ids), history=tuple(history), first_turn=len(self.turns)))
        return True

    def answered(self, action: Action, step: Step, num_invalid: int, seconds: float) -> None:
        """What the environment said to the last turn."""
        self.env_seconds += seconds
        self.num_invalid += num_invalid
        before = self.turns[-1] if self.turns else None
        self.turns.append(Turn(action=action, step=step))
        is_same = before is not None and _called_and_heard(before) == _called_and_heard(self.turns[-1])
        self.num_repeats = 0 if not action.calls else self.num_repeats + 1 if is_same else 1

    def end_of(self, step: Step) -> Ended | None:
        """How the episode has ended with this step; None: it goes on."""
        limits, action = self.limits, self.turns[-1].action
        if step.failure == "crash" or self.env_seconds > limits.env_seconds:
            return "failure"
        if step.done:
            is_answer = self.has_tools and not action.calls
            return "done" if not is_answer else "answer" if action.finish == "stop" else "token_limit"
        if self.num_invalid >= limits.invalid_calls:
            return "invalid"
        if self.num_repeats >= limits.repeats:
            return "repeat"
        return "turn_limit" if len(self.turns) >= limits.max_turns else None

    def rollouts(self, policy_version: int, group_size: int) -> list[Rollout]:
        """The rows, graded. Those behind the first have ids of samples that no other row of the group has; one in which
        there was no room to write anything is none."""
        assert self.ended is not None
        reward, feedback = self.reward, self.grade.feedback if self.grade is not None else None
        last = self.turns[-1].step if self.turns else None
        if feedback is None and reward is not None and last is not None and last.messages:
            feedback = str(last.messages[-1]["content"])
        found = []
        rows = [row for row in self.rows if row.ids] or self.rows[:1]
        for place, row in enumerate(rows):
            until = rows[place + 1].first_turn if place + 1 < len(rows) else len(self.records)
            records = tuple(self.records[row.first_turn : until])
            author_T = np.array(row.author, dtype=np.uint8)
            found.append(
                Rollout(
                    problem_id=self.problem.id,
                    sample_id=self.sample_id + place * group_size,
                    policy_version=policy_version,
                    prompt_ids=row.prompt_ids,
                    answer_ids=tuple(row.ids),
                    answer_logprobs=_joined(row.logprobs),
                    uncut_logprobs=_joined(row.uncut) if row.is_cut else None,
                    answer_mask=author_T == _STUDENT,
                    finish=records[-1].finish if records else "length",
                    reward=reward,
                    parsed=None if self.grade is None else self.grade.parsed,
                    feedback=feedback,
                    turn=np.array(row.turn, dtype=np.int16),
                    author=author_T,
                    turns=records,
                    ended=self.ended,
                    episode=self.sample_id if len(rows) > 1 else None,
                    history=row.history,
                )
            )
        return found

    @property
    def reward(self) -> float | None:
        """The verdict and the rewards of the turns, together; None: nobody gave any, or it must not be counted."""
        left_out = self.limits.truncated == "ungraded" and self.ended not in ("answer", "done")
        if self.is_failed or left_out:
            return None
        verdict = None if self.grade is None else self.grade.score
        if self.grade is not None and verdict is None:
            return None
        rewards = [record.reward for record in self.records if record.reward is not None]
        return None if verdict is None and not rewards else sum(rewards) + (verdict or 0.0)


def _called_and_heard(turn: Turn) -> tuple[object, object]:
    heard = [message["content"] for message in turn.step.messages] if turn.step else []
    return [(call.name, call.arguments) for call in turn.action.calls], heard


def _joined(parts: Sequence[FloatArray]) -> FloatArray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])
