r"""Units of a canonical answer: `15\text{cm}`, `\$31`, `4210_{5}`, `1.5 million`, `8:30 a.m.`

Nothing is converted: a unit is taken off, and both sides' units have to agree where both have one.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MIN_WORD_LENGTH = 4  # shorter strings of letters are products of variables
_NUMERIC = re.compile(r"(?:[0-9.+\-/^{}() ]|\\frac|\\sqrt|\\pi|\\cdot)+")
_TEXT_UNIT = re.compile(r"(.*[^ ]) ?\\text\{([A-Za-z$/][^{}0-9=]*)\}(?:\^\{([23])\})?")
_BARE_UNIT = re.compile(r"(.*?[0-9}])( ?)([A-Za-z][A-Za-z. ]*(?:/[A-Za-z]+)?)(?:\^\{([23])\})?")
_DEGREES = re.compile(r"(.+)\^\{\\circ\}(?: ?(?:\\text\{)?([CFK])\}?)?")
_BASE = re.compile(r"\(?([0-9][0-9A-F]*)\)?_\{([2-9]|1[0-6])\}")
_CURRENCIES = {
    **{"\\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "US\\$": "dollar", "US": "dollar"},
    **{"USD": "dollar", "EUR": "euro", "GBP": "pound", "INR": "rupee", "Rs": "rupee", "RMB": "yuan", "CNY": "yuan"},
}
_CURRENCY_BEFORE = re.compile(
    r"([-+]?)(?:\\text\{ ?)?(\\\$|[€£¥₹]|US\\\$|USD?|EUR|GBP|INR|Rs|RMB|CNY)\.? ?\}? ?"
    r"([-+]?(?:[0-9.]|\\(?:frac|sqrt|pi)).*)"
)
_CURRENCY_AFTER = re.compile(r"(.+)(\\\$|[€£¥₹])")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALED = re.compile(
    rf"([-+]?[0-9]+(?:\.[0-9]+)?) ?(?:\\text\{{ ?)?({'|'.join(_SCALES)})s?(?: ([A-Za-z][A-Za-z ]*))?\}}?", re.IGNORECASE
)
_TIME = re.compile(r"([01]?[0-9]|2[0-4])(?::([0-5]?[0-9]))?(?: ?(?:\\text\{ ?)?([ap])\.? ?m\.?\}?)?", re.IGNORECASE)
# A text after a value that is not its unit.
_NOT_UNITS = {
    *("is", "are", "if", "when", "where", "for", "then", "not", "no", "only", "or", "and", "mod", "to", "from", "base"),
    *("otherwise", "such", "that", "with", "hundred", "thousand", "million", "billion", "trillion", "dozen", "times"),
    *("plus", "minus", "over", "divided", "factorial", "squared", "cubed", "half", "than", "more", "less", "below"),
    *("but", "wrong", "incorrect", "false", "negative", "undefined", "except", "nor", "neither", "either"),
    *("maybe", "choose"),
}
_UNIT_NAMES = {
    **{"cm": "centimeter", "m": "meter", "mm": "millimeter", "km": "kilometer", "in": "inch", "inche": "inch"},
    **{"ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile", "kg": "kilogram", "g": "gram", "gm": "gram"},
    **{"mg": "milligram", "lb": "pound", "oz": "ounce", "s": "second", "sec": "second", "min": "minute", "hr": "hour"},
    **{"h": "hour", "l": "liter", "ml": "milliliter", "rad": "radian", "deg": "degree", "sq": "square", "cu": "cubic"},
    **{"mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour", "usd": "dollar", "$": "dollar"},
    **{"litre": "liter", "metre": "meter", "centimetre": "centimeter", "millimetre": "millimeter"},
    **{"kilometre": "kilometer", "hz": "hertz", "day": "day", "mo": "month", "yr": "year"},
}


_KNOWN_UNITS = {*_CURRENCIES.values(), *_UNIT_NAMES.values()}


class TimeOfDay(NamedTuple):
    """A time by the clock."""

    hour: int
    minute: int | None  # None in `8 a.m.`
    half: str | None  # "a", "p", or None where nothing says which

    def agrees(self, other: TimeOfDay) -> bool:
        """8:30 p.m. is 20:30, and 8:30 where nothing else is said."""
        if (self.minute or 0) != (other.minute or 0):
            return False
        if self.half and other.half:
            return (self.hour, self.half) == (other.hour, other.half)
        marked, bare = (self, other) if self.half else (other, self)
        hour_of_24 = marked.hour % 12 + (12 if marked.half == "p" else 0)
        return bare.hour == marked.hour or (bare.minute is not None and bare.hour == hour_of_24)


def time_of_day(text: str) -> TimeOfDay | None:
    r"""`8:30`, `8:30\text{ a.m.}`, `8 PM`; any small integer may be one."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hour, minute, half = match.groups()
    return TimeOfDay(int(hour), None if minute is None else int(minute), half and half.casefold())


def is_numeric(text: str) -> bool:
    """Whether there are no variables."""
    return _NUMERIC.fullmatch(text) is not None


def split_unit(text: str, *, short_units: bool) -> tuple[str, str | None]:
    """(value, unit or None). `short_units`: `15cm` and `5 m` have units too, and are not products of variables."""
    if match := _BASE.fullmatch(text):
        return match[1], f"base {match[2]}"
    if match := _CURRENCY_BEFORE.fullmatch(text):
        value, unit = split_unit(match[1] + match[3], short_units=short_units)
        currency = _CURRENCIES[match[2]]
        if unit in _KNOWN_UNITS and unit != currency:
            return text, None  # \$5\text{ euros}
        return value, currency + (unit if unit is not None and unit.startswith("/") else "")
    if match := _CURRENCY_AFTER.fullmatch(text):
        return match[1], _CURRENCIES[match[2]]
    if match := _SCALED.fullmatch(text):
        value = str(Fraction(match[1]) * _SCALES[match[2].casefold()])
        return split_unit(f"{value}\\text{{{match[3]}}}", short_units=short_units) if match[3] else (value, None)
    if (match := _DEGREES.fullmatch(text)) and _NUMERIC.fullmatch(match[1]):
        return match[1], f"degree {match[2]}" if match[2] else "degree"
    if (match := _TEXT_UNIT.fullmatch(text)) and re.search(r"[0-9]|\\pi", match[1]):
        words = match[2].split()
        if len(words) <= 4 and not _NOT_UNITS.intersection(word.casefold() for word in words):
            return match[1], _unit_name(match[2], match[3])
    if (match := _BARE_UNIT.fullmatch(text)) and _NUMERIC.fullmatch(match[1]):
        value, space, unit, power = match.groups()
        words = [word for word in re.split(r"[ ./]", unit.casefold()) if word not in ("", "per")]
        short = [word for word in words if len(word) < _MIN_WORD_LENGTH]
        known = bool(words) and all(word.rstrip("s") in _UNIT_NAMES for word in words)
        long = space and words != short and all(word.rstrip("s") in _UNIT_NAMES for word in short)
        if (long or (known and (short_units or (space and len(unit) > 1)))) and not _NOT_UNITS.intersection(words):
            return value, _unit_name(unit, power)
    return text, None


def _unit_name(unit: str, power: str | None) -> str:
    """One name per unit: "sq. cm", "square centimeters" and "cm^2" are the same."""
    words = [_singular(word) for word in re.split(r"[ .]+", unit.replace("/", " / ").casefold()) if word]
    words = ["/" if word == "per" else word for word in words]
    for name, exponent in (("square", "2"), ("cubic", "3"), ("squared", "2"), ("cubed", "3")):
        if name in words:
            words.remove(name)
            power = exponent
    return "".join(words).replace("//", "/") + (f"^{power}" if power else "")


def _singular(word: str) -> str:
    if word in _UNIT_NAMES:
        return _UNIT_NAMES[word]
    word = word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word
    return _UNIT_NAMES.get(word, word)
