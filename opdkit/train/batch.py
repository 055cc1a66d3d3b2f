"""Rows to flat arrays, and the split into micro-batches.

After sampling there is no padding in the mathematics: N counts the answer tokens the model wrote, over the whole batch.
Letters: N counted answer tokens, R rows, K support entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opdkit.losses import Head, ViewTokens
from opdkit.methods.base import PlanInputs
from opdkit.types import Example, FloatArray, Needs, TeacherSignal, seed_from


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: some rows, and where their counted tokens stand in the flat arrays of the batch."""

    rows: list[Example]
    tokens_n: Tensor  # long: indices into N
    counted_n: Tensor | None  # long: indices of the counted tokens among all answer tokens of the part; None: all


@dataclass(frozen=True, slots=True)
class StudentStats:
    """What the student says of its own tokens before the update, at the loss temperature. Nats.

    scores             {name: [N]}: losses asked for by [weights]
    teacher_logprob_N  of the sampled tokens, where that pass read the teacher's hidden states
    """

    logprob_N: Tensor
    entropy_N: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)
    teacher_logprob_N: Tensor | None = None


class Batch:
    """The rows of one optimizer step."""

    def __init__(self, examples: Sequence[Example], device: torch.device) -> None:
        self.examples = list(examples)
        self.device = device
        counted = [np.flatnonzero(e.rollout.answer_mask) for e in self.examples]
        lengths = [len(c) for c in counted]
        self._counted = counted
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)).to(
            device
        )
        self.index_N = self._flat([c.astype(np.int64) for c in counted])
        self.ids_N = self._flat(
            [np.asarray(e.rollout.answer_ids, dtype=np.int64)[c] for e, c in zip(self.examples, counted, strict=True)]
        )

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    def plan_inputs(
        self,
        *,
        step: int,
        progress: float,
        seed: int,
        num_ids: int,
        student: StudentStats | None = None,
        pass_rates: Mapping[str, float | None] | None = None,
        absent: Sequence[Example] = (),
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> PlanInputs:
        """All that a method may know. `absent`: rows of the step that are not in the batch; `num_ids`: vocabulary."""
        group_ids: dict[str, int] = {}
        groups = [group_ids.setdefault(e.rollout.problem_id, len(group_ids)) for e in self.examples]
        rewards = [e.rollout.reward for e in self.examples]
        teacher_logprob_N = self._per_token([e.signal.sampled_logprob_T if e.signal else None for e in self.examples])
        absent_tokens = [int(np.count_nonzero(e.rollout.answer_mask)) for e in absent]
        return PlanInputs(
            row_N=self.row_N,
            index_N=self.index_N,
            group_R=torch.tensor(groups, dtype=torch.long, device=self.device),
            reward_R=torch.tensor([0.0 if r is None else r for r in rewards], dtype=torch.float64, device=self.device),
            graded_R=torch.tensor([r is not None for r in rewards], dtype=torch.bool, device=self.device),
            mask_N=torch.ones(self.num_tokens, dtype=torch.bool, device=self.device),
            weight_N=torch.ones(self.num_tokens, dtype=torch.float32, device=self.device),
            sampled_logprob_N=self._per_token([e.rollout.answer_logprobs for e in self.examples]),
            teacher_logprob_N=student.teacher_logprob_N if student and teacher_logprob_N is None else teacher_logprob_N,
            teacher_entropy_N=self._per_token([e.signal.entropy_T if e.signal else None for e in self.examples]),
            student_logprob_N=student.logprob_N if student else None,
            student_entropy_N=student.entropy_N if student else None,
            student_scores=student.scores if student else {},
            pass_rate_R=self._pass_rates(pass_rates) if pass_rates else None,
            seed_R=[seed_from(seed, step, *e.rollout.key, "plan") for e in self.examples],
            num_ids=num_ids,
            step=step,
            progress=progress,
            num_absent_rows=sum(n > 0 for n in absent_tokens),
            num_absent_tokens=sum(absent_tokens),
            total=total,
        )

    def new_per_token(self) -> Tensor:
        """[N] NaN: unknown until it is written."""
        return torch.full((self.num_tokens,), torch.nan, device=self.device)

    def per_row(self, values_N: Tensor) -> list[tuple[Example, FloatArray]]:
        """[T] arrays of the answers, NaN at tokens that are not counted."""
        values = values_N.detach().float().cpu().numpy()
        rows = []
        for row, example in enumerate(self.examples):
            array_T = np.full(len(example.rollout.answer_ids), np.nan, dtype=np.float32)
            array_T[self._counted[row]] = values[self._offsets[row] : self._offsets[row + 1]]
            rows.append((example, array_T))
        return rows

    def parts(self, max_tokens: int) -> list[Part]:
        """Micro-batches of at most `max_tokens` padded student tokens; a longer row stands alone."""
        lengths = [len(e.rollout.prompt_ids) + len(e.rollout.answer_ids) for e in self.examples]
        # Rows without a counted token would only cost time.
        order = sorted((i for i in range(len(lengths)) if len(self._counted[i])), key=lambda i: lengths[i])
        parts: list[list[int]] = []
        for i in order:
            if parts and lengths[i] * (len(parts[-1]) + 1) <= max_tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
        return [self._part(rows) for rows in parts]

    def teacher_tokens(self, part: Part, needs: Needs, head: Head | None) -> ViewTokens | None:
        """What the teacher said about the counted tokens of a part."""
        if needs.teacher == "none":
            return None
        signals = [signal_of(e) for e in part.rows]
        masks = [torch.from_numpy(np.asarray(e.rollout.answer_mask)) for e in part.rows]

        def gather(arrays: Sequence[np.ndarray | Tensor | None], name: str) -> Tensor:
            for array, example in zip(arrays, part.rows, strict=True):
                assert array is not None, f"rollout {example.rollout.key}: the teacher's {name} is missing"
            tensors = [torch.as_tensor(array) for array in arrays]
            return torch.cat([t[m.to(t.device)] for t, m in zip(tensors, masks, strict=True)]).to(self.device)

        if needs.teacher == "distribution":
            assert head is not None
            return ViewTokens(hidden_NH=gather([s.hidden_TH for s in signals], "hidden states"), head=head)
        sampled = gather([s.sampled_logprob_T for s in signals], "log-probs")
        if needs.teacher == "sampled":
            return ViewTokens(sampled_logprob_N=sampled)
        return ViewTokens(
            sampled_logprob_N=sampled,
            topk_ids_NK=gather([s.topk_ids_TK for s in signals], "top-k ids"),
            topk_logprob_NK=gather([s.topk_logprob_TK for s in signals], "top-k log-probs"),
        )

    def _part(self, rows: list[int]) -> Part:
        tokens = np.concatenate([np.arange(self._offsets[i], self._offsets[i + 1]) for i in rows])
        starts = np.concatenate([[0], np.cumsum([len(self.examples[i].rollout.answer_ids) for i in rows])])
        counted = np.concatenate([start + self._counted[i] for start, i in zip(starts[:-1], rows, strict=True)])
        everything = len(counted) == starts[-1]
        return Part(
            rows=[self.examples[i] for i in rows],
            tokens_n=torch.from_numpy(tokens).to(self.device),
            counted_n=None if everything else torch.from_numpy(counted).to(self.device),
        )

    def _pass_rates(self, pass_rates: Mapping[str, float | None]) -> Tensor:
        known = [pass_rates[e.rollout.problem_id] for e in self.examples]
        return torch.tensor([np.nan if r is None else r for r in known], dtype=torch.float64, device=self.device)

    def _flat(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays])).to(self.device)

    def _per_token(self, arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        """None unless every row has it: a method that uses it anyway fails, instead of reading zeros."""
        if not arrays or any(array is None for array in arrays):
            return None
        kept = [np.asarray(a)[c] for a, c in zip(arrays, self._counted, strict=True)]
        return torch.from_numpy(np.concatenate(kept)).to(self.device)


def signal_of(example: Example) -> TeacherSignal:
    assert example.signal is not None, f"rollout {example.rollout.key} was not scored by the teacher"
    return example.signal
