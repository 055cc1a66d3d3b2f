"""A teacher with another tokenizer: it reads the text of the student's answer, and is heard where the two meet.

How an answer's tokens of both sides find each other is `engines/tokens/aligned.py`. Here the teacher's word on its own
tokens becomes a word on the student's: of tokens that are one on both sides as it stands, of a span as the sum of its
tokens. Of all others nothing is said, and no loss counts them.

Letters: T tokens of the student's answer, K likeliest ids, W ids of the student's vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.contexts import Context, build_views
from opdkit.contexts.render import Renderer
from opdkit.engines.base import Progress
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.tokens.aligned import Reading, align
from opdkit.losses import Head
from opdkit.recipe import TeacherSection
from opdkit.training.models.other_models import OtherModel
from opdkit.training.models.teacher import ModelTeacher
from opdkit.types import Asked, Group, Message, Signal, Spans, SpanSpread, View

_DIGITS = frozenset(b"0123456789")


@dataclass(frozen=True)
class StudentsWords:
    """How an aligned teacher is shown what it reads: in its own template, answers of the student as those were read."""

    teacher: Renderer
    student: Renderer

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self.teacher.prompt_ids(messages)

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> StudentsWords:
        return replace(self, teacher=self.teacher.with_tools(tools))

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        return self.teacher.cut(text, max_tokens)

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        return self.student.answer_text(answer_ids)

    def torn(self, text: str) -> str:
        return self.teacher.torn(text)


class AlignedTeacher(ModelTeacher):
    """Another model with `tokens = "align"`. It samples in its own tokens, as any teacher does."""

    spread: SpanSpread

    def __init__(
        self,
        model: OtherModel,
        renderer: Renderer,
        student: LanguageModel,
        section: TeacherSection,
        max_tokens: int | None,
    ) -> None:
        super().__init__(model, renderer, max_tokens_per_batch=max_tokens)
        self._student, self.spread = student, section.span
        self.alignment = align(
            (student.renderer(), student.end_id, student.name),
            (renderer, model.stops.end, model.path),
            pair_stops=section.pair_stops,
        )
        self._reader = StudentsWords(renderer, student.renderer())

    def views(
        self, groups: Sequence[Group], context: Context, identity: tuple[int | str, ...], number: int, name: str
    ) -> list[View | None]:
        return build_views(groups, context, self._reader, identity, number)

    def engine(self) -> HFEngine:
        return HFEngine(self.model, max_tokens_per_batch=self._max_tokens, reader_ids_W=self._reader_ids_W)

    def head(self) -> Head:
        return replace(super().head(), reader_ids_W=self._reader_ids_W)

    def fits(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> bool:
        """Of an answer that does not fit whole, its beginning is read."""
        room = self.model.max_positions
        return room is None or len(context_ids) < room

    @cached_property
    def _reader_ids_W(self) -> Tensor:
        """Asked for when all models are loaded: only then it is known how many ids the student says."""
        known, num_tokens = self.alignment.teacher_id, self.model.num_tokens
        ids = [known.get(token, -1) for token in range(self._student.num_tokens)]
        ids = [-1 if token >= num_tokens else token for token in ids]
        ids_W = torch.tensor(ids, dtype=torch.long)
        if (absent := self._student.head().absent_ids) is not None:
            ids_W[absent.cpu()] = -1
        return ids_W.to(self.model.device)

    def score(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        asked: Asked,
        *,
        temperature: float,
        progress: Progress | None = None,
        states_of: Collection[int] = (),
    ) -> list[Signal]:
        readings = [self._read(context, answer) for context, answer in zip(contexts, answers, strict=True)]
        said = super().score(
            contexts,
            [r.teacher_ids for r in readings],
            asked,
            temperature=temperature,
            progress=progress,
            states_of=states_of,
        )
        return [
            self._of_student(answer, reading, signal, asked)
            for answer, reading, signal in zip(answers, readings, said, strict=True)
        ]

    def spans_of(self, context_ids: Sequence[int], answer_ids: Sequence[int], asked: Asked) -> Spans:
        return self._spans(answer_ids, self._read(context_ids, answer_ids), asked)

    def _read(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> Reading:
        room = self.model.max_positions
        return self.alignment.read(answer_ids, None if room is None else room - len(context_ids))

    def _of_student(self, answer: Sequence[int], reading: Reading, said: Signal, asked: Asked) -> Signal:
        spans = self._spans(answer, reading, asked)
        own_T, theirs_T = np.flatnonzero(spans.is_single_T & spans.said_T), _places(reading, len(answer))
        theirs_T = theirs_T[own_T]
        columns: dict[str, Any] = {"spans": spans, "head": said.head}
        for name in ("sampled_logprob_T", "entropy_T", "topk_ids_TK", "topk_logprob_TK"):
            if (array := getattr(said, name)) is not None:
                unknown = 0 if array.dtype == np.int64 else np.nan
                columns[name] = np.full((len(answer), *array.shape[1:]), unknown, dtype=array.dtype)
                columns[name][own_T] = array[theirs_T]
        if said.hidden_TH is not None:
            hidden_TH = said.hidden_TH.new_zeros(len(answer), said.hidden_TH.shape[1])
            hidden_TH[torch.from_numpy(own_T)] = said.hidden_TH[torch.from_numpy(theirs_T)]
            columns["hidden_TH"] = hidden_TH
        if asked.answer == "sampled" and self.spread != "exact":
            assert said.sampled_logprob_T is not None
            for span in reading.spans:
                if span.sizes != (1, 1):
                    whole = said.sampled_logprob_T[slice(*span.teacher)].sum(dtype=np.float64)
                    columns["sampled_logprob_T"][slice(*span.student)] = whole / span.sizes[0]
        return Signal(**columns)

    def _spans(self, answer: Sequence[int], reading: Reading, asked: Asked) -> Spans:
        index_T, is_single_T = np.full(len(answer), -1, dtype=np.int64), np.zeros(len(answer), dtype=np.bool_)
        for number, span in enumerate(reading.spans):
            index_T[slice(*span.student)] = number
            is_single_T[span.student[0]] = span.sizes == (1, 1)
        said_T = is_single_T if self.spread == "exact" or asked.answer != "sampled" else index_T >= 0
        if asked.answer != "sampled":  # lists are of ids: a single token that is no candidate has no number there
            known, theirs_T = self._reader_ids_W.tolist(), _places(reading, len(answer))
            listed = [
                place
                for place in np.flatnonzero(is_single_T).tolist()
                if known[answer[place]] == reading.teacher_ids[theirs_T[place]]
            ]
            said_T = np.zeros(len(answer), dtype=np.bool_)
            said_T[listed] = True
        seen = self.alignment.student.bytes_V
        digits = [not _DIGITS.isdisjoint(seen[token] or b"") for token in answer]
        return Spans(
            index_T=index_T,
            is_single_T=is_single_T,
            said_T=said_T,
            has_digit_T=np.array(digits, dtype=np.bool_),
            spread=self.spread,
        )


def _places(reading: Reading, length: int) -> np.ndarray:
    """[T] where the teacher's first token of each token's span stands; 0 outside spans."""
    theirs_T = np.zeros(length, dtype=np.int64)
    for span in reading.spans:
        theirs_T[slice(*span.student)] = span.teacher[0]
    return theirs_T
