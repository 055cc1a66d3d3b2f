"""Which problems the student could do in training and which not, over all saved rows, of which it reads two columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opdkit.reporting.html.document import Part, part, small, table
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact, score
from opdkit.reporting.run import RunContents, row_files

NUM_SHOWN = 8  # of the best, and of the worst
MAX_FILES = 200  # the newest; more would make a long run's report slow
QUESTION_LENGTH = 160  # characters


@dataclass(slots=True)
class Seen:
    """The graded answers to one problem, oldest first."""

    problem_id: str
    rewards: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def last(self) -> float:
        """The mean reward of the last saved step that had the problem."""
        newest = [r for r, step in zip(self.rewards, self.steps, strict=True) if step == self.steps[-1]]
        return sum(newest) / len(newest)


def problems(run: RunContents) -> Part | None:
    """Two tables. None where fewer than two problems have two graded answers, or all the same mean: none is best."""
    files = dict(sorted(row_files(run.folder).items())[-MAX_FILES:])
    found, unreadable = outcomes(files)
    seen = [each for each in found if len(each.rewards) > 1]
    if len(seen) < 2 or len({each.mean for each in seen}) == 1:
        return None
    ordered = sorted(seen, key=lambda each: (each.mean, -len(each.rewards), each.problem_id))
    half = min(NUM_SHOWN, len(ordered) // 2)
    best, worst = list(reversed(ordered))[:half], ordered[:half]
    told = f"{len(seen):,} problems have several graded answers in the rows of {len(files)} steps."
    if (older := len(row_files(run.folder)) - len(files)) > 0:
        told += f" The rows of {older} earlier steps were not read."
    if unreadable:
        told += f" {len(unreadable)} files could not be read ({unreadable[0].name} is the first)."
    questions = _questions({each.problem_id: files[each.steps[-1]] for each in (*best, *worst)})
    tables = [_table("Best", best, questions), _table("Worst", worst, questions)]
    return part("Problems", small(told), tag("div", *tables, class_="columns"))


def outcomes(files: Mapping[int, Path]) -> tuple[list[Seen], list[Path]]:
    """Every problem with a graded answer, and the files that could not be read. files: step -> rows."""
    found: dict[str, Seen] = {}
    unreadable: list[Path] = []
    for step, path in sorted(files.items()):
        columns = _columns(path, "problem_id", "reward")
        if columns is None:
            unreadable.append(path)
            continue
        for problem_id, reward in zip(*columns, strict=True):
            if reward is not None:
                seen = found.setdefault(problem_id, Seen(problem_id))
                seen.rewards.append(reward)
                seen.steps.append(step)
    return list(found.values()), unreadable


def _columns(path: Path, *names: str) -> list[list[Any]] | None:
    try:
        table = pq.read_table(path, columns=list(names))
        return [table.column(name).to_pylist() for name in names]
    except (pa.ArrowException, OSError, KeyError):
        return None


def _questions(where: Mapping[str, Path]) -> dict[str, str]:
    """The beginning of what was asked, by problem."""
    questions: dict[str, str] = {}
    for path in dict.fromkeys(where.values()):
        for problem_id, messages in zip(*(_columns(path, "problem_id", "messages") or ([], [])), strict=True):
            if where.get(problem_id) == path and messages:
                text = " ".join(dict(messages[-1]).get("content", "").split())
                questions[problem_id] = text if len(text) <= QUESTION_LENGTH else f"{text[:QUESTION_LENGTH]} …"
    return questions


def _table(title: str, shown: Sequence[Seen], questions: Mapping[str, str]) -> Html:
    return table(
        [title, "mean reward", "answers", "last"],
        [
            [questions.get(each.problem_id) or each.problem_id, score(each.mean), compact(len(each.rewards)),
             compact(each.last)]
            for each in shown
        ],
    )  # fmt: skip
