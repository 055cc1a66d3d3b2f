"""What is known of the tokens of one answer, as elements with a colour and a note.

Letters: T tokens of the answer, S terms of the loss, K entries of the teacher's top-k list.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from opdkit.reporting.html.answer_style import LEVELS
from opdkit.reporting.html.markup import Html, tag
from opdkit.reporting.html.numbers import compact
from opdkit.types import AUTHORS, Example

Decode = Callable[[Sequence[int]], str]

NUM_TEACHER_TOKENS = 3  # of its top-k list, in a note
MAX_PENDING = 4  # tokens that may wait for the rest of a character; UTF-8 has at most four bytes
WRITERS: Mapping[str, str] = {"student": "the student", "teacher": "the teacher", "data": "the data set",
                              "tool": "the environment"}  # fmt: skip


def loss_parts(row: Example) -> npt.NDArray[np.float64] | None:
    """[T] what each token adds to the step's loss: sum over terms of coefficient times token loss. None: not taught."""
    if row.taught is None:
        return None
    counted_ST = row.taught.coef_ST != 0
    with np.errstate(invalid="ignore"):
        return np.where(counted_ST, row.taught.coef_ST.astype(np.float64) * row.taught.loss_ST, 0.0).sum(0)


def token_texts(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """What each token adds to the text. "" for a token whose character a later token finishes: the text is there."""
    if decode is None:
        return [f"{token} " for token in ids]
    texts: list[str] = []
    before, done = 0, 0  # a tokenizer may join a token to the one before it, so that one is decoded with it
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        if text.endswith("\ufffd") and end - done < MAX_PENDING and end < len(ids):
            continue
        texts += [""] * (end - done - 1) + [text[len(decode(ids[before:done])) :]]
        before, done = done, end
    return texts


class Tokens:
    """The first `num` tokens of an answer. scale: the |part| of the loss that has the deepest colour."""

    def __init__(self, row: Example, scale: float, decode: Decode | None, num: int) -> None:
        self.row, self._decode, self._scale = row, decode, scale
        self.texts = token_texts(row.rollout.answer_ids[:num], decode)
        taught = row.taught
        parts_T = loss_parts(row)
        self.part = [0.0] * num if parts_T is None else np.nan_to_num(np.abs(parts_T[:num])).tolist()
        self.whole = 0.0 if parts_T is None else float(np.nansum(np.abs(parts_T)))
        self._masked = (~row.rollout.answer_mask[:num]).tolist()
        self._author = row.rollout.authors[:num].tolist()
        self._counted = None if taught is None else (taught.coef_ST[:, :num] != 0).any(0).tolist()
        self._clipped = None if taught is None else taught.clipped_T[:num].tolist()
        self._terms = (
            ()
            if taught is None
            else tuple(
                zip(taught.terms, taught.coef_ST[:, :num].tolist(), taught.loss_ST[:, :num].tolist(), strict=True)
            )
        )
        student_T = taught.student_logprob_T if taught else row.rollout.answer_logprobs
        said = {"student": student_T, **{name: signal.sampled_logprob_T for name, signal in row.signals.items()}}
        self._said = {name: logprob_T[:num].tolist() for name, logprob_T in said.items() if logprob_T is not None}

    def element(self, index: int, *, stop: bool = False) -> Html:
        """The token. The page's script lets it take focus by a tap or an arrow key; stop: by the tab key too."""
        classes = [*filter(None, [self.heat(index)]), *self.kinds(index)]
        text = self.texts[index]
        return tag(
            "i",
            text.replace("\n", "⏎\n") if text else "·",  # a line break is shown, so that it can be pointed at
            tabindex=0 if stop else None,
            data_t="\n".join(self._note(index)),
            class_=" ".join(classes) or None,
        )

    def kinds(self, index: int) -> list[str]:
        """m: not learned from; o: written by the model, and left out of the loss; x: clipped."""
        if self._masked[index]:
            return ["m"]
        if self._counted is None or self._clipped is None:
            return []
        return ["o"] if not self._counted[index] else ["x"] if self._clipped[index] else []

    def heat(self, index: int) -> str | None:
        """u: the teacher finds the token likelier than the student; d: less likely; n: one of them is not known."""
        part = self.part[index]
        if not part or not self._scale:
            return None
        return f"{self.side(index)}{min(LEVELS, math.ceil(LEVELS * part / self._scale))}"

    def side(self, index: int) -> str:
        student, teacher = self._logprob("student", index), self._logprob("teacher", index)
        return "n" if student is None or teacher is None else "u" if teacher >= student else "d"

    def _logprob(self, whose: str, index: int) -> float | None:
        value = self._said[whose][index] if whose in self._said else None
        return None if value is None or math.isnan(value) else float(value)

    def _note(self, index: int) -> Iterator[str]:
        yield f"{_quoted(self.texts[index])} token {index + 1:,} of {len(self.row.rollout.answer_ids):,}"
        logprobs = {name: self._logprob(name, index) for name in self._said}
        if said := [f"{name} {_percent(value)}" for name, value in logprobs.items() if value is not None]:
            yield " · ".join(said)
        yield from self._teachers_own(index)
        yield from self._loss(index)

    def _teachers_own(self, index: int) -> Iterator[str]:
        """What the teacher would have written, where its list was asked for; of a token of which a teacher with another
        tokenizer says nothing, nothing."""
        signal = self.row.signal
        if signal is None or signal.topk_ids_TK is None or signal.topk_logprob_TK is None:
            return
        ids, logprobs = signal.topk_ids_TK[index].tolist(), signal.topk_logprob_TK[index].tolist()
        known = [(logprob, token) for token, logprob in zip(ids, logprobs, strict=True) if not math.isnan(logprob)]
        words = [
            f"{_quoted(self._decode([token]) if self._decode else str(token))} {_percent(logprob)}"
            for logprob, token in heapq.nlargest(NUM_TEACHER_TOKENS, known, key=lambda pair: pair[0])
        ]
        if words:
            yield "teacher's first: " + ", ".join(words)

    def _loss(self, index: int) -> Iterator[str]:
        kinds = self.kinds(index)
        writer = AUTHORS[self._author[index]] if self._author[index] < len(AUTHORS) else "tool"
        if "m" in kinds:
            by = "" if writer == "student" else f"written by {WRITERS[writer]}: "
            yield f"{by}not learned from" if by else "masked: not learned from"
            return
        if writer != "student":
            yield f"written by {WRITERS[writer]}"
        if self.row.taught is None:
            yield "the loss did not read this answer"
        elif "o" in kinds:
            yield "left out: coefficient 0"
        else:
            for name, coef, loss in self._terms:
                if coef[index]:
                    yield f"{name} {compact(loss[index])} · coefficient {compact(coef[index])}"
            share = f"{100 * self.part[index] / self.whole:.1f} % of this answer's loss" if self.whole else "no loss"
            yield share + (" · clipped" if "x" in kinds else "")


def _percent(logprob: float) -> str:
    percent = 100 * math.exp(min(0.0, logprob))
    return f"{percent:.1f} %" if percent >= 0.1 else f"{compact(percent)} %"


def _quoted(text: str) -> str:
    return f"“{text.replace(chr(10), '⏎')}”"
