r"""The multiple-choice task: one option, by its letter or its text (SciKnowEval, GPQA).

    answer -> what is meant for the reader -> last <answer>..</answer> (or box, "Answer:" line, "the answer is")
           -> a letter, an option's text, or neither

The prompt says how the answer is to be written: inside answer tags, in a box, or on an `Answer:` line (tags, if it says
nothing). Another way of writing counts as well, but is an `incorrect_format`; with strict = true it counts as wrong.
The options are those of `problem.meta["options"]`, else the lettered lines of the last user turn, else A to D.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from opdkit.tasks.base import Grade, Option
from opdkit.tasks.final_text import after_thinking, last_tagged, unclosed_tag
from opdkit.tasks.math.text import answer_line, enclosed, last_boxed
from opdkit.types import Problem

Style = Literal["tags", "boxed", "answer_line"]
Options = Mapping[str, str | None]  # letter -> text; None: not known

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_CHARACTERS = 10_000  # of what is read as an option; a longer one is none
_MAX_SHOWN = 100  # characters of an answer that is no option
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+(\S[^\n]*)$", re.MULTILINE)
_COMMAND = re.compile(r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|emph)(?=\{)")
_MARKS = "*$`\"'"  # of emphasis, mathematics, code and quotation, the same on both sides
_PAIRS = [
    *((mark, mark) for mark in _MARKS),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
]
_MAX_LAYERS = 16
_LEAD = re.compile(
    r"(?:the )?(?:(?:final|correct|right|best|most likely) ){0,3}(?:answer|option|choice)(?: is)?[:=]? ?(?:option )?",
    re.IGNORECASE,
)
_LETTER_FIRST = re.compile(
    r"(?P<open>[(\[*$`\"']{0,6})(?P<letter>[A-Za-z])(?P<close>[)\]*$`\"']{0,6})"
    r"(?P<separator> ?[.:),\u2013\u2014]\** ?| - ?|- )?"  # a hyphen alone is part of a word: D-glucose
)
# Mathematics and units ("5 \mu C", "$x = C$", "37 C") hold no letter of an option.
_OTHER_LETTER = re.compile(
    r"\$(?!\s*[A-Z]\s*\$)[^$]*\$|\\[A-Za-z]+ ?[A-Za-z]?"
    r"|(?<![^\s,;&|])(?<![\d\u00b0=+/^}] )[(\[*$]{0,4}([A-Z])(?=[)\]*$]{0,4} ?(?:[:).,;]|$)| (?:and|or) )"
)
_PHRASE = re.compile(r"\b(?:answer|option|choice)\**(?: is\b|:)\**:?[ \t]*", re.IGNORECASE)
_PHRASE_LETTER = re.compile(r"[(\[*]{0,3}([A-Z])[)\]*]{0,3}(?=$|[.,;:!]| (?:because|since|as)\b)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceGrade(Grade):
    """`parsed` is the letter; what an answer said instead, if it is no option."""

    incorrect_format: bool  # it is NOT one bare letter of the options, written as the prompt asks

    @property
    def numbers(self) -> Mapping[str, float]:
        return {"incorrect_format": float(self.incorrect_format)}


class MultipleChoiceTask:
    """Scores 1.0 or 0.0. Feedback is only about the format; it never tells the right option."""

    name = "multiple_choice"
    needs_gold: ClassVar[bool] = True

    def __init__(
        self,
        *,
        strict: Annotated[bool, Option("only one bare letter, written as the prompt asks, can be right")] = False,
    ) -> None:
        self._strict = strict

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [self._grade(problem, text) for problem, text in items]

    def close(self) -> None:
        pass

    def _grade(self, problem: Problem, text: str) -> Grade:
        options = options_of(problem)
        if problem.gold is None:
            return Grade(score=None, verdict="error", feedback="the problem has no gold answer")
        gold = read_option(problem.gold, options)
        if gold is None:
            reason = f"the gold answer {problem.gold[:_MAX_SHOWN]!r} is none of the options {', '.join(options)}"
            return Grade(score=None, verdict="error", feedback=reason)
        style = _asked_style(problem)
        final = after_thinking(text)
        said = _final_answer(final, style, options)
        well_formed = _written_as(style, final) in options
        if said is None:
            return ChoiceGrade(
                score=0.0, verdict="no_answer", incorrect_format=True, feedback=_how_to_write(style, options)
            )
        letter = read_option(said, options)
        right = letter == gold and (well_formed or not self._strict)
        return ChoiceGrade(
            score=float(right),
            verdict="correct" if right else "wrong",
            parsed=letter,  # text that names no option is no vote
            incorrect_format=not well_formed,
            feedback=None if well_formed else _how_to_write(style, options),
        )


def options_of(problem: Problem) -> dict[str, str | None]:
    """Letter -> text, in order. Of several lettered lists in the question, the last."""
    given = problem.meta.get("options")
    if isinstance(given, Mapping) and given:
        return {str(letter): str(text) for letter, text in given.items()}
    if isinstance(given, list | tuple) and 0 < len(given) <= len(LETTERS):
        return dict(zip(LETTERS, map(str, given), strict=False))
    question = next((turn["content"] for turn in reversed(problem.messages) if turn["role"] == "user"), "")
    return dict(_lettered(question)) or dict.fromkeys("ABCD")


@lru_cache(maxsize=4096)
def _lettered(question: str) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for line in _LINE.finditer(question):
        if line[1] == "A":
            found = []
        if line[1] == LETTERS[len(found)]:
            found.append((line[1], line[2].strip()))
    return tuple(found) if len(found) > 1 else ()


def read_option(text: str, options: Options) -> str | None:
    """The letter of the one option that the text names, by its letter, its text, or both; None if it names none, or
    more than one. An option's own text, as it stands, is never read as anything else."""
    text = _one_line(text)
    if len(text) > MAX_CHARACTERS:
        return None
    if text in options:
        return text
    lead = _LEAD.match(text)
    words = text[lead.end() :] if lead else text
    named, bare = _as_it_stands(text, options) or _as_it_stands(words, options), _bare(words)
    if bare in options and all(_one_line(options[letter] or "") == bare for letter in named):
        return bare  # also where some option's text is this letter
    named = named or _by_text(text, options) or _by_text(words, options)
    if len(named) == 1:
        return named[0]
    return next((letter for layer in _layers(text) if (letter := _by_letter(layer, options))), None)


def _as_it_stands(text: str, options: Options) -> list[str]:
    """The options whose text this is, or is within marks: of "x" and "$x$" each is itself."""
    known = {letter: _one_line(option) for letter, option in options.items() if option is not None}
    found = ([letter for letter, option in known.items() if option == layer] for layer in _layers(text))
    return next(filter(None, found), [])


def _by_text(text: str, options: Options) -> list[str]:
    """As it stands, else without the marks around either, else without case as well: molecules are spelled with it."""
    if same := _as_it_stands(text, options):
        return same
    for spell in (_bare, lambda text: _bare(text).casefold()):
        said = spell(_one_line(text))
        same = [letter for letter, option in options.items() if option is not None and spell(_one_line(option)) == said]
        if said and same:
            return same
    return []


def _by_letter(text: str, options: Options) -> str | None:
    lead = _LEAD.match(text)
    first = _LETTER_FIRST.match(text, lead.end() if lead else 0)
    letter = first["letter"].upper() if first else ""
    if first is None or letter not in options:
        return None
    rest = text[first.end() :]
    if not rest:
        return letter
    is_marked = bool(first["close"]) and (first["close"][-1] in ")]" or first["close"][0] == first["open"][-1:])
    if first["separator"] is None and not is_marked:
        if not (rest.startswith(" (") and rest.endswith(")")):
            return None  # a word
        rest = rest[2:-1]  # C (the liver)
    rest = rest.strip()
    if _bare(rest) == _bare(_one_line(options[letter] or "")):
        return letter  # marks alone do not make it another's
    named = _by_text(rest, options)
    if named:
        return letter if letter in named else None
    others = {match[1] for match in _OTHER_LETTER.finditer(rest)} & set(options)
    return None if others - {letter} else letter


def _final_answer(text: str, style: Style, options: Options) -> str | None:
    """What the answer says last, in the way the prompt asks for; else in any other way."""
    ways = {"tags": last_tagged, "boxed": last_boxed, "answer_line": answer_line}
    for way in (ways[style], *ways.values()):
        said = way(text)
        if said:
            return said
    open_end = unclosed_tag(text)
    if open_end is not None and read_option(open_end, options):
        return open_end
    letters = [match[1] for phrase in _PHRASE.finditer(text) if (match := _PHRASE_LETTER.match(text, phrase.end()))]
    if letters and letters[-1] in options:
        return letters[-1]
    whole = text.strip()
    return whole if len(whole) <= MAX_CHARACTERS and read_option(whole, options) else None


def _written_as(style: Style, text: str) -> str | None:
    """What stands where the prompt wants one letter."""
    return {"tags": last_tagged, "boxed": last_boxed, "answer_line": answer_line}[style](text)


def _asked_style(problem: Problem) -> Style:
    prompt = "\n".join(turn["content"] for turn in problem.messages)
    if "<answer>" in prompt:
        return "tags"
    if "\\boxed" in prompt:
        return "boxed"
    return "answer_line" if "Answer:" in prompt else "tags"


def _how_to_write(style: Style, options: Options) -> str:
    letters = ", ".join(options)
    where = {
        "tags": "between <answer> and </answer>",
        "boxed": "inside \\boxed{}",
        "answer_line": 'on a last line that begins with "Answer:"',
    }[style]
    return f"The answer must be one letter out of {letters}, alone, {where}."


def _layers(text: str) -> Iterator[str]:
    """The text, and what is left of it as marks around the whole and full stops are taken off, one after another."""
    yield text
    for _ in range(_MAX_LAYERS):
        inner = _peeled(text)
        if inner is None:
            return
        yield (text := inner)


def _peeled(text: str) -> str | None:
    """Without the outermost pair of marks, command, or full stop; None if there is none, or nothing in it."""
    command = _COMMAND.match(text)
    if command is not None and enclosed(text[command.end() :]):
        return text[command.end() + 1 : -1].strip() or None
    for opening, closing in _PAIRS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip() or None
    return text[:-1].rstrip() or None if text.endswith(".") else None


def _bare(text: str) -> str:
    """Without marks at either end, whether they are pairs or not, and without a full stop."""
    for _ in range(_MAX_LAYERS):
        stripped = text.strip(_MARKS + " ").rstrip(". ")
        stripped = _peeled(stripped) or stripped
        if stripped == text:
            break
        text = stripped
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())
