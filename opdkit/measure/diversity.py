"""How different the answers to one problem are.

    tokens           identifiers, runs of digits, single other characters
    self_bleu        mean over texts of BLEU-4 against the others: clipped n-gram precision with one added to both sides
                     of the fraction (1 for an order without n-grams), brevity penalty with the closest length. 1: alike
    distinct         different n-grams / n-grams of all texts laid end to end
    unique_ratio     different texts / texts, white space made even
    distance         ours: mean over pairs of 1 - sum(min) / sum(max) of the counts of 1- to 4-grams of tokens. 0: alike
    text_distance    mean over pairs of 1 - difflib's ratio of the characters. Quadratic, and of texts of 200 characters
                     or more difflib leaves out every character that is not rare, so it is not the default
    tree_distance    as `distance`, of the counts of syntax node types, over programs that parse
    distinct_words   different n-grams of white-space words / n-grams, never across texts (thunlp/OPD, grade.py)

All but `distance` and distinct_words as in viviable/mopd_code, diversity/compute_metrics.py. None: not defined (one
text, no n-grams). All depend on the number of texts: compare equal numbers.

Letters: T texts of a problem, U different n-grams.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from opdkit.measure.intervals import Difference, Estimate

_TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+|\S")
MAX_ORDER = 4

Ids = npt.NDArray[np.int64]


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def unique_ratio(texts: Sequence[str]) -> float | None:
    return len({" ".join(text.split()) for text in texts}) / len(texts) if texts else None


def text_distance(texts: Sequence[str]) -> float | None:
    """The published pairwise distance: milliseconds a pair, and seconds for long texts."""
    pairs = [
        0.0 if first == second else 1 - difflib.SequenceMatcher(None, first, second).ratio()
        for first, second in itertools.combinations(texts, 2)
    ]
    return sum(pairs) / len(pairs) if pairs else None


def distinct_words(texts: Sequence[str], n: int = 4) -> float:
    """As thunlp/OPD logs it: 0 where no text has n words."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def tree_distance(node_counts: Sequence[Mapping[str, int]]) -> float | None:
    """node_counts: of each program that parses, how often it has each type of node."""
    pairs = []
    for first, second in itertools.combinations(node_counts, 2):
        names = first.keys() | second.keys()
        shared = sum(min(first.get(name, 0), second.get(name, 0)) for name in names)
        everything = sum(max(first.get(name, 0), second.get(name, 0)) for name in names)
        pairs.append(1 - shared / everything if everything else 0.0)
    return sum(pairs) / len(pairs) if pairs else None


class NGrams:
    """The 1- to 4-grams of the texts of one problem, as numbers; every measure of a subset of the texts uses them."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        """texts: the tokens of each."""
        numbers = {token: number for number, token in enumerate(dict.fromkeys(itertools.chain(*texts)))}
        self._ids_T = [np.array([numbers[token] for token in text], dtype=np.int64) for text in texts]
        joined = np.concatenate([*self._ids_T, np.zeros(0, dtype=np.int64)])
        self._counts_TU = [self._count(n, grams) for n, grams in enumerate(_grams(joined, MAX_ORDER), start=1)]

    def self_bleu(self, chosen: Sequence[int]) -> float | None:
        """chosen: which of the texts; the same for the other measures."""
        if len(chosen) < 2:
            return None
        lengths = [len(self._ids_T[i]) for i in chosen]
        log_precision_T = np.zeros(len(chosen))
        for counts_TU in self._counts_TU:
            counts_TU = counts_TU[list(chosen)]
            overlap_T = np.minimum(counts_TU, _largest_of_others(counts_TU)).sum(1)
            total_T = counts_TU.sum(1)
            log_precision_T += np.log(np.where(total_T > 0, (overlap_T + 1) / (total_T + 1), 1.0)) / MAX_ORDER
        scores = [
            0.0 if length == 0 else math.exp(log_precision + _log_brevity(length, lengths[:i] + lengths[i + 1 :]))
            for i, (length, log_precision) in enumerate(zip(lengths, log_precision_T.tolist(), strict=True))
        ]
        return sum(scores) / len(scores)

    def distinct(self, n: int, chosen: Sequence[int]) -> float | None:
        joined = np.concatenate([self._ids_T[i] for i in chosen]) if chosen else np.zeros(0, dtype=np.int64)
        grams = _grams(joined, n)[-1]
        return len(np.unique(grams)) / len(grams) if len(grams) else None

    def distance(self, chosen: Sequence[int]) -> float | None:
        if len(chosen) < 2:
            return None
        counts_TU = np.concatenate(self._counts_TU, axis=1)[list(chosen)]
        total_T = counts_TU.sum(1)
        distances: list[float] = []
        for i in range(len(chosen) - 1):
            shared = np.minimum(counts_TU[i], counts_TU[i + 1 :]).sum(1)
            everything = total_T[i] + total_T[i + 1 :] - shared
            distances += np.where(everything > 0, 1 - shared / np.maximum(everything, 1), 0.0).tolist()
        return sum(distances) / len(distances)

    def _count(self, n: int, grams: Ids) -> Ids:
        """[T, U]: how often each text has each n-gram. grams: those of all texts laid end to end."""
        inside_T = [np.arange(len(ids)) <= len(ids) - n for ids in self._ids_T]  # none across two texts
        text = np.repeat(np.arange(len(inside_T)), [len(inside) for inside in inside_T])[: len(grams)]
        inside = np.concatenate([*inside_T, np.zeros(0, dtype=np.bool_)])[: len(grams)]
        width = int(grams.max()) + 1 if len(grams) else 0
        flat = np.bincount(text[inside] * width + grams[inside], minlength=len(inside_T) * width)
        return flat.reshape(len(inside_T), width).astype(np.int64)


def _grams(ids: Ids, up_to: int) -> list[Ids]:
    """For n = 1 .. up_to, a number for every n-gram of a sequence, equal for equal n-grams, from 0 on."""
    num_tokens = int(ids.max()) + 1 if len(ids) else 1
    grams = [ids]
    for n in range(2, up_to + 1):
        pairs = grams[-1][: max(0, len(ids) - n + 1)] * num_tokens + ids[n - 1 :]
        grams.append(np.unique(pairs, return_inverse=True)[1].astype(np.int64))  # small again: no product overflows
    return grams


def _largest_of_others(counts_TU: Ids) -> Ids:
    """[T, U]: for each text, the largest count among the other texts."""
    order = np.sort(counts_TU, axis=0)
    first_U, second_U = order[-1], order[-2]
    return np.where(counts_TU == first_U, np.where((counts_TU == first_U).sum(0) > 1, first_U, second_U), first_U)


def _log_brevity(length: int, others: Sequence[int]) -> float:
    """Published: no penalty only for a text longer than the closest other one (the shorter of two as close)."""
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 0.0 if length > closest else 1 - closest / length


Row = dict[str, float | None]  # measure -> value of one problem; None: not defined


class RunDiversity(TypedDict):
    measures: dict[str, Estimate]  # mean over problems; `problems` says over how many it is defined
    std: dict[str, float | None]  # between problems
    difference: dict[str, Difference] | None  # to the first run, problem by problem; None for the first
    # Pearson, between problems: do those with more different answers have a higher pass@n?
    correlation_with_pass: dict[str, float | None]
    num_unparsed_programs: int | None  # None: not programs


class Case(TypedDict):
    """One problem, as every run answers it."""

    problem_id: str
    question: str | None
    distances: dict[str, float]
    answers: dict[str, list[dict[str, Any]]]  # run -> {"text", "reward"}


class SetDiversity(TypedDict):
    problems: int  # in all runs, with at least two answers in each
    left_out: dict[str, int]  # run -> its problems that are not among those
    answers_each: int  # at most; a problem has as many as the run with the fewest has
    runs: dict[str, RunDiversity]
    per_problem: dict[str, dict[str, Row]]  # problem -> run -> measures
    cases: list[Case]  # the largest differences in distance first
