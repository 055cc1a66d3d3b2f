"""`load_problems`: the one door through which problems enter, whatever file, folder or dataset they are in."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.data.files.sources import files_left_out, rows_of
from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.schema import Schema
from opdkit.data.schemas.values import column_text, plain
from opdkit.errors import UserError
from opdkit.tasks import arithmetic
from opdkit.types import Problem, seed_from

IN_PYTHON = "python:problems"  # the source of problems that were given to `opdkit.train`


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Problems ready to be used. Ids are unique.

    fingerprint: sha256 over every problem as loaded (id, messages with their instruction, gold, solution, meta, kept
    columns, and those that reward functions ask for), in order. Two runs with one fingerprint asked the same questions
    and graded against the same answers, whatever the file format was.
    """

    problems: list[Problem]
    fingerprint: str
    dropped: list[tuple[str, str]]  # (where, why) of every row that could not be used, e.g. ("train.jsonl:17", ...)
    num_duplicate_ids: int  # ids that came again and were made unique as `id#2`, `id#3`
    source: str
    files_left_out: list[str] = field(default_factory=list)  # a sentence each (`sources.files_left_out`)
    parts: Mapping[str, Dataset] = field(default_factory=dict)  # of one that is joined of several, by name


def load_problems(
    source: str | os.PathLike[str],
    *,
    task: str,
    limit: int | None = None,
    seed: int = 0,
    instruction: str = "auto",
    split: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    require_gold: bool = True,
    asked: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> Dataset:
    """Read problems. The schema is found from the columns (`schema.py`), or given by `columns`.

    source: a `.jsonl`, `.json`, `.parquet` or `.csv` file (`.gz` as well); a folder of those, or one of
        `datasets.save_to_disk` (`folder:split`); a hub name `owner/name`, `owner/name:split`,
        `owner/name:config:split`, with `@revision` after the name for one commit; `arithmetic:VARIANT:SPLIT`, generated
        by `opdkit.tasks.arithmetic` (complete: no instruction is added).
    limit: take this many, drawn by `seed` (files are often sorted, so the first rows are no sample) and kept in file
        order. A problem's place in the draw depends on its id and the seed only.
    instruction: "boxed" | "answer_line" | "none" | "auto": for task "math", ask for a box when the last user turn asks
        neither for a box nor for an `Answer:` line. `meta["answer_style"] == "answer_line"` when it asks for the line
        and no box.
    columns: role (prompt, answer, solution, system, id, meta) -> column, dots for nested ones.
    require_gold: False keeps rows that nobody can grade (gold None, no tests).
    asked: columns that reward functions want, `TaskOptions.columns_asked`: as they stand, in `Problem.row`.
    kept: columns of any name, whose texts become `Problem.columns`.

    Rows that cannot be used are dropped and listed. Raises UserError for a source that is missing, broken (file and
    line), empty, or has no usable row at all.
    """
    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit} would load nothing: give 1 or more, or leave it out for all")
    if source.startswith(arithmetic.GENERATED):
        if split is not None or columns is not None or instruction not in ("auto", "none"):
            raise UserError(f"{source} is generated: split, columns and instruction do not apply to it, leave them out")
        return _generated(source, limit, seed, kept)
    if source == IN_PYTHON:
        raise UserError("the problems of this recipe were given to opdkit.train; give them again, or set data.train")
    schema = Schema(
        task=task, instruction=instruction, columns=columns, require_gold=require_gold, asked=asked, kept=kept
    )
    rows = rows_of(source, split=split, keep=schema.keep)
    found = _collect(rows, schema, source, limit, seed)
    return replace(found, files_left_out=files_left_out(source))


def joined(sets: Mapping[str, Dataset]) -> Dataset:
    """Several sets as one, in order: ids that two of them have are made unique, and counted beside those of each."""
    ids = UniqueIds()
    parts = {name: replace(found, problems=list(ids.unique(found.problems))) for name, found in sets.items()}
    problems = [problem for found in parts.values() for problem in found.problems]
    return Dataset(
        problems=problems,
        fingerprint=fingerprint(problems),
        dropped=[row for found in parts.values() for row in found.dropped],
        num_duplicate_ids=ids.num_duplicates + sum(found.num_duplicate_ids for found in parts.values()),
        source=", ".join(found.source for found in parts.values()),
        files_left_out=[sentence for found in parts.values() for sentence in found.files_left_out],
        parts=parts,
    )


def problems_of(
    rows: Iterable[Problem | Mapping[str, Any]], schema: Schema, *, limit: int | None = None, seed: int = 0
) -> Dataset:
    """Problems, or rows as a file would have them, that are in memory (`IN_PYTHON`); limit and seed as in
    `load_problems`. Raises UserError for anything else, and where nothing is left."""
    found = list(rows)
    for place, row in enumerate(found):
        if not isinstance(row, Problem | Mapping):
            raise UserError(
                f"problems[{place}] is {type(row).__name__}; give Problems or dicts with the columns of a data file "
                "(of a data frame: frame.to_dict('records'))"
            )
    located = [(f"problems[{place}]", row) for place, row in enumerate(found)]
    return _collect(located, schema, IN_PYTHON, limit, seed)


def _collect(rows: Iterable[tuple[str, Any]], schema: Schema, source: str, limit: int | None, seed: int) -> Dataset:
    dropped: list[tuple[str, str]] = []
    ids = UniqueIds()
    problems = list(_limited(ids.unique(_usable(rows, schema, dropped)), limit, seed))
    if not problems:
        raise UserError(_why_nothing(source, dropped))
    return Dataset(
        problems=problems,
        fingerprint=fingerprint(problems),
        dropped=dropped,
        num_duplicate_ids=ids.num_duplicates,
        source=source,
    )


def _usable(rows: Iterable[tuple[str, Any]], schema: Schema, dropped: list[tuple[str, str]]) -> Iterator[Problem]:
    for where, row in rows:
        try:
            yield row if isinstance(row, Problem) else schema.problem(dict(row))
        except Unusable as error:
            dropped.append((where, str(error)))


class UniqueIds:
    """Passes problems on, renaming an id that was seen before to `id#2`, `id#3`, ..., and counts those."""

    def __init__(self) -> None:
        self.num_duplicates = 0
        self._times: Counter[str] = Counter()
        self._taken: set[str] = set()

    def unique(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        for problem in problems:
            new_id = problem.id
            if new_id in self._taken:
                self.num_duplicates += 1
                self._times[problem.id] = max(self._times[problem.id], 1)
                while new_id in self._taken:  # the file may hold a real "7#2" beside two of "7"
                    self._times[problem.id] += 1
                    new_id = f"{problem.id}#{self._times[problem.id]}"
                problem = replace(problem, id=new_id)
            self._taken.add(new_id)
            yield problem


def _limited(problems: Iterable[Problem], limit: int | None, seed: int) -> Iterator[Problem]:
    """The `limit` problems with the smallest draw, in file order; only those are held in memory."""
    if limit is None:
        yield from problems
        return
    drawn = ((seed_from(seed, problem.id, "limit"), place, problem) for place, problem in enumerate(problems))
    chosen = heapq.nsmallest(limit, drawn, key=lambda entry: entry[:2])
    for _, _, problem in sorted(chosen, key=lambda entry: entry[1]):
        yield problem


def _why_nothing(source: str, dropped: Sequence[tuple[str, str]]) -> str:
    if not dropped:
        return f"{source} holds no rows: give a file with at least one problem"
    why, count = Counter(why for _, why in dropped).most_common(1)[0]
    where = next(place for place, reason in dropped if reason == why)
    rows = "its only row cannot be used" if len(dropped) == 1 else f"none of its {len(dropped)} rows can be used"
    times = "" if len(dropped) == 1 else f", {count} times"
    return f"{source}: {rows}: {why} (first at {where}{times}); `data.columns` can name other columns for them"


def fingerprint(problems: Iterable[Problem]) -> str:
    """sha256, in hexadecimal, over the problems in order."""
    digest = hashlib.sha256()
    for problem in problems:
        messages = [dict(turn) for turn in problem.messages]
        parts = [problem.id, problem.task, messages, problem.gold, problem.solution, dict(problem.meta)]
        parts += [dict(problem.columns)] if problem.columns else []
        parts += [{"row": plain(dict(problem.row))}] if problem.row else []
        digest.update(json.dumps(parts, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _generated(source: str, limit: int | None, seed: int, kept: Sequence[str]) -> Dataset:
    variant, split = arithmetic.parts_of(source)
    problems = list(arithmetic.problems(variant, split, limit, seed))
    if kept:
        problems = [
            replace(p, columns={name: column_text(p.meta[name], name) for name in kept if name in p.meta})
            for p in problems
        ]
    return Dataset(
        problems=problems,
        fingerprint=fingerprint(problems),
        dropped=[],
        num_duplicate_ids=0,
        source=source,
    )
