"""Models of other paths that teach: each is loaded once, when it is first asked; what it reads is known before.

Student and teachers say and hear only the token ids that mean the same to all. Which those are is known from the
tokenizers and configs alone, so a teacher whose first row comes late changes no earlier step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from opdkit.contexts.render import Renderer
from opdkit.engines.load import load_num_rows, pick_device
from opdkit.engines.memory import enough_memory
from opdkit.engines.model import LanguageModel
from opdkit.engines.tokens.stops import Stops, find_stops
from opdkit.engines.tokens.vocabulary import common_ids, num_tokens
from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks
from opdkit.ranks.group import Group
from opdkit.recipe import Recipe, TeacherSection
from opdkit.training.models.side import read_words

Readable = tuple[str, Renderer, int]  # a model's name, how it reads, and how many ids it can read


class OtherModel:
    """The model that a section names. Call it to have it loaded."""

    def __init__(self, recipe: Recipe, section: TeacherSection, student: LanguageModel, ranks: Ranks = ALONE) -> None:
        assert section.path is not None
        self._ranks, self._num_parts = ranks, recipe.parallel.hsdp
        self.path, self._section = section.path, section
        self._dtype = getattr(torch, section.dtype or recipe.model.dtype)
        self.home = self._device = student.device
        self._attention = recipe.model.attn_implementation
        if section.device is not None:
            self._device = pick_device(section.device, "teacher.device")
        self._passes = recipe.train.passes(self._device.type, learning=False)
        self._words = read_words(self.path, section.trust_remote_code, section.chat_template)
        self._limit: tuple[int, list[int]] | None = None
        self.loaded: LanguageModel | None = None
        self.max_positions: int | None = None  # this and warnings: once it was loaded
        self.warnings: list[str] = []
        self.was_loaded = self._is_at_work = False
        self.reads_students_ids = section.tokens == "same"

    @staticmethod
    def key(section: TeacherSection) -> tuple[Any, ...]:
        """Sections of one key are one model."""
        kept = section.device, section.quantization, section.placement
        return section.path, section.dtype, section.chat_template, section.trust_remote_code, section.tokens, *kept

    def __call__(self) -> LanguageModel:
        """Raises UserError for one that cannot be loaded, or is not what its config says."""
        if self.loaded is None:
            model = self._load()
            model.passes = self._passes
            if self._limit is not None:
                _limit(model, *self._limit)
            self.loaded = model
            self.max_positions, self.warnings, self.was_loaded = model.max_positions, list(model.warnings), True
        return self.loaded

    def _load(self) -> LanguageModel:
        in_parts = self._section.placement == "sharded" and isinstance(self._ranks, Group)

        def load() -> LanguageModel:
            model = LanguageModel.load(
                self.path,
                dtype=self._dtype,
                device="cpu" if in_parts else self._device,
                trust_remote_code=self._section.trust_remote_code,
                chat_template=self._section.chat_template,
                attn_implementation=self._attention,
                quantization=self._section.quantization,
            )
            model.module.requires_grad_(False)
            return model

        if isinstance(self._ranks, Group) and in_parts:
            from opdkit.engines.load_in_parts import load_in_parts

            return load_in_parts(load, self._ranks, device=self._device, num_parts=self._num_parts)
        return load()

    @property
    def moves(self) -> bool:
        """Whether it is not always where it works."""
        return self._section.placement in ("cpu", "reload")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the block it is loaded, and on the student's device; behind it, where `placement` says."""
        model = self()
        if not self.moves or self._is_at_work:
            yield
            return
        self._is_at_work = True
        try:
            if self._section.placement == "cpu":
                with enough_memory("moving the teacher to the device", "use a smaller teacher, or a quantised one"):
                    model.module.to(self._device)
                if self._limit is not None:
                    _limit(model, *self._limit)
            yield
        finally:
            self._is_at_work = False
            if self._section.placement == "cpu":
                model.module.to("cpu")
            else:
                self.loaded = None

    @property
    def stops(self) -> Stops:
        return find_stops(self._words.bare, self._words.generation_config, name=self.path)

    def renderer(self, **how: Any) -> Renderer:
        """As `LanguageModel.renderer`."""
        return self._words.renderer(self.stops, how)

    def readable(self) -> Readable:
        if self.loaded is not None:
            return self.path, self.loaded.renderer(), self.loaded.num_readable
        rows = load_num_rows(self.path, self._section.trust_remote_code)
        known = num_tokens(self._words.tokenizer)
        return self.path, self.renderer(), known if rows is None else min(rows, known)

    def limit_to(self, end: int, absent: list[int]) -> None:
        """See `LanguageModel.limit_to`."""
        self._limit = (end, absent)
        if self.loaded is not None:
            _limit(self.loaded, end, absent)


def common_limit(student: LanguageModel, others: Iterable[Readable]) -> tuple[int, list[int]]:
    """(one more than the largest id that means the same to all, the ids below it that do not). Raises UserError if
    those that do are too few."""
    end = student.num_readable
    absent: set[int] = set()
    for name, renderer, readable in others:
        end = min(end, readable)  # of one tokenizer, Gemma 3 4B has a row more than 1B
        common = common_ids(student.renderer(), renderer, names=(student.name, name))
        if common is not None:
            end, absent = min(end, common.end), absent | {*common.absent}
    return end, sorted(token for token in absent if token < end)


def limit_to_common(student: LanguageModel, *teachers: LanguageModel) -> None:
    """From now on all say and hear only the ids that mean the same to all. Raises UserError if those are too few."""
    end, absent = common_limit(student, [(model.name, model.renderer(), model.num_readable) for model in teachers])
    for model in (student, *teachers):
        model.limit_to(end, absent)


def _limit(model: LanguageModel, end: int, absent: Sequence[int]) -> None:
    if model.num_readable < end:
        raise UserError(
            f"teacher.path = {model.name}: it has {model.num_readable} rows, fewer than the {end} ids that its config "
            "and tokenizer speak of; repair its config.json, or choose another teacher"
        )
    model.limit_to(end, absent)
