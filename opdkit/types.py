"""The rows that flow through a training step. One row carries everything about one answer.

There are never two lists that must stay in step: a `Rollout` knows its problem, an `Example` holds the rollout together
with what the teacher read (`TeacherView`) and what it said (`TeacherSignal`). "Unknown" is None and an error when it is
used; it is never 0.0.

Letters in array names: T answer positions of one rollout, K entries of a support, H hidden width, S terms of the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Message = Mapping[str, str]
Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question, with what only the grader (`gold`) and a privileged teacher (`solution`) may read."""

    id: str
    task: str
    messages: tuple[Message, ...]  # chat turns, each {"role": ..., "content": ...}; the student reads exactly these
    gold: str | None = None  # None: unknown, or the task has none (code is graded by `meta["tests"]`)
    solution: str | None = None  # a full worked answer, for privileged teachers and for `sft`
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_gold(self) -> bool:
        """Whether there is something to grade by: a gold answer, or tests of programs."""
        return self.gold is not None or bool(self.meta.get("tests"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to one problem, as token ids. T = len(answer_ids)."""

    problem_id: str
    sample_id: int  # 0 .. group_size - 1
    policy_version: int  # number of optimizer steps the sampling weights had seen
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # [T], ends with the stop token if finish == "stop"
    answer_logprobs: FloatArray | None  # [T] nats, under the distribution that was sampled; None: not sampled by us
    answer_mask: npt.NDArray[np.bool_]  # [T] True = the model wrote it, False = tool or environment text
    finish: Finish
    reward: float | None = None  # None: not graded. Never 0.0 for "unknown"
    parsed: str | None = None  # what the grader read as the final answer
    feedback: str | None = None
    # [T] nats, from the same forward before top-k, top-p and min-p cut; None: none of them did. Not saved.
    uncut_logprobs: FloatArray | None = None

    def __post_init__(self) -> None:
        num_tokens = len(self.answer_ids)
        if len(self.answer_mask) != num_tokens:
            raise ValueError(f"rollout {self.key}: answer_mask has {len(self.answer_mask)} entries, not {num_tokens}")
        if self.answer_logprobs is not None and len(self.answer_logprobs) != num_tokens:
            raise ValueError(f"rollout {self.key}: answer_logprobs has {len(self.answer_logprobs)}, not {num_tokens}")

    @property
    def key(self) -> tuple[str, int]:
        return (self.problem_id, self.sample_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What the teacher reads in place of `prompt_ids`; the answer tokens follow it unchanged."""

    context_ids: tuple[int, ...]
    sources: tuple[tuple[str, int], ...] = ()  # (problem_id, sample_id) of each peer shown
    num_truncated_tokens: int = 0
    shown: tuple[str, ...] = ()  # kinds of what is shown beside the problem, in order: success, failure, solution, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal:
    """What the teacher said about one answer, aligned with `answer_ids`. Log-probs are nats over the full vocabulary.

    Exactly what the method's `Needs` asked for is filled in. `hidden_TH` (a tensor in host memory, never saved) gives
    the exact full distribution through `head`, the `losses.Head` it was made with: the teacher's own may have moved.
    """

    sampled_logprob_T: FloatArray | None = None
    topk_ids_TK: IntArray | None = None
    topk_logprob_TK: FloatArray | None = None  # true log-probs, not renormalised
    entropy_T: FloatArray | None = None
    hidden_TH: torch.Tensor | None = None
    head: Any = None  # one object for all answers scored together; None without hidden states


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
    view: TeacherView | None = None  # None: no teacher reads this row (SFT, GRPO)
    signal: TeacherSignal | None = None
    taught: Taught | None = None  # None: the loss has not read this row


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method must be told, per answer token. The engine must be able to answer it.

    "distribution" is answered with hidden states alone; "sampled" and "topk" with log-probs at the loss temperature.
    """

    teacher: Literal["none", "sampled", "topk", "distribution"] = "none"
    k: int | None = None  # for teacher == "topk"
    entropy: bool = False  # of the teacher's distribution, nats
    reward: bool = False  # every rollout must be graded
    student: bool = False  # the student's log-prob of every token and its entropy, before coefficients are made

    def __or__(self, other: Needs) -> Needs:
        """What answers both."""
        order = ("none", "sampled", "topk", "distribution")
        teacher = max(self.teacher, other.teacher, key=order.index)
        return Needs(
            teacher=teacher,
            k=max(self.k or 0, other.k or 0) if teacher == "topk" else None,
            entropy=self.entropy or other.entropy,
            reward=self.reward or other.reward,
            student=self.student or other.student,
        )


def seed_from(*identity: int | str) -> int:
    """A 63-bit seed from who is asking, e.g. `seed_from(cfg.seed, step, problem.id, sample_id, "sample")`.

    A stable digest (Python's `hash` of a string changes from process to process), so a row is the same on one rank or
    eight, in any batch order, and after a resume. int 1 and str "1" give different seeds.
    """
    parts = "\x1f".join(f"{type(part).__name__}:{part}" for part in identity)
    return int.from_bytes(hashlib.blake2b(parts.encode(), digest_size=8).digest(), "big") >> 1
