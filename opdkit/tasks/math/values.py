r"""What a canonical answer is besides algebra: a number, a text, an option letter, a value with a unit.

Most answers are decided here, exactly and in microseconds, in the trainer's process.
Conventions: rounded decimals are wrong, exact ones right; p% is p/100; a unit (also a currency, a base, a degree sign)
that one side omits is accepted, a different one is not, and nothing is converted; text is compared without case.
"""

from __future__ import annotations

import re
from fractions import Fraction

from opdkit.tasks.math.sentences import without_sentence
from opdkit.tasks.math.units import is_numeric, split_unit, time_of_day

_DECIMAL = r"[0-9]+(?:\.[0-9]+)?"
_FRACTION = re.compile(rf"([-+]?)(?:\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}|({_DECIMAL})/({_DECIMAL}))")
_MIXED = re.compile(r"([-+]?)([0-9]+)(?: ?\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_PLAIN = re.compile(rf"[-+]?{_DECIMAL}")
_REPEATING = re.compile(r"([-+]?)([0-9]+)\.([0-9]*)\\(?:overline|bar|dot)\{([0-9]+)\}")
_SCIENTIFIC = re.compile(rf"([-+]?{_DECIMAL})(?:\\cdot ?10\^\{{([-+]?[0-9]{{1,3}})\}}|[eE]([-+]?[0-9]{{1,3}}))")

_TEXT = re.compile(r"(?:\\text\{[^{}]*\}|[\s().,'\"])+")
_BARE_WORDS = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_DATE_LIKE = re.compile(r"\(?[A-Za-z]+(?:[ ,']+(?:[A-Za-z]+|[0-9]+))*\)?")
_SHORT_WORDS = {"yes", "no", "odd", "all", "dne", "red", "mon", "tue", "wed", "thu", "fri", "sat", "sun", "one", "two"}
_MIN_WORD_LENGTH = 4  # shorter strings of letters are products of variables
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_OPTION = re.compile(r"\(?\\text\{\(?([A-J])\)?[.:]?\}\)?[.:]?(.+)")


def decide(gold: str, answer: str) -> bool | tuple[str, str]:
    """Whether two canonical answers are equal; if that takes algebra, the two values to compare, without units."""
    if gold == answer:
        return bool(gold)
    options = _without_options(gold, answer)
    if not isinstance(options, tuple):
        return options
    gold, answer = options
    gold_text, answer_text = as_text(gold), as_text(answer)
    if gold_text is not None or answer_text is not None:
        return _decide_text(gold, answer, gold_text, answer_text)
    gold, answer = without_sentence(gold), without_sentence(answer)
    gold_time, answer_time = time_of_day(gold), time_of_day(answer)
    if gold_time and answer_time and (gold_time.half or answer_time.half):
        return gold_time.agrees(answer_time)
    values = _without_units(gold, answer)
    if values is None:
        return False
    readings = [values]
    if is_bare_percentage(*values):  # a gold without a percent sign may mean 75 per cent by 75
        readings.append((values[0], values[1][:-2].rstrip()))
    verdicts = [_decide_numbers(*reading) for reading in readings]
    return True if True in verdicts else values if None in verdicts else False


def is_bare_percentage(gold: str, answer: str) -> bool:
    """Whether the answer is a percentage, and the gold may be one that is written without the sign."""
    return answer.endswith("\\%") and "\\%" not in gold


def _decide_numbers(gold: str, answer: str) -> bool | None:
    """None if it takes algebra."""
    if gold == answer:
        return bool(gold)
    numbers = rational(gold), rational(answer)
    return None if None in numbers else numbers[0] == numbers[1]


def _decide_text(gold: str, answer: str, gold_text: str | None, answer_text: str | None) -> bool | tuple[str, str]:
    if (gold_text is None and "=" in gold) or (answer_text is None and "=" in answer):
        return gold, answer
    gold_words, answer_words = gold_text or _plain_words(gold), answer_text or _plain_words(answer)
    if gold_words is None or answer_words is None:
        rest = without_sentence(answer)
        return decide(gold, rest) if rest != answer else False
    return gold_words in (answer_words, without_sentence(answer_words))


def rational(text: str) -> Fraction | None:
    r"""The exact value of a plain number (3, 0.5, 1/2, 1\frac{1}{2}, 50\%, 0.\overline{3}, 2\cdot10^{3}); else None."""
    if text.endswith("\\%"):
        value = rational(text[:-2].rstrip())
        return None if value is None else value / 100
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom, slash_top, slash_bottom = match.groups()
        numerator, denominator = Fraction(top or slash_top), Fraction(bottom or slash_bottom)
        return None if denominator == 0 else _signed(sign, numerator / denominator)
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match[1], match[2], match[3] or match[5], match[4] or match[6]
        if 0 < int(top) < int(bottom):  # an improper fraction after an integer is a product
            return _signed(sign, int(whole) + Fraction(int(top), int(bottom)))
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, repeated = match.groups()
        tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return _signed(sign, int(whole) + (int(fixed or "0") + tail) / 10 ** len(fixed))
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3])
    return None


def as_text(answer: str) -> str | None:
    r"""The words of an answer that is text (`\text{Yes}`, `no solution`), without case and punctuation; else None."""
    if "\\text{" in answer and _TEXT.fullmatch(answer):
        words = answer.replace("\\text{", " ").replace("}", " ")
    elif _BARE_WORDS.fullmatch(answer) and (
        answer.casefold() in _SHORT_WORDS or any(len(word) >= _MIN_WORD_LENGTH for word in re.split(r"[ '-]", answer))
    ):
        words = answer
    else:
        return None
    return _words(words)


def _plain_words(text: str) -> str | None:
    r"""June 20, which is \text{June 20}; None for what is not words and unsigned numbers: as words, -5 would be 5."""
    return _words(text) if _DATE_LIKE.fullmatch(text) else None


def _words(text: str) -> str | None:
    return " ".join(re.sub(r"[().,'\"-]", " ", text).casefold().split()) or None


def _without_units(gold: str, answer: str) -> tuple[str, str] | None:
    """Both values without their units; None if the units contradict each other."""
    gold_value, gold_unit = split_unit(gold, short_units=False)
    answer_value, answer_unit = split_unit(answer, short_units=is_numeric(gold_value))
    if gold_unit is not None and answer_unit is not None and gold_unit != answer_unit:
        return None
    return gold_value, answer_value


def _without_options(gold: str, answer: str) -> bool | tuple[str, str]:
    r"""`\text{(C)}12`, an option letter and its value, equals the same letter, or the value if the other has none."""
    options = _OPTION.fullmatch(gold), _OPTION.fullmatch(answer)
    if options == (None, None):
        return gold, answer
    if options[0] and options[1]:
        return (options[0][2], options[1][2]) if options[0][1] == options[1][1] else False
    option = options[0] or options[1]
    assert option is not None
    other = answer if options[0] else gold
    letter = as_text(other) or _letter(other)
    if letter is not None and len(letter) == 1:
        return letter == option[1].casefold()
    return (option[2], answer) if options[0] else (gold, option[2])


def _letter(answer: str) -> str | None:
    match = _LETTER.fullmatch(answer)
    return match[1].casefold() if match else None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value
