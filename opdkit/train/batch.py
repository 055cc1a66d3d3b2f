"""Rows to flat arrays, and the split into micro-batches.

After sampling there is no padding in the mathematics: N counts the answer tokens the model wrote, over the whole batch.
Letters: N counted answer tokens, R rows, K support entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opdkit.losses import ViewTokens
from opdkit.methods.base import PlanInputs
from opdkit.types import Example, FloatArray, Needs, seed_from


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: some rows, and where their counted tokens stand in the flat arrays of the batch."""

    rows: list[Example]
    tokens_n: Tensor  # long: indices into N
    counted_n: Tensor | None  # long: indices of the counted tokens among all answer tokens of the part; None: all


class Batch:
    """The rows of one optimizer step, also those that the teacher says nothing of."""

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

    @property
    def uncut_logprob_N(self) -> Tensor | None:
        """The sampler's log-probs over the whole vocabulary; None: some row was not sampled by us."""
        rollouts = [e.rollout for e in self.examples]
        return self._per_token([r.answer_logprobs if r.uncut_logprobs is None else r.uncut_logprobs for r in rollouts])

    def plan_inputs(
        self,
        *,
        step: int,
        progress: float,
        seed: int,
        num_ids: int,
        needs: Needs,
        required_views: tuple[str, ...],
        pass_rates: Mapping[str, float | None] | None = None,
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> PlanInputs:
        """All that a method may know but what the student says. `num_ids`: of the vocabulary; `needs`: what the teacher
        was asked; `required_views`: the method's."""
        group_ids: dict[str, int] = {}
        groups = [group_ids.setdefault(e.rollout.problem_id, len(group_ids)) for e in self.examples]
        rewards = [e.rollout.reward for e in self.examples]
        asked = needs.teacher != "none"
        scored_R = torch.tensor([e.signal is not None for e in self.examples], dtype=torch.bool, device=self.device)
        inputs = PlanInputs(
            row_N=self.row_N,
            index_N=self.index_N,
            group_R=torch.tensor(groups, dtype=torch.long, device=self.device),
            reward_R=torch.tensor([0.0 if r is None else r for r in rewards], dtype=torch.float64, device=self.device),
            graded_R=torch.tensor([r is not None for r in rewards], dtype=torch.bool, device=self.device),
            mask_N=torch.ones(self.num_tokens, dtype=torch.bool, device=self.device),
            weight_N=torch.ones(self.num_tokens, dtype=torch.float32, device=self.device),
            sampled_logprob_N=self._per_token([e.rollout.answer_logprobs for e in self.examples]),
            teacher_logprob_N=self._said("sampled_logprob_T") if asked else None,
            teacher_entropy_N=self._said("entropy_T") if needs.entropy else None,
            student_logprob_N=None,
            student_entropy_N=None,
            pass_rate_R=self._pass_rates(pass_rates) if pass_rates else None,
            seed_R=[seed_from(seed, step, *e.rollout.key, "plan") for e in self.examples],
            num_ids=num_ids,
            step=step,
            progress=progress,
            has_view={"teacher": scored_R[self.row_N]} if asked else {},
            required_views=required_views,
            total=total,
        )
        return replace(inputs, mask_N=inputs.countable_N)

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

    def parts(self, max_tokens: int, wanted_N: Tensor) -> list[Part]:
        """Micro-batches of at most `max_tokens` padded student tokens; a longer row stands alone. Rows without a wanted
        token would only cost time, and are left out."""
        lengths = [len(e.rollout.prompt_ids) + len(e.rollout.answer_ids) for e in self.examples]
        order = sorted(self.row_N[wanted_N].unique().tolist(), key=lambda i: lengths[i])
        parts: list[list[int]] = []
        for i in order:
            if parts and lengths[i] * (len(parts[-1]) + 1) <= max_tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
        return [self._part(rows) for rows in parts]

    def teacher_tokens(self, part: Part, needs: Needs) -> ViewTokens:
        """What the teacher said about the counted tokens of a part, at least one of whose rows it scored. Of the other
        rows: NaN, and the id 0."""
        signals = [e.signal for e in part.rows]
        masks = [torch.from_numpy(np.asarray(e.rollout.answer_mask)) for e in part.rows]

        def gather(name: str) -> Tensor:
            known = [None if s is None else torch.as_tensor(getattr(s, name)) for s in signals]
            like = next(array for array in known if array is not None)
            unknown = torch.nan if like.is_floating_point() else 0
            tensors = [
                like.new_full((len(m), *like.shape[1:]), unknown) if array is None else array
                for array, m in zip(known, masks, strict=True)
            ]
            return torch.cat([t[m.to(t.device)] for t, m in zip(tensors, masks, strict=True)]).to(self.device)

        if needs.teacher == "distribution":
            heads = {id(s.head): s.head for s in signals if s is not None}
            assert len(heads) == 1, "the rows of a part were scored apart: their hidden states belong to several heads"
            return ViewTokens(hidden_NH=gather("hidden_TH"), head=next(iter(heads.values())))
        sampled = gather("sampled_logprob_T")
        if needs.teacher == "sampled":
            return ViewTokens(sampled_logprob_N=sampled)
        return ViewTokens(
            sampled_logprob_N=sampled,
            topk_ids_NK=gather("topk_ids_TK"),
            topk_logprob_NK=gather("topk_logprob_TK"),
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

    def _said(self, name: str) -> Tensor | None:
        """[N] an array of the teacher's signals, NaN for the rows it said nothing of; None: it was not asked for it."""
        return self._per_token(
            [
                getattr(e.signal, name) if e.signal else np.full(len(e.rollout.answer_ids), np.nan, dtype=np.float32)
                for e in self.examples
            ]
        )
