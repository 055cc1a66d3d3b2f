"""Rows of token ids as trees: what several of them begin with is there once.

A state depends on the tokens before it and on nothing else, so rows with one beginning have the same states there. The
columns of a tree are its segments in depth-first order: a column reads column k and itself iff k comes before it and
has not ended (`reads_until_T`). Where a tree does not pay it is not used: a common beginning becomes a segment only if
that saves at least so many positions, (rows - 1) * its length. A branch costs a launch, a mask, and a copy of the keys
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = Sequence[int]
Columns = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Columns `start` to `end - 1`; the first of them stands at `position` of its rows. parent: -1 at a root."""

    start: int
    end: int
    position: int
    parent: int


@dataclass(frozen=True)
class Forest:
    """Letters: T columns.

    leaf_of_row: the last segment of each row.
    """

    segments: list[Segment]
    ids_T: Columns
    leaf_of_row: list[int]

    @cached_property
    def position_T(self) -> Columns:
        """The place of each column in its row."""
        return np.concatenate([np.arange(s.end - s.start) + s.position for s in self.segments])

    @cached_property
    def reads_until_T(self) -> Columns:
        """The end of the columns that read a column."""
        ends = [segment.end for segment in self.segments]
        for number in range(len(ends) - 1, -1, -1):  # children stand behind their parent
            parent = self.segments[number].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        return np.repeat(ends, [s.end - s.start for s in self.segments])

    def path(self, segment: int) -> list[int]:
        """From the root to a segment, itself included."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.segments[segment].parent
        return found[::-1]

    def columns(self, row: int) -> Columns:
        """Of every token of a row."""
        spans = [self.segments[segment] for segment in self.path(self.leaf_of_row[row])]
        return np.concatenate([np.arange(span.start, span.end) for span in spans])

    def trees(self) -> list[tuple[int, list[int]]]:
        """(columns, rows) of each tree."""
        root_of: list[int] = []
        for number, segment in enumerate(self.segments):
            root_of.append(number if segment.parent < 0 else root_of[segment.parent])
        sizes, rows = dict.fromkeys(root_of, 0), {root: list[int]() for root in root_of}
        for root, segment in zip(root_of, self.segments, strict=True):
            sizes[root] += segment.end - segment.start
        for row, leaf in enumerate(self.leaf_of_row):
            rows[root_of[leaf]].append(row)
        return [(sizes[root], rows[root]) for root in sizes]


def grow(rows: Sequence[Ids], least_shared: int | None) -> Forest:
    """The trees of some rows of at least one token each. least_shared: see `Passes`; None: every row by itself."""
    texts = [np.asarray(row, dtype=np.int64) for row in rows]
    order = list(range(len(rows)))
    if least_shared is None:
        ranges, common = [(row, row + 1, 0, -1) for row in order], np.zeros(0, dtype=np.int64)
    else:
        order.sort(key=lambda row: tuple(rows[row]))
        common = np.array([_common(texts[a], texts[b]) for a, b in pairwise(order)], dtype=np.int64)
        ranges = [(0, len(order), 0, -1)] if order else []
    segments: list[Segment] = []
    ids: list[Columns] = [np.zeros(0, dtype=np.int64)]
    leaf_of_row = [-1] * len(rows)
    end = 0
    ranges.reverse()
    while ranges:  # rows first to last - 1, in order, of which the segment `parent` holds the first `depth` tokens
        first, last, depth, parent = ranges.pop()
        text = texts[order[first]]
        shared = int(common[first : last - 1].min()) if last - first > 1 else len(text)
        saved = (last - first - 1) * (shared - depth)
        is_leaf = last - first == 1
        pays = is_leaf or (least_shared is not None and saved >= least_shared)
        if pays and shared > depth:
            segments.append(Segment(end, end + shared - depth, depth, parent))
            ids.append(text[depth:shared])
            end += shared - depth
            depth, parent = shared, len(segments) - 1
        if is_leaf:
            leaf_of_row[order[first]] = parent
            continue
        cuts = [first, *(np.flatnonzero(common[first : last - 1] == shared) + first + 1).tolist(), last]
        ranges += [(a, b, depth, parent) for a, b in pairwise(cuts)][::-1]
    return Forest(segments, np.concatenate(ids), leaf_of_row)


def _common(one: Columns, other: Columns) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length
