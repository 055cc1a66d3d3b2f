"""The data sets of one evaluation: which, who grades them, and what is said about them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opdkit.data.readers import Dataset
from opdkit.data.sets import data_set
from opdkit.errors import UserError
from opdkit.run.console import Console, say
from opdkit.run.stored_answers import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """One data set of an evaluation."""

    name: str  # its numbers stand under it
    source: str  # what `load_problems` reads
    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A data set that is ready: its problems, and where its answers go."""

    set: EvalSet
    data: Dataset
    store: Store | None  # None: another rank writes


def sets_of(data: Sequence[str], task: str | None, suite: Mapping[str, Path]) -> list[EvalSet]:
    """What `--data` and `--suite` name. suite: of `data.suites.find_sets`, whose table says who grades.

    Raises UserError where nothing is left.
    """
    sets = [EvalSet(name=source, source=source, task=task or "") for source in dict.fromkeys(data)]
    sets += [EvalSet(name=name, source=str(path), task=data_set(name).task) for name, path in suite.items()]
    if not sets:
        raise UserError("no data set of the suite is there, so there is nothing to evaluate on")
    return sets


def say_dropped(one: Loaded, console: Console) -> None:
    for sentence in one.data.files_left_out:
        say(console, sentence, mark="warning")
    dropped = one.data.dropped
    said = [f"{where}: {why}" for where, why in dropped[:3]]
    if len(dropped) > 3:
        said.append(f"{len(dropped)} rows of {one.set.name} in all")
    for words in said:
        say(console, words, mark="dropped")


def about(one: Loaded) -> dict[str, Any]:
    return {
        **asdict(one.set),
        "fingerprint": one.data.fingerprint,
        "num_problems": len(one.data.problems),
        "num_dropped": len(one.data.dropped),
        "num_duplicate_ids": one.data.num_duplicate_ids,
    }
