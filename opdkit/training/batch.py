"""Rows to flat arrays, and the split into micro-batches.

After sampling there is no padding in the mathematics: N counts the answer tokens the model wrote, over the whole batch.
Letters: N counted answer tokens, R rows, K support entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opdkit.losses import ViewTokens
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.training.deal import Deal
from opdkit.types import Asked, Example, FloatArray, Problem, Signal, seed_from

# Arrays of a Signal and of the ViewTokens made from several of them.
_ARRAYS = {
    "hidden_TH": "hidden_NH",
    "sampled_logprob_T": "sampled_logprob_N",
    "topk_ids_TK": "topk_ids_NK",
    "topk_logprob_TK": "topk_logprob_NK",
}

# (contexts, answers) -> which of them are read together, as `LanguageModel.planned`.
Planned = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: some rows, and where their counted tokens stand in the flat arrays of the batch."""

    rows: list[Example]
    tokens_n: Tensor  # long: indices into N
    counted_n: Tensor | None  # long: indices of the counted tokens among all answer tokens of the part; None: all


class Batch:
    """The rows of one optimizer step, also those that a view did not score."""

    def __init__(self, examples: Sequence[Example], device: torch.device, deal: Deal | None = None) -> None:
        """deal: which of the rows this rank passes over; None: all of them."""
        self.examples = list(examples)
        self.device, self._deal = device, deal
        counted = [np.flatnonzero(e.rollout.answer_mask) for e in self.examples]
        lengths = [len(c) for c in counted]
        self._counted = counted
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)).to(
            device
        )
        self.index_N = self._flat([c.astype(np.int64) for c in counted])
        self.ids_N = self._counted_ints([np.asarray(e.rollout.answer_ids) for e in self.examples])

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @property
    def sampled_logprob_N(self) -> Tensor | None:
        """[N] nats, of the distribution that was sampled. None: some answer was not sampled by us."""
        return self._per_token([e.rollout.answer_logprobs for e in self.examples])

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
        asked: Mapping[str, Asked],
        required_views: tuple[str, ...],
        pass_rates: Mapping[str, float | None] | None = None,
        domain_of: Callable[[Problem], int] | None = None,
        num_domains: int = 1,
    ) -> PlanInputs:
        """All that a method may know but what the student says. `num_ids`: of the vocabulary; `asked`: what the views
        were asked, by reading; `required_views`: the method's; `domain_of`: which of `num_domains`, where every
        domain has a mean of its own."""
        group_ids: dict[str, int] = {}
        groups = [group_ids.setdefault(e.rollout.problem_id, len(group_ids)) for e in self.examples]
        rewards = [e.rollout.reward for e in self.examples]
        has_view = {name: self.has_view(name) for name in asked}
        inputs = PlanInputs(
            row_N=self.row_N,
            index_N=self.index_N,
            group_R=torch.tensor(groups, dtype=torch.long, device=self.device),
            reward_R=torch.tensor([0.0 if r is None else r for r in rewards], dtype=torch.float64, device=self.device),
            graded_R=torch.tensor([r is not None for r in rewards], dtype=torch.bool, device=self.device),
            mask_N=torch.ones(self.num_tokens, dtype=torch.bool, device=self.device),
            weight_N=torch.ones(self.num_tokens, dtype=torch.float32, device=self.device),
            sampled_logprob_N=self._per_token([e.rollout.answer_logprobs for e in self.examples]),
            view_logprob={v: self.said(v, "sampled_logprob_T") for v, a in asked.items() if a.answer != "distribution"},
            view_entropy={v: self.said(v, "entropy_T") for v, a in asked.items() if a.entropy},
            student_logprob_N=None,
            student_entropy_N=None,
            pass_rate_R=self._pass_rates(pass_rates) if pass_rates else None,
            seed_R=[seed_from(seed, step, *e.rollout.key, "plan") for e in self.examples],
            num_ids=num_ids,
            step=step,
            progress=progress,
            has_view=has_view,
            required_views=required_views,
            turn_N=self._counted_ints([e.rollout.turn_numbers for e in self.examples]),
            turn_reward_N=self._turn_rewards(),
            episode_R=self._episodes(),
            author_N=self._counted_ints([e.rollout.authors for e in self.examples]),
            domain_N=None if domain_of is None else self._per_row([domain_of(e.problem) for e in self.examples]),
            num_domains=num_domains,
        )
        return replace(inputs, mask_N=inputs.countable_N)

    def _episodes(self) -> Tensor | None:
        """[R] which episode each row is a part of; None: each is one."""
        rollouts = [e.rollout for e in self.examples]
        if all(rollout.episode is None for rollout in rollouts):
            return None
        numbers: dict[tuple[str, int], int] = {}
        found = [numbers.setdefault((r.problem_id, r.episode_id), len(numbers)) for r in rollouts]
        return torch.tensor(found, dtype=torch.long, device=self.device)

    def _turn_rewards(self) -> Tensor | None:
        """[N] float64: what each token's turn earned; what is left of an episode's reward is its last turn's."""
        rollouts = [e.rollout for e in self.examples]
        if not any(rollout.turns for rollout in rollouts):
            return None
        left, last = dict[tuple[str, int], float](), dict[tuple[str, int], int]()
        for row, rollout in enumerate(rollouts):
            key = (rollout.problem_id, rollout.episode_id)
            left[key] = left.get(key, rollout.reward or 0.0) - sum(turn.reward or 0.0 for turn in rollout.turns)
            last[key] = row
        arrays = []
        for row, (rollout, counted) in enumerate(zip(rollouts, self._counted, strict=True)):
            key, numbers = (rollout.problem_id, rollout.episode_id), rollout.turn_numbers.astype(np.int64)
            own = np.array([turn.reward or 0.0 for turn in rollout.turns] or [0.0])
            own[-1] += left[key] if last[key] == row else 0.0
            arrays.append(own[numbers - numbers.min(initial=numbers.max(initial=0))][counted])
        return torch.from_numpy(np.concatenate([np.zeros(0), *arrays])).to(self.device)

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

    def parts(self, planned: Planned, wanted_N: Tensor) -> list[Part]:
        """Micro-batches as the student's passes are planned. Rows without a wanted token would only cost time, and are
        left out, and so are those of other ranks. All hidden states of a view in a part were made for one head."""
        rows = [row for row in self.row_N[wanted_N].unique().tolist() if self._is_own(row)]
        of_heads: dict[frozenset[tuple[str, int]], list[int]] = {}
        for row in rows:
            of_heads.setdefault(self._heads(row), []).append(row)
        parts = []
        for some in of_heads.values():
            rollouts = [self.examples[row].rollout for row in some]
            plan = planned([r.prompt_ids for r in rollouts], [r.answer_ids for r in rollouts])
            parts += [self._part([some[place] for place in together]) for together in plan]
        return parts

    def view_tokens(self, part: Part, views: Collection[str]) -> dict[str, ViewTokens]:
        """What each of these views said about the counted tokens of a part, if it read any of its rows. Of the other
        rows: NaN, and the id 0."""
        said = {}
        for view in views:
            signals = [e.signals.get(view) for e in part.rows]
            known = next((signal for signal in signals if signal is not None), None)
            if known is not None:
                arrays = {
                    flat: self._gather(part, signals, name)
                    for name, flat in _ARRAYS.items()
                    if getattr(known, name) is not None
                }
                said[view] = ViewTokens(head=known.head, **arrays)
        return said

    def of_all_ranks(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[N] by name: what every rank computed of its own rows' tokens, put together."""
        return dict(tokens) if self._deal is None else self._deal.tokens_of_all(self.examples, self.row_N, tokens)

    def _is_own(self, row: int) -> bool:
        return self._deal is None or self._deal.is_own(self.examples[row].rollout.key)

    def _heads(self, row: int) -> frozenset[tuple[str, int]]:
        """Which heads the hidden states of a row belong to."""
        signals = self.examples[row].signals
        return frozenset((view, id(signal.head)) for view, signal in signals.items() if signal.head is not None)

    def _gather(self, part: Part, signals: Sequence[Signal | None], name: str) -> Tensor:
        known = [None if signal is None else torch.as_tensor(getattr(signal, name)) for signal in signals]
        like = next(array for array in known if array is not None)
        unknown = torch.nan if like.is_floating_point() else 0
        tensors = []
        for array, example in zip(known, part.rows, strict=True):
            counted = torch.from_numpy(np.asarray(example.rollout.answer_mask))
            if array is None:
                tensors.append(like.new_full((int(counted.sum()), *like.shape[1:]), unknown))
            else:
                tensors.append(array[counted.to(array.device)])
        return torch.cat(tensors).to(self.device)

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

    def _per_row(self, numbers: Sequence[int]) -> Tensor:
        """[N] long: a number of each row, for its tokens."""
        return torch.tensor(numbers, dtype=torch.long, device=self.device)[self.row_N]

    def _pass_rates(self, pass_rates: Mapping[str, float | None]) -> Tensor:
        known = [pass_rates[e.rollout.problem_id] for e in self.examples]
        return torch.tensor([np.nan if r is None else r for r in known], dtype=torch.float64, device=self.device)

    def _counted_ints(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return self._flat([a.astype(np.int64)[c] for a, c in zip(arrays, self._counted, strict=True)])

    def _flat(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays])).to(self.device)

    def _per_token(self, arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        """None unless every row has it: a method that uses it anyway fails, instead of reading zeros."""
        if not arrays or any(array is None for array in arrays):
            return None
        kept = [np.asarray(a)[c] for a, c in zip(arrays, self._counted, strict=True)]
        return torch.from_numpy(np.concatenate(kept)).to(self.device)

    def has_view(self, view: str) -> Tensor:
        """[N] bool: the tokens that a view says something of."""
        signals = [e.signals.get(view) for e in self.examples]
        told = [
            np.full(len(c), signal is not None) if signal is None or signal.spans is None else signal.spans.said_T[c]
            for signal, c in zip(signals, self._counted, strict=True)
        ]
        return self._flat([told_T.astype(np.int64) for told_T in told]) > 0

    def replace_signals(self, view: str, signals: Mapping[tuple[str, int], Signal]) -> None:
        """From now on a view says this of the rows with these keys."""
        self.examples = [
            replace(e, signals={**e.signals, view: signals[e.rollout.key]}) if e.rollout.key in signals else e
            for e in self.examples
        ]

    def said(self, view: str, name: str) -> Tensor:
        """[N] an array of a view's signals, NaN for the rows it did not score."""
        arrays = []
        for example in self.examples:
            signal = example.signals.get(view)
            said = None if signal is None else getattr(signal, name)
            assert signal is None or said is not None, f"{example.rollout.key}: view {view!r} was not asked for {name}"
            arrays.append(np.full(len(example.rollout.answer_ids), np.nan, dtype=np.float32) if said is None else said)
        said_N = self._per_token(arrays)
        return self.new_per_token() if said_N is None else said_N
