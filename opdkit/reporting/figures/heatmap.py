"""One answer, token by token: how much of the loss each token carried, and what its readers thought of it.

A long answer is shown sentence by sentence, each with its share of the loss, below a map of them all; a sentence opens
to its tokens. An episode is shown turn by turn, and what the environment wrote differs from what the model did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opdkit.reporting.figures.tokens import WRITERS, Decode, Tokens, loss_parts
from opdkit.reporting.html.answer_style import LEVELS
from opdkit.reporting.html.markup import Html, join, tag
from opdkit.reporting.html.numbers import compact, shortened
from opdkit.types import AUTHORS, Example

NUM_COLOURED = 6_000  # tokens of an answer; the rest is plain text, so that a page stays light
LONG = 400  # tokens; answers of more are shown by sentence
FEWEST, MOST = 8, 80  # tokens of a sentence: shorter ones are joined to the next, longer ones cut
MAX_STRETCHES = 100  # turns and changes of the writer; an answer of more is shown as one
SCALE_QUANTILE = 0.99  # the share of a step's tokens that are below the deepest colour
SENTENCE_QUANTILE = 0.95  # the same of an answer's sentences
MAP_HEIGHT = 34  # pixels
_ENDS = (".", "!", "?", "。", "！", "？", ":")  # noqa: RUF001


def heat_map(row: Example, scale: float, decode: Decode | None, anchor: str = "a", most: int = NUM_COLOURED) -> Html:
    """The answer's tokens as elements. scale: what `signal_scale` gave for the step. anchor: its name on the page, of
    letters and digits. most: tokens that get a colour."""
    ids = row.rollout.answer_ids
    most = min(most, NUM_COLOURED, len(ids))
    tokens = Tokens(row, scale, decode, most)
    by_sentence = _sentences(tokens, anchor) if len(ids) > LONG else None
    shown: list[Html] = []
    for stretch in _stretches(row, most):
        inside = (
            [tokens.element(index, stop=not index) for index in range(stretch.start, stretch.end)]
            if by_sentence is None
            else [one.element(tokens) for one in by_sentence if stretch.start <= one.start < stretch.end]
        )
        shown.append(_turn(row, stretch, inside) if stretch.words else join(*inside))
    if most < len(ids):
        rest = shortened(decode(ids[most:]) if decode else " ".join(map(str, ids[most:])))
        shown.append(tag("span", rest, class_="quiet"))
    overview = _minimap(by_sentence, most) if by_sentence else None
    return tag("div", overview, tag("div", *shown, class_="answer"), class_="heat")


def signal_scale(rows: Sequence[Example]) -> float:
    """|coefficient * loss| of a token that has the deepest colour: nearly the largest of the step; 0: there is none."""
    sizes = [np.abs(parts_T[parts_T != 0]) for row in rows if (parts_T := loss_parts(row)) is not None]
    known = np.concatenate([np.zeros(0), *sizes])
    known = known[np.isfinite(known)]
    return float(np.quantile(known, SCALE_QUANTILE)) if len(known) else 0.0


def legend(rows: Sequence[Example]) -> Html:
    """What the colours mean, with only the kinds that occur."""
    if not any(row.taught for row in rows):
        return tag("p", "Tokens have no colours: the rows do not say what each was taught.", class_="quiet small")
    parts = ["Colour: the token's part of the step's loss, |coefficient * token loss|. "]
    if any(row.signal is not None and row.signal.sampled_logprob_T is not None for row in rows):
        parts += [_sample(f"u{LEVELS}", "the teacher found it likelier than the student did"),
                  _sample(f"d{LEVELS}", "less likely")]  # fmt: skip
    else:
        parts.append(_sample(f"n{LEVELS}", "a large part"))
    kinds = {"x": "clipped", "o": "left out by the weights or the method", "m": "not learned from"}
    parts += [_sample(name, words) for name, words in kinds.items() if any(_has(row, name) for row in rows)]
    if any(len(row.rollout.answer_ids) > LONG for row in rows):
        parts.append("Long answers are shown by sentence, with its share of the answer's loss; a sentence opens. ")
    keys = "Hover over a token, tap it, or go to it with Tab and the arrow keys (Page Down: the next deep colour)."
    return tag("p", *parts, keys, class_="legend quiet small")


def _has(row: Example, kind: str) -> bool:
    mask_T, taught = row.rollout.answer_mask, row.taught
    if kind == "m" or taught is None:
        return kind == "m" and not mask_T.all()
    counted_T = (taught.coef_ST != 0).any(0)
    return bool((mask_T & counted_T & taught.clipped_T).any() if kind == "x" else (mask_T & ~counted_T).any())


def _sample(class_: str, words: str) -> Html:
    return tag("span", tag("i", "token", class_=class_), f" {words}")


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring tokens of one turn and one writer. words: above them; None: the answer has no turns."""

    start: int
    end: int
    author: int = 0
    turn: int = 0
    words: str | None = None


def _stretches(row: Example, num: int) -> list[_Stretch]:
    turn_T, author_T = row.rollout.turn_numbers, row.rollout.authors
    ends = (np.flatnonzero((np.diff(turn_T) != 0) | (np.diff(author_T) != 0)) + 1).tolist()
    if not ends or len(ends) > MAX_STRETCHES:
        return [_Stretch(0, num)]
    found = []
    for start, end in zip([0, *ends], [*ends, len(turn_T)], strict=True):
        author, turn = int(author_T[start]), int(turn_T[start])
        learned = int(row.rollout.answer_mask[start:end].sum())
        found.append(_Stretch(start, min(end, num), author, turn, _words(row, author, turn, end - start, learned)))
    return [stretch for stretch in found if stretch.start < num]


def _words(row: Example, author: int, turn: int, num_tokens: int, learned: int) -> str:
    who = WRITERS[AUTHORS[author]] if author < len(AUTHORS) else WRITERS["tool"]
    said = [f"turn {turn + 1}", f"{who}, {num_tokens:,} token{'' if num_tokens == 1 else 's'}"]
    if not learned:
        said.append("not learned from")
    elif learned < num_tokens:
        said.append(f"{num_tokens - learned:,} of them not learned from")
    place = turn - int(row.rollout.turn_numbers.min())  # the later rows of an episode begin with a later turn
    if place < len(row.rollout.turns):
        record = row.rollout.turns[place]
        if AUTHORS[author : author + 1] == ("tool",):
            said += [f"{record.cut_tokens:,} cut out of its middle"] if record.cut_tokens else []
        else:
            said += [f"{record.num_calls:,} call{'' if record.num_calls == 1 else 's'}"] if record.num_calls else []
            said += [] if record.failure is None else [record.failure.replace("_", " ")]
            said += [] if record.reward is None else [f"reward {compact(record.reward)}"]
    return " · ".join(said)


def _turn(row: Example, stretch: _Stretch, inside: Sequence[Html]) -> Html:
    words = tag("p", stretch.words, class_="role")
    return tag("div", words, tag("div", *inside), class_=f"turn t{min(stretch.author, len(AUTHORS) - 1)}")


@dataclass(frozen=True, slots=True)
class _Sentence:
    name: str
    start: int
    end: int
    share: float  # of the answer's loss
    depth: float  # mean part of a token, 1: that of the answer's deepest sentences
    side: str  # u, d or n, as most of its loss; "": no loss
    masked: bool

    def element(self, tokens: Tokens) -> Html:
        text = "".join(tokens.texts[self.start : self.end])
        level = f"{self.side}{max(1, math.ceil(LEVELS * self.depth))}" if self.side else None
        share = None if self.masked or not tokens.whole else f"{100 * self.share:.1f} %"
        inside = [tokens.element(index, stop=index == self.start) for index in range(self.start, self.end)]
        row = tag("summary", tag("b", share), tag("span", text.rstrip("\n"), class_="m" if self.masked else None),
                  class_=level)  # fmt: skip
        return tag("details", row, tag("div", *inside), id=self.name)


def _sentences(tokens: Tokens, anchor: str) -> list[_Sentence]:
    changes = {stretch.start for stretch in _stretches(tokens.row, len(tokens.texts))}
    ends = list(_ends(tokens.texts, changes))
    sums, sides, masked = [], [], []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        by_side = {side: 0.0 for side in "udn"}
        for index in range(start, end):
            by_side[tokens.side(index)] += tokens.part[index]
        sums.append(sum(by_side.values()))
        sides.append(max(by_side, key=lambda side: by_side[side]) if sums[-1] else "")
        masked.append(all("m" in tokens.kinds(index) for index in range(start, end)))
    means = [total / (end - start) for total, start, end in zip(sums, [0, *ends[:-1]], ends, strict=True)]
    deepest = float(np.quantile(means, SENTENCE_QUANTILE)) or max(means) or 1.0
    return [
        _Sentence(f"{anchor}s{number}", start, ends[number], sums[number] / (tokens.whole or 1.0),
                  min(1.0, means[number] / deepest), sides[number], masked[number])
        for number, start in enumerate([0, *ends[:-1]])
    ]  # fmt: skip


def _ends(texts: Sequence[str], changes: set[int]) -> Iterator[int]:
    """Where sentences and lines end; also where the writer changes."""
    start = 0
    for end in range(1, len(texts) + 1):
        text, after = texts[end - 1], texts[end] if end < len(texts) else " "
        ended = "\n" in text or (text.rstrip().endswith(_ENDS) and after[:1].isspace())
        last = end == len(texts) or end in changes or end - start >= MOST
        if last or (ended and end - start >= FEWEST):
            yield end
            start = end


def _minimap(sentences: Sequence[_Sentence], num_tokens: int) -> Html:
    """A bar a sentence, as wide as its tokens and as high as their mean part of the loss; it leads to the sentence."""
    bars = []
    for one in sentences:
        width, height = one.end - one.start, max(1.0, MAP_HEIGHT * one.depth)
        place = {"x": one.start, "width": width}
        bar = tag("rect", **place, y=MAP_HEIGHT - height, height=height, class_=one.side or "masked")
        said = f"tokens {one.start + 1:,} to {one.end:,}"
        said += f": {100 * one.share:.1f} % of the loss" if one.side else ""
        whole = tag("rect", **place, y=0, height=MAP_HEIGHT, class_="hit")
        bars.append(tag("a", tag("title", said), bar, whole, href=f"#{one.name}", tabindex=-1))
    drawing = tag("svg", *bars, width="100%", height=MAP_HEIGHT, viewBox=f"0 0 {num_tokens} {MAP_HEIGHT}",
                  preserveAspectRatio="none", role="group", aria_label="the answer's sentences")  # fmt: skip
    return tag("div", drawing, class_="minimap")
