"""Saved answers and the two models that are to read them: a run's own, or any others.

A source is a run folder (its last saved rows, its last student, its teacher) or a Parquet file of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opdkit.contexts.render import read_kwargs
from opdkit.engines.load import pick_device
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.run.folder import RunFolder, teacher_reading_of
from opdkit.run.rows import load_rows
from opdkit.training.models.other_models import limit_to_common
from opdkit.training.saved import checkpoint
from opdkit.types import Example, View, seed_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Which answers of a source, and who reads them on what."""

    student: str | None = None  # None: the run's own
    teacher: str | None = None
    step: int | None = None  # whose rows; None: the last saved ones
    num_rows: int = 256
    seed: int = 0
    dtype: str | None = None  # None: the run's own, or bfloat16
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: choose float32 or bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Answers, and who is to read them how. Paths are None where nothing says whose they are."""

    name: str
    rows: Sequence[Example]
    rows_digest: str  # of the file they stand in
    student: str | None
    teacher: str | None
    no_teacher: str  # why, where `teacher` is None
    context: str | None  # None: no recipe says
    temperature: float
    dtype: str
    chat_template: str | None
    reading: Mapping[str, Any]  # how its teacher is asked, as `Renderer` takes it
    recipe: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Answers that both models can read, each with the teacher's view."""

    student: LanguageModel
    teacher: LanguageModel
    rows: Sequence[Example]
    num_left_out: int  # of the source's answers: no view, nothing counted, or longer than a model's positions

    def told(self) -> str:
        """How many answers are read and, where some cannot be, how many are left out and why."""
        why = "empty, without what the teacher reads, or longer than a model's positions"
        return f"{len(self.rows)} answers" + (f"; {self.num_left_out} left out: {why}" if self.num_left_out else "")


class Models:
    """Every model is loaded once."""

    def __init__(self, device: str, trust_remote_code: bool) -> None:
        self._device, self._trust_remote_code = device, trust_remote_code
        self._loaded: dict[tuple[str, str, str | None], LanguageModel] = {}

    def pair(self, source: Source, reading: Reading) -> Pair:
        """Both models of a source and some of its answers, drawn by the seed. Raises UserError where one is missing."""
        if source.student is None:
            raise UserError(f"{source.name}: say whose answers these are with --student")
        if source.teacher is None:
            raise UserError(f"{source.name}: {source.no_teacher}; name one with --teacher")
        student = self.load(source.student, source.dtype, None)
        teacher = self.load(source.teacher, source.dtype, source.chat_template)
        limit_to_common(student, teacher)
        rows = _readable(source, student, teacher)
        order = sorted(
            rows, key=lambda row: seed_from(reading.seed, "reading", row.rollout.policy_version, *row.rollout.key)
        )
        return Pair(
            student=student,
            teacher=teacher,
            rows=order[: reading.num_rows],
            num_left_out=len(source.rows) - len(rows),
        )

    def load(self, path: str, dtype: str, chat_template: str | None) -> LanguageModel:
        key = (path, dtype, chat_template)
        if key not in self._loaded:
            self._loaded[key] = LanguageModel.load(
                path,
                dtype=getattr(torch, dtype),
                device=pick_device(self._device),
                trust_remote_code=self._trust_remote_code,
                chat_template=chat_template,
            )
        return self._loaded[key]


def read_source(path: Path, name: str, reading: Reading) -> Source:
    if path.suffix == ".parquet":
        return Source(
            name=name,
            rows=load_rows(path),
            rows_digest=_digest(path),
            student=reading.student,
            teacher=reading.teacher,
            no_teacher="a file of rows does not say who their teacher is",
            context=None,
            temperature=1.0,
            dtype=reading.dtype or "bfloat16",
            chat_template=None,
            reading={},
            recipe=None,
        )
    if path.is_file():
        raise UserError(f"{path} is no source of answers: give a run folder or a .parquet file of rows")
    folder = RunFolder(path)
    recipe = folder.read_whole_recipe()
    steps = folder.row_steps()
    step = reading.step if reading.step is not None else max(steps, default=0)
    if step not in steps:
        have = f"rows of the steps {', '.join(map(str, steps))}" if steps else "no rows (train.save_rows_every)"
        raise UserError(f"{path} has no rows of step {step}: it has {have}")
    saved = checkpoint.latest(folder.checkpoints) if reading.student is None else None
    if saved and saved.damaged:
        newest, reason = next(iter(saved.damaged.items()))
        raise UserError(
            f"the checkpoint {newest} is damaged ({reason}); name a student, e.g. --student {saved.model_path}"
        )
    student = reading.student or (str(saved.model_path) if saved else recipe["model"]["path"])
    teacher, why = _teacher_of(recipe, student)
    section = recipe["teacher"]
    return Source(
        name=name,
        rows=load_rows(folder.rows(step)),
        rows_digest=_digest(folder.rows(step)),
        student=student,
        teacher=reading.teacher or teacher,
        no_teacher=why,
        context=recipe["context"]["kind"],
        temperature=recipe["method"]["loss_temperature"],
        dtype=reading.dtype or recipe["model"]["dtype"],
        chat_template=None if reading.teacher else section.get("chat_template"),
        reading={**teacher_reading_of(recipe), "now": folder.clock()},
        recipe=recipe,
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _teacher_of(recipe: Mapping[str, Any], student: str) -> tuple[str | None, str]:
    """The path of the run's teacher, or None and why there is none."""
    section = recipe["teacher"]
    if section.get("tokens") == "align":
        return None, 'its teacher has another tokenizer (tokens = "align"), and here token ids are compared'
    if section["kind"] in ("model", "server"):
        return section["path"], ""
    if section["kind"] == "saved":
        return None, f"its teacher spoke in {section.get('run')}"
    found = {"initial": recipe["model"]["path"], "adapter_off": recipe["model"]["path"], "live": student}
    weights = section.get("weights")
    if weights in found:
        return found[weights], ""
    return (
        None,
        f"its teacher ({section['kind']}, {weights}) is no model of its own" if weights else "it had no teacher",
    )


def _readable(source: Source, student: LanguageModel, teacher: LanguageModel) -> list[Example]:
    """A context's view is the saved one; without a context the teacher's own template is rendered."""
    reading = dict(source.reading)
    if "template_kwargs" in reading:  # another teacher than the run's may not read them all
        reading["template_kwargs"] = read_kwargs(teacher.renderer(), reading["template_kwargs"])
    renderer = teacher.renderer(**reading)
    saved = source.context not in (None, "none")
    rows = []
    for row in source.rows:
        view = row.view if saved else View(context_ids=renderer.asked_ids(row.problem, row.rollout.history))
        if view is None or not row.rollout.answer_mask.any():
            continue
        length = len(row.rollout.answer_ids)
        if _fits(student, len(row.rollout.prompt_ids) + length) and _fits(teacher, len(view.context_ids) + length):
            rows.append(replace(row, views={"teacher": view}))
    if not rows:
        raise UserError(f"{source.name}: none of its {len(source.rows)} answers can be read by both models")
    return rows


def _fits(model: LanguageModel, length: int) -> bool:
    return model.max_positions is None or length <= model.max_positions
