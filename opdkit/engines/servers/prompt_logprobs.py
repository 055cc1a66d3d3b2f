"""`prompt_logprobs` of an OpenAI-compatible answer, read into arrays while the bytes come.

    "prompt_logprobs":[null,{"504":{"logprob":-8.2157,"rank":191,"decoded_token":"The"},"29":{...}},{...},...]

A token's own entry, then the likeliest: thousands of bytes a token. As Python objects that costs several times the
numbers (`benchmarks/prompt_logprobs.py`), so `Scan` finds the numbers in the bytes; `Loaded` reads the JSON as such,
for servers that write it in another way. Which of the two is used is settled by the probe, where both must agree.

Letters: E entries of an answer, T answer tokens, K the likeliest ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from opdkit.types import Signal

_BETWEEN = b'":{"logprob":'  # an entry's id stands before it, its log-prob behind it
_DIGITS, _NUMBER = 12, 32  # bytes of an id with what opens it, and of a number with what ends it
_HOLD = len(_BETWEEN) + _NUMBER
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entries:
    """ids_E, logprob_E, and at which token of the prompt each stands (from 1: the first has none)."""

    ids_E: Ints
    logprob_E: Floats
    place_E: Ints


class Scan:
    """Takes the bytes of one answer, part by part. Only what JSON cannot hold inside a string is looked for."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._rest, self._from = b"", 0  # bytes that are not looked at yet; where the first entry among them may be
        self._ids: list[Ints] = []
        self._logprob: list[Floats] = []
        self._opens: list[npt.NDArray[np.bool_]] = []

    def feed(self, part: bytes) -> None:
        self.num_bytes += len(part)
        data = self._rest + part
        end = len(data) - _HOLD
        if end <= _DIGITS:
            self._rest = data
            return
        self._look(data, end)
        self._rest, self._from = data[end - _DIGITS :], _DIGITS

    def read(self) -> Entries:
        """Raises ValueError for numbers that are none."""
        self._look(self._rest + b" " * _HOLD, len(self._rest))
        opens_E = np.concatenate([np.zeros(0, dtype=np.bool_), *self._opens])
        return Entries(
            np.concatenate([np.zeros(0, dtype=np.int64), *self._ids]),
            np.concatenate([np.zeros(0), *self._logprob]),
            np.cumsum(opens_E),
        )

    def _look(self, data: bytes, end: int) -> None:
        """The entries whose middle begins in [self._from, end)."""
        bytes_ = np.frombuffer(data, dtype=np.uint8)
        at_E = np.flatnonzero(bytes_[self._from : end] == _BETWEEN[0]) + self._from
        for offset in (3, 2, 1, *range(4, len(_BETWEEN))):  # what tells most first
            at_E = at_E[bytes_[at_E + offset] == _BETWEEN[offset]]
        if not len(at_E):
            return
        ids_E, opens_E = _ids_before(bytes_, at_E)
        self._ids.append(ids_E)
        self._opens.append(opens_E)
        window_EN = bytes_[at_E[:, None] + len(_BETWEEN) + np.arange(_NUMBER)]
        ends_E = ((window_EN == ord(",")) | (window_EN == ord("}"))).argmax(1)
        text = np.where(np.arange(_NUMBER) < ends_E[:, None], window_EN, ord(" ")).astype(np.uint8).tobytes()
        logprob_E = np.fromstring(text, dtype=np.float64, sep=" ")  # stops at what is no number
        if len(logprob_E) != len(at_E):
            raise ValueError("a log-prob that is no number")
        self._logprob.append(logprob_E)


class Loaded:
    """The same of JSON that is written in another way."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.num_bytes = 0

    def feed(self, part: bytes) -> None:
        self.num_bytes += len(part)
        self._parts.append(part)

    def read(self) -> Entries:
        """Raises ValueError for what holds none."""
        try:
            said = json.loads(b"".join(self._parts))["choices"][0]["prompt_logprobs"]
            entries = [
                (int(token), float(entry["logprob"]), place)
                for place, entries in enumerate(said)
                for token, entry in (entries or {}).items()
            ]
            ids, logprobs, places = zip(*entries, strict=True) if entries else ((), (), ())
            return Entries(np.array(ids, np.int64), np.array(logprobs, np.float64), np.array(places, np.int64))
        except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"no prompt_logprobs in it ({type(error).__name__}: {error})") from None


def signal_of(
    found: Entries,
    prompt: Sequence[int],
    num_context: int,
    k: int | None,
    unshared: Collection[int] = (),
    end: int | None = None,
) -> Signal:
    """What the entries say of the tokens behind the first `num_context`: their own log-probs, and the k likeliest.

    Ids that are `unshared`, or not below `end`, are not there for the student: they leave the lists, and what the
    others have is divided by what they leave. Raises ValueError for an answer that does not fit the prompt.
    """
    own_E = np.asarray([-1, *prompt[1:]], dtype=np.int64)
    if len(found.place_E) == 0 or found.place_E[-1] != len(prompt) - 1 or found.place_E[0] != 1:
        last = int(found.place_E[-1]) if len(found.place_E) else 0
        raise ValueError(f"log-probs of {last} tokens, not of {len(prompt) - 1}")
    if not np.isfinite(found.logprob_E).all() or found.logprob_E.max() > 1e-3 or found.ids_E.min() < 0:
        raise ValueError("log-probs, or ids, that are none")
    is_own_E = found.ids_E == own_E[found.place_E]
    if not (np.bincount(found.place_E[is_own_E], minlength=len(prompt))[1:] == 1).all():
        raise ValueError("a token whose own log-prob is not among those of its place")
    sampled_T = np.zeros(len(prompt))
    sampled_T[found.place_E[is_own_E]] = found.logprob_E[is_own_E]
    is_shared_E = np.ones(len(found.ids_E), dtype=np.bool_) if end is None else found.ids_E < end
    if unshared:
        is_shared_E &= ~np.isin(found.ids_E, np.fromiter(unshared, dtype=np.int64))
    left = np.zeros(len(prompt))
    if not is_shared_E.all():
        out_E = ~is_shared_E
        gone = np.bincount(found.place_E[out_E], np.exp(found.logprob_E[out_E]), minlength=len(prompt))
        left = np.log1p(-np.minimum(gone, 1 - 1e-12))
        sampled_T = sampled_T - left
    sampled_logprob_T = sampled_T[num_context:].astype(np.float32)
    if k is None:
        return Signal(sampled_logprob_T=sampled_logprob_T)
    wanted_E = is_shared_E & (found.place_E >= num_context)
    ids_E, logprob_E, place_E = found.ids_E[wanted_E], found.logprob_E[wanted_E], found.place_E[wanted_E]
    order_E = np.lexsort((-logprob_E, place_E))
    count_T = np.bincount(place_E, minlength=len(prompt))[num_context:]
    if len(count_T) and count_T.min() < k:
        raise ValueError(f"a list of {int(count_T.min())} ids that the student knows, not of {k}")
    starts_T = np.cumsum(count_T) - count_T
    chosen_TK = order_E[starts_T[:, None] + np.arange(k)] if len(count_T) else np.zeros((0, k), dtype=np.int64)
    topk_logprob_TK = logprob_E[chosen_TK] - left[num_context:, None]
    return Signal(
        sampled_logprob_T=sampled_logprob_T,
        topk_ids_TK=ids_E[chosen_TK],
        topk_logprob_TK=topk_logprob_TK.astype(np.float32),
    )


def _ids_before(bytes_: npt.NDArray[np.uint8], at_E: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The number that ends before each place, and whether its entry opens a token's (`{`, not `,`, stands before)."""
    ids_E, is_digit_E = np.zeros(len(at_E), dtype=np.int64), np.ones(len(at_E), dtype=np.bool_)
    opened_E = at_E.copy()
    for power in range(_DIGITS - 2):
        digit_E = bytes_[at_E - 1 - power]
        is_digit_E &= (digit_E >= ord("0")) & (digit_E <= ord("9"))
        ids_E += np.where(is_digit_E, (digit_E.astype(np.int64) - ord("0")) * 10**power, 0)
        opened_E -= is_digit_E
        if not is_digit_E.any():
            break
    return ids_E, bytes_[opened_E - 2] == ord("{")


def read_any(data: bytes) -> tuple[Entries, Any]:
    """(entries of a whole answer, which of the two reads it): `Scan` where it finds just what JSON holds."""
    loaded = Loaded()
    loaded.feed(data)
    whole = loaded.read()
    scan = Scan()
    scan.feed(data)
    try:
        quick = scan.read()
    except ValueError:
        return whole, Loaded
    same = all(np.array_equal(getattr(quick, name), getattr(whole, name)) for name in ("ids_E", "logprob_E", "place_E"))
    return whole, Scan if same else Loaded
