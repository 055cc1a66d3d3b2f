"""Sampling and scoring with a Hugging Face model in this process: exact log-probs, no weight copies, any device.

Letters: B rows, T positions, K entries of a support, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from opdkit.engines.base import Progress, Sampled, SamplingParams
from opdkit.engines.model import Ids, LanguageModel
from opdkit.types import Needs, TeacherSignal


class HFEngine:
    """`Sampler` and `Scorer` (see `engines.base`) over one `LanguageModel`, with its own weights or stand-ins."""

    def __init__(
        self, model: LanguageModel, *, max_tokens_per_batch: int = 32768, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model = model
        self.max_tokens_per_batch = max_tokens_per_batch
        self.weights = weights

    def sample(
        self,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
    ) -> list[Sampled]:
        """One answer per prompt, in order. Row i depends on prompts[i], seeds[i] and params only."""
        raise NotImplementedError

    def score(
        self,
        contexts: Sequence[Ids],
        answers: Sequence[Ids],
        needs: Needs,
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[TeacherSignal]:
        """What this model says of every answer token, given the context."""
        raise NotImplementedError
