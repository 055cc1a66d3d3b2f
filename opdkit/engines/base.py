"""What an engine can do, in two verbs: `sample` answers and `score` answers. Token ids in and out, never text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from opdkit.types import Asked, Finish, FloatArray, Signal

# Called with (number of finished answers, number of answers) while an engine works, for progress bars.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The distribution answers are drawn from. temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_answer_tokens: int = 1024
    stop: tuple[str, ...] = ()  # texts that end an answer with the token that completes one (`tokens.stop_strings`)

    @property
    def identity(self) -> dict[str, Any]:
        """Of answers: what they were drawn from. Without `stop` where nothing stops, as older answers have it."""
        return {key: value for key, value in asdict(self).items() if key != "stop" or value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One sampled answer. T = len(answer_ids); if finish == "stop" the last id is a stop token, or completes a string
    of `stop`."""

    answer_ids: tuple[int, ...]
    logprobs_T: FloatArray  # nats, under the distribution that was sampled (after temperature, top-k, top-p, min-p)
    finish: Finish
    uncut_logprobs_T: FloatArray | None = None  # before top-k, top-p and min-p; None: none of them cut, or greedy


# Called with the answers that have come to their end since the last call, by the place of their prompt.
Finished = Callable[[Mapping[int, Sampled]], None]


class Sampler(Protocol):
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Sampled]:
        """One answer per prompt, in order. Row i depends on prompts[i], seeds[i] and params only.

        finished hears of every answer once. progress is called after every token or few, and may raise Interrupted: it
        is passed on once `finished` has got what is whole.
        """
        ...


@runtime_checkable
class Gathering(Protocol):
    """A sampler of which several ranks keep parts."""

    def gathered(self) -> AbstractContextManager[None]:
        """Inside the block, which all ranks begin, each may sample as often as it likes."""
        ...


class Scorer(Protocol):
    def score(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        asked: Asked,
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Signal]:
        """What this model says of every answer token, given the context. Log-probs are at `temperature`, over the
        tokenizer's vocabulary; hidden states are raw."""
        ...
