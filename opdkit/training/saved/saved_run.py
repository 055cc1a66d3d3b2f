"""A run whose answers, and what its teachers said of them, are read again: `[teacher] kind = "saved"`.

Answers and readings come from its rows, signals from its spool (`training/saved/spool.py`), step by step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.recipe.saved import read_description, spool_files
from opdkit.run.folder import RunFolder
from opdkit.run.rows import load_rows
from opdkit.training.saved.spool import head_file, reading_key, unpacked, vocabulary_digest
from opdkit.types import Example, Group, Problem, Rollout, Signal, View, as_asked


@dataclass(slots=True)
class _Step:
    """What is in memory of one step: its rows, and the files that its arrays are mapped from."""

    number: int  # counted from 1, as in file names
    rows: Sequence[Example]
    temperature: float
    places: Mapping[tuple[str, str], tuple[Any, int, str | None]]  # (who read, what) -> (file, signal's number, head)
    of_rollout: Mapping[tuple[str, int], Example] = field(init=False)

    def __post_init__(self) -> None:
        self.of_rollout = {row.rollout.key: row for row in self.rows}


class SavedRun:
    """Raises UserError for a folder without a spool, or one of another vocabulary than the student's."""

    def __init__(self, path: str, student: LanguageModel) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        self.described = read_description(self.folder.path)
        if self.described["vocabulary"] != vocabulary_digest(student.tokenizer):
            raise UserError(
                f"{student.name} has another tokenizer than the student of {path}, so the saved ids mean something "
                "else to it; replay with the run's own model, or one of its tokenizer"
            )
        self._device = student.device
        self._step: _Step | None = None
        self._heads: dict[str, Head] = {}

    def common(self, end: int, absent: Sequence[int]) -> tuple[int, list[int]]:
        """The ids that its models compared, as `common_limit`. Raises UserError where models that are loaded now have
        fewer."""
        kept = (int(self.described["num_tokens"]), list(self.described["absent_ids"]))
        if kept[0] > end or not {*absent} <= {*kept[1], *range(kept[0], end)}:
            raise UserError(
                f"the models of this recipe have fewer token ids in common than those of {self.folder.path} had; "
                "replay it with models that know all of them"
            )
        return kept

    def groups(self, problems: Sequence[Problem], step: int) -> list[Group]:
        """The answers of the step behind `step` others. Raises UserError where they are answers to other problems."""
        rows = self._of(step).rows
        answered: dict[str, list[Example]] = {}
        for row in rows:
            answered.setdefault(row.problem.id, []).append(row)
        if [*answered] != [problem.id for problem in problems]:
            raise UserError(
                f"step {step + 1} of {self.folder.path} has answers to other problems than this recipe draws (first: "
                f"{next(iter(answered), 'none')} and {problems[0].id}); keep seed, [data] and "
                "train.problems_per_step as they were"
            )
        return [
            Group(problem=as_asked(problem, rows[0].problem), rollouts=tuple(row.rollout for row in rows))
            for problem in problems
            for rows in [answered[problem.id]]
        ]

    def view(self, step: int, name: str, rollout: Rollout) -> View | None:
        """What was read of a rollout in the place `name`."""
        row = self._of(step).of_rollout.get(rollout.key)
        return None if row is None else row.views.get(name)

    def signal(self, step: int, reader: str, context_ids: Sequence[int], answer_ids: Sequence[int]) -> Signal:
        """What the view `reader` said. Raises UserError where it was not asked."""
        there = self._of(step)
        place = there.places.get((reader, reading_key(context_ids, answer_ids)))
        if place is None:
            raise UserError(
                f"step {step + 1} of {self.folder.path}: its view {reader!r} did not read this answer; replay with the "
                "run's own [context] and [views]"
            )
        file, number, digest = place
        names = {name.partition(".")[2] for name in file.keys() if name.startswith(f"{number}.")}  # noqa: SIM118
        arrays: dict[str, Tensor] = {name: file.get_tensor(f"{number}.{name}") for name in names}
        if digest is not None:
            head = self._head(digest)
            return Signal(hidden_TH=unpacked(arrays, head.weight_VH.dtype), head=head)
        if "topk_ids_TK" in arrays:
            arrays["topk_ids_TK"] = arrays["topk_ids_TK"].long()
        return Signal(**{name: array.numpy() for name, array in arrays.items()})

    def temperature(self, step: int) -> float:
        """That lists of the step are at."""
        return self._of(step).temperature

    def _of(self, step: int) -> _Step:
        if self._step is None or self._step.number != step + 1:
            self._step = self._read(step + 1)
            used = {digest for _, _, digest in self._step.places.values()}
            self._heads = {digest: head for digest, head in self._heads.items() if digest in used}
        return self._step

    def _read(self, number: int) -> _Step:
        files = spool_files(self.folder.path / "spool", number)
        if not files:
            raise UserError(
                f"{self.folder.path} kept nothing of step {number}: its spool ends before; lower train.steps, or train "
                "it again with a larger spool.max_gib"
            )
        places: dict[tuple[str, str], tuple[Any, int, str | None]] = {}
        temperature = 1.0
        for path in files:
            file, told = _open(path)
            try:
                for who, key, signal, head in told["index"]:
                    places[who, key] = file, int(signal), head and str(head)
                temperature = float(told["temperature"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{path} is no spool of opdkit ({error}); restore it from a copy") from None
        return _Step(number, load_rows(self.folder.rows(number)), temperature, places)

    def _head(self, digest: str) -> Head:
        if digest not in self._heads:
            path = head_file(self.folder.path / "spool", digest)
            file, told = _open(path)
            try:
                arrays = {name: file.get_tensor(name).to(self._device) for name in file.keys()}  # noqa: SIM118
                self._heads[digest] = Head(
                    **arrays,
                    num_tokens=told["num_tokens"],
                    logit_scale=told["logit_scale"],
                    softcap=told["softcap"],
                )
            except (KeyError, TypeError, ValueError, SafetensorError) as error:
                raise UserError(f"{path} is no head of a spool ({error}); restore it from a copy") from None
        return self._heads[digest]


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The file, its arrays not read yet, and what its metadata tells. Raises UserError for one that is damaged."""
    try:
        file = safe_open(path, framework="pt")
        told = json.loads((file.metadata() or {}).get("opdkit", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}); restore it from a copy"
        ) from None
    if not isinstance(told, dict):
        raise UserError(f"{path} is no spool of opdkit; restore it from a copy")
    return file, told
