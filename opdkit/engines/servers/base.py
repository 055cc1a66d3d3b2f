"""What opdkit asks of a server, whichever kind it is: a row in its own words, its answer, new weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from opdkit.engines.base import SamplingParams
from opdkit.engines.servers.http import Client
from opdkit.errors import UserError
from opdkit.types import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a sampler must know of the student beyond its weights.

    num_tokens  ids from here on are never sampled: the model has rows for them, the tokenizer no tokens
    num_rows    ids that the server can draw
    absent      ids below num_tokens that are not sampled either
    stop_ids    any of them ends an answer
    tokenizer   where texts may end answers too
    """

    num_tokens: int
    num_rows: int
    stop_ids: frozenset[int]
    absent: tuple[int, ...] = ()
    max_positions: int | None = None
    tokenizer: Any = None

    @property
    def banned(self) -> list[int]:
        return [*self.absent, *range(self.num_tokens, self.num_rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a server says of itself. version "": it does not say."""

    version: str
    models: tuple[str, ...]  # the names it serves its own model under
    root: str  # the folder or hub name of that model, as it was started with
    max_model_len: int | None


@dataclass(slots=True)
class Written:
    """One answer as the server gave it. versions: of the weights that wrote it, in order; none: it does not say."""

    ids: tuple[int, ...]
    logprobs_T: FloatArray
    stopped: bool
    versions: tuple[str, ...] = field(default=())
    ends_text: bool = False  # its last token completes a string of SamplingParams.stop


class Row(NamedTuple):
    prompt: tuple[int, ...]
    seed: int


class Aborted(Exception):
    """The server ended an answer before its end: it is to be asked for again."""


class Api(Protocol):
    """One kind of server."""

    client: Client
    path: str  # that rows are asked at

    def about(self) -> About: ...

    def body(self, row: Row, params: SamplingParams, vocabulary: Vocabulary, model: str | None) -> dict[str, Any]:
        """What is asked for one row. model: an adapter's name; None: the served model."""
        ...

    def written(self, answer: Any) -> Written:
        """Raises Aborted; KeyError, TypeError, ValueError, IndexError for what is no answer of this kind."""
        ...

    def progress(self) -> float | None:
        """A number that grows while answers are written; None: this kind does not say."""
        ...

    def load_weights(self, folder: str, version: str) -> None:
        """Read the checkpoint `folder` in place, forget what was computed with the old weights, and be of `version`."""
        ...

    def gpu(self) -> str:
        """The number of the one GPU that holds the engine (`gpu_memory.gpu_name`); "" where it has none, or several,
        or does not say."""
        ...

    def load_shared(self, layout: str, version: str) -> None:
        """As `load_weights`, out of this process's memory on that GPU. layout: `gpu_memory.layout_of`."""
        ...

    def load_adapter(self, name: str, folder: str) -> None: ...

    def drop_adapter(self, name: str) -> None: ...

    def sleep(self, keep_weights: bool) -> None: ...

    def wake(self) -> None: ...


def read_logprobs(logprobs: Sequence[Any]) -> FloatArray:
    """[T] float32. Raises ValueError for what is no log-probability."""
    values_T = np.asarray(logprobs, dtype=np.float32)
    if values_T.ndim != 1 or not np.isfinite(values_T).all() or (values_T > 1e-3).any():
        raise ValueError("its log-probs are no log-probs")
    return values_T


def read_ids(ids: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(token) is int for token in ids):
        raise TypeError("its token ids are no numbers")
    return tuple(ids)


def never_tried(what: str, version: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> str | None:
    """A sentence where a version is outside the range that was tried."""
    if oldest <= numbers(version) <= newest:
        return None
    span = " to ".join(dict.fromkeys(".".join(map(str, one)) for one in (oldest, newest)))
    return f"{what} {version or 'of unknown version'} was never tried with opdkit, which was tested with {span}"


def numbers(version: str) -> tuple[int, ...]:
    """(0, 32) of "0.32.0.post1"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} did not answer as such a server does; check the address and sampling.server_kind")
    return value
