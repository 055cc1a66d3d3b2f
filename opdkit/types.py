"""The rows that flow through a training step. One row carries everything about one answer.

There are never two lists that must stay in step: a `Rollout` knows its problem, an `Example` holds the rollout together
with what each reader of the answer read (`View`) and said (`Signal`), by the view's name. "Unknown" is None and an
error when it is used; it is never 0.0.

Letters in array names: T answer positions of one rollout, K entries of a support, H hidden width, S terms of the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Message = Mapping[str, Any]  # role and content; in episodes also tool_calls, name, tool_call_id
Finish = Literal["stop", "length"]
# What is told of a span of several tokens: nothing; the whole advantage to each; or a share to each (see [teacher]).
SpanSpread = Literal["exact", "macro", "even", "proportional"]
# How an episode ended: the model answered, or the environment was done; a limit was reached (turns, tokens, calls that
# cannot be read, one call over and over); the environment failed, which says nothing of the model.
Ended = Literal["answer", "done", "turn_limit", "token_limit", "invalid", "repeat", "failure"]
AUTHORS = ("student", "teacher", "data", "tool")  # who wrote a token: the place in this tuple is its number


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question, with what only the grader (`gold`) and a privileged teacher (`solution`) may read."""

    id: str
    task: str
    messages: tuple[Message, ...]  # chat turns, each {"role": ..., "content": ...}; the student reads exactly these
    gold: str | None = None  # None: unknown, or the task has none (code is graded by `meta["tests"]`)
    solution: str | None = None  # a full worked answer, for privileged teachers and for `sft`
    columns: Mapping[str, str] = field(default_factory=dict)  # of the data, those that a recipe names; "" is missing
    tools: tuple[Mapping[str, Any], ...] = ()  # that the prompt offers, each as OpenAI's schema of a function
    meta: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the data, what reward functions ask for; not in saved rows

    @property
    def has_gold(self) -> bool:
        """Whether there is something to grade by: a gold answer, or tests of programs."""
        return self.gold is not None or bool(self.meta.get("tests"))


def as_asked(problem: Problem, row: Problem) -> Problem:
    """A problem of the data as a saved row's answers were asked it: an environment says the prompt of its episodes."""
    return replace(problem, messages=row.messages, tools=row.tools)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """What became of one turn of the model in an episode."""

    finish: Finish
    num_calls: int = 0
    reward: float | None = None  # of this turn; None: the environment gave none
    failure: str | None = None  # of the turn: invalid_call, tool_error, timeout, crash
    failures: tuple[str, ...] = ()  # of the calls that failed, in order
    messages: tuple[Message, ...] = ()  # what the environment said, as the model was shown it
    observation_tokens: int = 0  # of that, with what stands around it
    cut_tokens: int = 0  # left out of the middle of it
    num_control: int = 0  # control characters in it, and spellings of tokens that were added by name
    other_stop: bool = False  # the turn ended with a stop token that the chat template does not write there
    info: Mapping[str, float] = field(default_factory=dict)  # the environment's own numbers
    env_seconds: float = field(default=0.0, compare=False)  # a clock's word, and no part of what was computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to one problem, as token ids. T = len(answer_ids).

    An episode of several turns is one answer: the ids of the model's turns with what the environment said between them.
    """

    problem_id: str
    sample_id: int  # 0 .. group_size - 1
    policy_version: int  # number of optimizer steps the sampling weights had seen
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # [T], ends with the stop token if finish == "stop" (an episode: its last turn)
    # [T] nats, under the distribution that was sampled; NaN: of no token of the model; None: not sampled by us
    answer_logprobs: FloatArray | None
    answer_mask: npt.NDArray[np.bool_]  # [T] True = it is trained on, False = tool or environment text
    finish: Finish
    reward: float | None = None  # None: not graded. Never 0.0 for "unknown"
    parsed: str | None = None  # what the grader read as the final answer
    feedback: str | None = None
    # [T] nats, from the same forward before top-k, top-p and min-p cut; None: none of them did. Not saved.
    uncut_logprobs: FloatArray | None = None
    # [T] from 0, of the model's turn and of what the environment says behind it; None: all are of turn 0
    turn: npt.NDArray[np.int16] | None = None
    author: npt.NDArray[np.uint8] | None = None  # [T] places in AUTHORS; None: the student, and a tool where masked
    turns: tuple[TurnRecord, ...] = ()  # of an episode
    ended: Ended = "answer"
    # An episode whose turns are shown as a server's template shows them may take several rows: which episode of its
    # problem (None: sample_id), and what was said before this row's turns, in place of the problem's messages alone.
    episode: int | None = None
    history: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        num_tokens = len(self.answer_ids)
        for name in ("answer_mask", "answer_logprobs", "turn", "author"):
            array = getattr(self, name)
            if array is not None and len(array) != num_tokens:
                raise ValueError(f"rollout {self.key}: {name} has {len(array)} entries, not {num_tokens}")

    @property
    def turn_numbers(self) -> npt.NDArray[np.int16]:
        """[T] which turn each token belongs to."""
        return np.zeros(len(self.answer_ids), dtype=np.int16) if self.turn is None else self.turn

    @property
    def authors(self) -> npt.NDArray[np.uint8]:
        """[T] who wrote each token, as places in AUTHORS."""
        if self.author is not None:
            return self.author
        return np.where(self.answer_mask, AUTHORS.index("student"), AUTHORS.index("tool")).astype(np.uint8)

    @property
    def key(self) -> tuple[str, int]:
        return (self.problem_id, self.sample_id)

    @property
    def episode_id(self) -> int:
        """Which of its problem's answers it is, or is a part of."""
        return self.sample_id if self.episode is None else self.episode


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a reader of the answer reads in place of `prompt_ids`; the answer tokens follow it unchanged."""

    context_ids: tuple[int, ...]
    by: str | None = None  # the view of the recipe that a [route] had read the row in this one's place; None: itself
    sources: tuple[tuple[str, int], ...] = ()  # (problem_id, sample_id) of each peer shown
    num_truncated_tokens: int = 0
    shown: tuple[str, ...] = ()  # kinds of what is shown beside the problem, in order: success, failure, solution, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """How a view with another tokenizer read one answer: spans of student tokens that cover the same bytes as some of
    its own. See `engines/tokens/aligned.py`."""

    index_T: IntArray  # which span each token is in; -1: none, nothing is known of it
    is_single_T: npt.NDArray[np.bool_]  # the span is one token on both sides
    said_T: npt.NDArray[np.bool_]  # the signal says something of the token; its numbers are NaN or 0 at the others
    has_digit_T: npt.NDArray[np.bool_]
    spread: SpanSpread  # what a token of a span is credited with


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What a view says about one answer, aligned with `answer_ids`. Log-probs are nats over the full vocabulary.

    Exactly what was `Asked` is filled in. `hidden_TH` (a tensor in host memory, never saved) gives the exact full
    distribution through `head`, the `losses.Head` it was made with: the model's own may have moved since.
    """

    sampled_logprob_T: FloatArray | None = None
    topk_ids_TK: IntArray | None = None
    topk_logprob_TK: FloatArray | None = None  # true log-probs, not renormalised
    entropy_T: FloatArray | None = None
    hidden_TH: torch.Tensor | None = None
    head: Any = None  # one object for all answers scored together; None without hidden states
    # Of a view with another tokenizer; None: it read these very tokens. A span's log-prob is then spread evenly over
    # its tokens in `sampled_logprob_T`. Not saved.
    spans: Spans | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What the loss made of one answer, aligned with `answer_ids`: which of its tokens carried the signal.

    The answer's part of the step's loss is the sum of coef_ST * loss_ST over its counted tokens (coef_ST not 0).
    The student's numbers are from before the update, at the loss temperature; NaN for tokens that were not computed.
    """

    terms: tuple[str, ...]  # their names
    coef_ST: FloatArray  # 0: the term does not count the token (masked, left out by a selection, or of no weight)
    loss_ST: FloatArray  # each term's token loss; NaN where the term does not count the token
    clipped_T: npt.NDArray[np.bool_]  # a clip changed some term's loss of this token
    student_logprob_T: FloatArray  # nats, of the sampled token
    student_entropy_T: FloatArray  # nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training row. Nothing travels beside it."""

    problem: Problem
    rollout: Rollout
    views: Mapping[str, View] = field(default_factory=dict)  # by name; one that has nothing to read is missing
    signals: Mapping[str, Signal] = field(default_factory=dict)  # missing: not asked for, or too long for the view
    taught: Taught | None = None  # None: the loss has not read this row

    @property
    def view(self) -> View | None:
        """What the teacher read; None: nothing, or no teacher reads this row (SFT, GRPO)."""
        return self.views.get("teacher")

    @property
    def signal(self) -> Signal | None:
        """What the teacher said."""
        return self.signals.get("teacher")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a view must say of every answer token. The engine must be able to answer it.

    "distribution" is answered with hidden states alone; "sampled" and "topk" with log-probs at the loss temperature.
    """

    answer: Literal["sampled", "topk", "distribution"]
    k: int | None = None  # for answer == "topk"
    entropy: bool = False  # of the view's distribution, nats
    logprob: bool = False  # for answer == "distribution": coefficients also depend on that of the sampled token

    @property
    def words(self) -> str:
        """For sentences."""
        kinds = {
            "sampled": "sampled log-probs",
            "topk": f"top-{self.k or 'k'} lists",
            "distribution": "whole distributions",
        }
        return kinds[self.answer] + (" and entropies" if self.entropy else "")

    def covers(self, other: Asked) -> bool:
        """Whether whoever was asked this can say what the other asks. Hidden states say everything."""
        if self.answer == "distribution":
            return True
        if other.answer == "distribution" or (other.entropy and not self.entropy):
            return False
        return other.answer == "sampled" or (self.answer == "topk" and (self.k or 0) >= (other.k or 0))

    def __or__(self, other: Asked) -> Asked:
        """What answers both."""
        answer = max(self.answer, other.answer, key=("sampled", "topk", "distribution").index)
        k = max(self.k or 0, other.k or 0) if answer == "topk" else None
        return Asked(answer, k, self.entropy or other.entropy, self.logprob or other.logprob)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method must know, per answer token."""

    views: Mapping[str, Asked] = field(default_factory=dict)  # by name; most methods ask "teacher" alone
    reward: bool = False  # every rollout must be graded
    student: bool = False  # the student's log-prob of every token and its entropy, before coefficients are made

    @property
    def teacher(self) -> Asked | None:
        return self.views.get("teacher")

    def __or__(self, other: Needs) -> Needs:
        """What answers both."""
        views = dict(self.views)
        for name, asked in other.views.items():
            views[name] = views[name] | asked if name in views else asked
        return Needs(views=views, reward=self.reward or other.reward, student=self.student or other.student)


def reading_names(view: str, count: int) -> list[str]:
    """The names of the readings of a view: its own, or `view.0`, `view.1`, ... of one that repeats."""
    return [view] if count == 1 else [f"{view}.{number}" for number in range(count)]


def base_name(reading: str) -> str:
    """The view that a reading is one of."""
    return reading.partition(".")[0]


def seed_from(*identity: int | str) -> int:
    """A 63-bit seed from who is asking, e.g. `seed_from(cfg.seed, step, problem.id, sample_id, "sample")`.

    A stable digest (Python's `hash` of a string changes from process to process), so a row is the same on one rank or
    eight, in any batch order, and after a resume. int 1 and str "1" give different seeds.
    """
    parts = "\x1f".join(f"{type(part).__name__}:{part}" for part in identity)
    return int.from_bytes(hashlib.blake2b(parts.encode(), digest_size=8).digest(), "big") >> 1
