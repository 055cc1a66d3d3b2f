"""One answer, token by token: how much of the loss each token carried, and what student and teacher thought of it.

No script: a token's note is an attribute that the style sheet shows while the token is hovered over or tapped.

Letters: T tokens of the answer, S terms of the loss, K entries of the teacher's top-k list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from opdkit.reporting.html.answer_style import LEVELS
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import compact, shortened
from opdkit.types import Example

Decode = Callable[[Sequence[int]], str]

NUM_COLOURED = 1_500  # tokens of an answer; the rest is plain text, so that a page stays light
SCALE_QUANTILE = 0.99  # the share of a step's tokens that are below the deepest colour
NUM_TEACHER_TOKENS = 3  # of its top-k list, in a note
MAX_PENDING = 4  # tokens that may wait for the rest of a character; UTF-8 has at most four bytes


def heat_map(row: Example, scale: float, decode: Decode | None) -> Html:
    """The answer's tokens as elements. scale: what `signal_scale` gave for the step."""
    tokens = _Tokens(row, scale)
    texts = token_texts(row.rollout.answer_ids[:NUM_COLOURED], decode)
    shown = [tag("i", _visible(text), **tokens.marks(index, text, decode)) for index, text in enumerate(texts)]
    rest = row.rollout.answer_ids[NUM_COLOURED:]
    if rest:
        shown.append(join(shortened(decode(rest) if decode else " ".join(map(str, rest)))))
    return tag("pre", *shown, class_="answer heat")


def signal_scale(rows: Sequence[Example]) -> float:
    """|coefficient * loss| of a token that has the deepest colour: nearly the largest of the step; 0: there is none."""
    sizes = [np.abs(parts_T[parts_T != 0]) for row in rows if (parts_T := loss_parts(row)) is not None]
    known = np.concatenate([np.zeros(0), *sizes])
    return float(np.quantile(known, SCALE_QUANTILE)) if len(known) else 0.0


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


def legend(rows: Sequence[Example]) -> Html:
    """What the colours mean, with only the kinds that occur."""
    if not any(row.taught for row in rows):
        return tag("p", "Tokens have no colours: the rows do not say what each was taught.", class_="quiet small")
    seen = [_Tokens(row, 1.0) for row in rows]
    parts = ["Colour: the token's part of the step's loss, |coefficient * token loss|. "]
    if any(each.knows_both for each in seen):
        parts += [_sample(f"u{LEVELS}", "the teacher found it likelier than the student did"),
                  _sample(f"d{LEVELS}", "less likely")]  # fmt: skip
    else:
        parts.append(_sample(f"n{LEVELS}", "a large part"))
    kinds = {"x": "clipped", "o": "left out by the weights or the method", "m": "not written by the model"}
    occur = {name: any(name in each.kinds(index) for each in seen for index in range(each.length)) for name in kinds}
    parts += [_sample(name, words) for name, words in kinds.items() if occur[name]]
    return tag("p", *parts, "Hover over a token or tap it for its numbers.", class_="legend quiet small")


def _sample(class_: str, words: str) -> Html:
    return tag("span", tag("i", "token", class_=class_), f" {words}")


def _visible(text: str) -> str:
    """A line break is shown, so that it can be pointed at."""
    return text.replace("\n", "⏎\n") if text else "·"


class _Tokens:
    """What is known of the tokens of one answer."""

    def __init__(self, row: Example, scale: float) -> None:
        self.row, self.scale = row, scale
        taught, signal = self.row.taught, self.row.signal
        self._student_T = taught.student_logprob_T if taught else self.row.rollout.answer_logprobs
        self._teacher_T = signal.sampled_logprob_T if signal else None
        self._part_T = loss_parts(self.row)

    @property
    def length(self) -> int:
        return len(self.row.rollout.answer_ids)

    @property
    def knows_both(self) -> bool:
        return self._student_T is not None and self._teacher_T is not None

    def marks(self, index: int, text: str, decode: Decode | None) -> dict[str, str | int]:
        """Attributes of the token's element. It takes focus, which is what a tap gives; not from the tab key."""
        classes = [*filter(None, [self._heat(index)]), *self.kinds(index)]
        note = "\n".join(self._note(index, text, decode))
        return {"tabindex": -1, "data_t": note, **({"class_": " ".join(classes)} if classes else {})}

    def kinds(self, index: int) -> list[str]:
        """m: not written by the model; o: written, and left out of the loss; x: clipped."""
        if not self.row.rollout.answer_mask[index]:
            return ["m"]
        if self.row.taught is None:
            return []
        if not self.row.taught.coef_ST[:, index].any():
            return ["o"]
        return ["x"] if self.row.taught.clipped_T[index] else []

    def _heat(self, index: int) -> str | None:
        """u: the teacher finds the token likelier than the student; d: less likely; n: one of them is not known."""
        part = 0.0 if self._part_T is None else abs(float(self._part_T[index]))
        if not part or not self.scale:
            return None
        level = min(LEVELS, math.ceil(LEVELS * part / self.scale))
        student, teacher = _known(self._student_T, index), _known(self._teacher_T, index)
        if student is None or teacher is None:
            return f"n{level}"
        return f"{'u' if teacher >= student else 'd'}{level}"

    def _note(self, index: int, text: str, decode: Decode | None) -> Iterator[str]:
        yield f"{_quoted(text)}  token {index + 1} of {self.length}"
        student, teacher = _known(self._student_T, index), _known(self._teacher_T, index)
        said = [f"{who} {_percent(logprob)}" for who, logprob in (("student", student), ("teacher", teacher))
                if logprob is not None]  # fmt: skip
        if said:
            yield " · ".join(said)
        yield from self._teachers_own(index, decode)
        yield from self._loss(index)

    def _teachers_own(self, index: int, decode: Decode | None) -> Iterator[str]:
        """What the teacher would have written, where its list was asked for; of a token of which a teacher with another
        tokenizer says nothing, nothing."""
        signal = self.row.signal
        if signal is None or signal.topk_ids_TK is None or signal.topk_logprob_TK is None:
            return
        order = np.argsort(-signal.topk_logprob_TK[index], kind="stable")[:NUM_TEACHER_TOKENS]
        pairs = [(int(signal.topk_ids_TK[index, k]), float(signal.topk_logprob_TK[index, k])) for k in order]
        words = [
            f"{_quoted(decode([token]) if decode else str(token))} {_percent(logprob)}"
            for token, logprob in pairs
            if not math.isnan(logprob)
        ]
        if words:
            yield "teacher's first: " + ", ".join(words)

    def _loss(self, index: int) -> Iterator[str]:
        taught, kinds = self.row.taught, self.kinds(index)
        if "m" in kinds:
            yield "not written by the model: never counted"
        elif taught is None:
            yield "the loss did not read this answer"
        elif "o" in kinds:
            yield "left out: coefficient 0"
        else:
            assert self._part_T is not None
            for name, coef_T, loss_T in zip(taught.terms, taught.coef_ST, taught.loss_ST, strict=True):
                if coef_T[index]:
                    yield f"{name} {compact(float(loss_T[index]))} · coefficient {compact(float(coef_T[index]))}"
            whole = float(np.abs(self._part_T).sum())
            share = (
                f"{100 * abs(float(self._part_T[index])) / whole:.1f} % of this answer's loss" if whole else "no loss"
            )
            yield share + (" · clipped" if "x" in kinds else "")


def _known(logprob_T: npt.NDArray[np.float32] | None, index: int) -> float | None:
    value = None if logprob_T is None else float(logprob_T[index])
    return None if value is None or math.isnan(value) else value


def _percent(logprob: float) -> str:
    percent = 100 * math.exp(logprob)
    return f"{percent:.1f} %" if percent >= 0.1 else f"{compact(percent)} %"


def _quoted(text: str) -> str:
    return f"“{text.replace(chr(10), '⏎')}”"
