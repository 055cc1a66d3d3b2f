r"""Intervals, inequalities, unions and set builders of a canonical answer.

Two ways to compare them: as pieces of text (`region`), whose ends may be any expressions, and as sets of real numbers
(`as_set`), where [1,2]\cup[2,3] is [1,3] and \{x:x^{2}<4\} is (-2,2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import sympy

from opdkit.tasks.math.algebra import real_number, solutions
from opdkit.tasks.math.names import NAMES, SYMBOL
from opdkit.tasks.math.text import enclosed, split_top

_COMMA = re.compile(r"[,;]")
_EQUALS = re.compile(r"=")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\\lor(?![A-Za-z])")
_INTERSECTION = re.compile(r"\\cap(?![A-Za-z])")
_WITHOUT = re.compile(r"\\setminus(?![A-Za-z])|-(?=\\\{)")
_OPERATOR = re.compile(r"\\(?:cup|cap|setminus|lor)(?![A-Za-z])")
_MEMBER = re.compile(r"\\in(?![A-Za-z])")
ORDER = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<|>")
_CONDITION = re.compile(rf"{ORDER.pattern}|=|{_MEMBER.pattern}")
_BUILDER = re.compile(rf"\\\{{ ?({SYMBOL.pattern})(?:\\in ?((?:(?![:|]).)+))?[:|](.+)\\\}}")
_BUILDER_OF_TERMS = re.compile(r"\\\{([^{}:|]+)[:|](.+\\in(?![A-Za-z]).+)\\\}")
_BOUND = {"<": "()", ">": "()", "\\le": "[]", "\\ge": "[]"}
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_NUMBER_SETS = {
    **{"\\mathbb{R}": sympy.S.Reals, "\\mathbb{Z}": sympy.S.Integers, "\\emptyset": sympy.S.EmptySet},
    **{"\\mathbb{R}^{+}": sympy.Interval.open(0, sympy.oo), "\\mathbb{R}_{+}": sympy.Interval.open(0, sympy.oo)},
    **{"\\mathbb{R}^{-}": sympy.Interval.open(-sympy.oo, 0), "\\mathbb{R}_{>0}": sympy.Interval.open(0, sympy.oo)},
}
_MAX_MEMBERS = 100
_NamedSet = tuple[str | None, sympy.Set]  # the variable, if one is named


class Region(NamedTuple):
    """A union of intervals and finite sets."""

    variable: str | None  # if one is named
    pieces: list[str]


def region(text: str) -> Region | None:
    variable: str | None = None
    pieces: list[str] = []
    for piece in split_top(text, _UNION):
        if piece[:1] in ("(", "[") and enclosed(piece) and len(split_top(piece[1:-1], _COMMA)) == 2:
            pieces.append(piece)
        elif piece == "\\mathbb{R}":
            pieces.append("(-\\infty,\\infty)")
        elif (inequality := _inequality(piece)) is not None and variable in (None, inequality[0]):
            variable = inequality[0]
            pieces += inequality[1]
        elif piece.startswith("\\{") and enclosed(piece[1:]):
            pieces.append(piece)
        else:
            return None
    return None if pieces == [text] and text.startswith("\\{") else Region(variable, pieces)  # a finite set is a list


def _inequality(text: str) -> tuple[str, list[str]] | None:
    r"""`-2 \le x < 7` -> ("x", ["[-2,7)"]); None unless one bare symbol is compared with expressions without it."""
    sides, signs = split_top(text, ORDER), ORDER.findall(text)
    if len(sides) != len(signs) + 1 or len(sides) not in (2, 3) or "" in sides:
        return None
    if len(sides) == 2 and not SYMBOL.fullmatch(sides[0]):
        sides = sides[::-1]
        signs = [_FLIPPED[signs[0]]]
    symbol = sides.pop(0 if len(sides) == 2 else 1)
    if not SYMBOL.fullmatch(symbol) or symbol in ("\\infty", "\\pi", "e"):
        return None
    if any(symbol in NAMES.findall(end) for end in sides):
        return None
    if len(sides) == 1:
        return symbol, _half_line(signs[0], sides[0])
    if {*signs} <= {">", "\\ge"}:
        signs, sides = signs[::-1], sides[::-1]
    elif not {*signs} <= {"<", "\\le"}:
        return None
    return symbol, [f"{_BOUND[signs[0]][0]}{sides[0]},{sides[1]}{_BOUND[signs[1]][1]}"]


def relation(text: str) -> tuple[str, str, str] | None:
    """(left, sign, right) of an inequality with two sides."""
    sides, signs = split_top(text, ORDER), ORDER.findall(text)
    return (sides[0], signs[0], sides[1]) if len(signs) == 1 and len(sides) == 2 and "" not in sides else None


def _half_line(sign: str, end: str) -> list[str]:
    if sign == "\\ne":
        return [f"(-\\infty,{end})", f"({end},\\infty)"]
    if sign in ("<", "\\le"):
        return [f"(-\\infty,{end}{_BOUND[sign][1]}"]
    return [f"{_BOUND[sign][0]}{end},\\infty)"]


def without_membership(text: str) -> tuple[str | None, str]:
    r"""`x \in S` -> ("x", "S")."""
    sides = split_top(text, _MEMBER)
    return (sides[0], sides[1]) if len(sides) == 2 and SYMBOL.fullmatch(sides[0]) else (None, text)


# --- set builders ----------------------------------------------------------------------------------------------------


def without_builder(text: str) -> str:
    r"""`\{x\in\mathbb{R}:x>2\}` -> `x>2`; `\{2k:k\in\mathbb{Z}\}` -> `2k,k\in\mathbb{Z}`; other text as it is."""
    builder = _builder(text)
    if builder is not None:
        variable, domain, condition = builder
        return condition if domain in (None, "\\mathbb{R}") else f"{condition},{variable}\\in {domain}"
    match = _BUILDER_OF_TERMS.fullmatch(text) if enclosed(text[1:]) else None
    return f"{match[1]},{match[2]}" if match else text


def _builder(text: str) -> tuple[str, str | None, str] | None:
    r"""(variable, its domain or None, condition) of `\{x\in S:condition\}`, if the condition is one on the variable."""
    match = _BUILDER.fullmatch(text) if text.startswith("\\{") and enclosed(text[1:]) else None
    if match is None or not _CONDITION.search(match[3]) or match[1] not in SYMBOL.findall(match[3]):
        return None
    return match[1], match[2] and match[2].strip(), match[3].strip()


# --- as sets of real numbers -----------------------------------------------------------------------------------------


def same_sets(gold: str, answer: str) -> bool:
    r"""Whether two texts, one of them with an operator or a set builder, are the same set of real numbers."""
    if not any(_OPERATOR.search(side) or _builder(side) or ORDER.search(side) for side in (gold, answer)):
        return False
    gold_set, answer_set = as_set(gold), as_set(answer)
    if gold_set is None or answer_set is None:
        return False
    if None not in (gold_set[0], answer_set[0]) and gold_set[0] != answer_set[0]:
        return False
    return bool(_listed(gold_set[1]) == _listed(answer_set[1]))


def as_set(text: str) -> _NamedSet | None:
    """(the variable, if one is named; the set). None if it is not one of real numbers, or has a symbol in its ends."""
    try:
        return _set(text)
    except Exception:  # sympy raises many kinds for sets it cannot combine; all mean "not known"
        return None


def _set(text: str) -> _NamedSet | None:
    builder = _builder(text)
    if builder is not None:
        variable, domain, condition = builder
        held, within = _set(condition), _set(domain or "\\mathbb{R}")
        if held is None or within is None or held[0] not in (None, variable):
            return None
        return variable, sympy.Intersection(held[1], within[1])
    for separator, combine in (
        (_UNION, sympy.Union),
        (_COMMA, _conjunction),
        (_INTERSECTION, sympy.Intersection),
        (_WITHOUT, sympy.Complement),
    ):
        parts = split_top(text, separator)
        if len(parts) > 1 and separator is _COMMA and None not in (members := [real_number(part) for part in parts]):
            return None, sympy.FiniteSet(*members)
        if len(parts) > 1:
            return _combined(combine, [_set(part) for part in parts])
    return _single_set(text)


def _combined(combine: Callable[..., sympy.Set | None], parts: list[_NamedSet | None]) -> _NamedSet | None:
    known = [part for part in parts if part is not None]
    names = {name for name, _ in known if name is not None}
    if len(known) < len(parts) or len(names) > 1:
        return None
    combined = combine(*(part for _, part in known))
    return None if combined is None else (next(iter(names), None), combined)


def _conjunction(*conditions: sympy.Set) -> sympy.Set | None:
    """`x>2,x\\ne 3`: both. Nobody means conditions that exclude each other, as in `x<-2,x>2`."""
    both = sympy.Intersection(*conditions)
    return None if both.is_empty is not False else both


def _single_set(text: str) -> _NamedSet | None:
    if text in _NUMBER_SETS:
        return None, _NUMBER_SETS[text]
    if text.startswith("(") and text.endswith(")") and enclosed(text) and len(split_top(text[1:-1], _COMMA)) == 1:
        return _set(text[1:-1])
    name, inside = without_membership(text)
    if name is not None:
        found = _set(inside)
        return found and (name, found[1])
    if text.startswith("\\{") and enclosed(text[1:]):
        members = [real_number(member) for member in split_top(text[2:-2], _COMMA)]
        return None if None in members else (None, sympy.FiniteSet(*members))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and enclosed(text):
        interval = _interval(text)
        return interval and (None, interval)
    inequality = _inequality(text)
    if inequality is not None:
        intervals = [_interval(piece) for piece in inequality[1]]
        return None if None in intervals else (inequality[0], sympy.Union(*intervals))
    sides = split_top(text, _EQUALS)
    compared = (sides[0], "=", sides[1]) if len(sides) == 2 else relation(text)
    return solutions(compared) if compared else None


def _interval(text: str) -> sympy.Interval | None:
    """None if it is empty or a point: nobody writes a number as [5,5], or the empty set as (2,1)."""
    start, end = (real_number(end) for end in split_top(text[1:-1], _COMMA))
    if start is None or end is None or not start < end:
        return None
    return sympy.Interval(start, end, text[0] == "(", text[-1] == ")")


def _listed(numbers: sympy.Set) -> sympy.Set:
    """A few integers one by one, so that {x in Z: 0 < x < 3} is {1, 2}."""
    simple = sympy.simplify(numbers) if isinstance(numbers, (sympy.Intersection, sympy.Complement)) else numbers
    if isinstance(simple, sympy.Range) and simple.size.is_finite and simple.size <= _MAX_MEMBERS:
        return sympy.FiniteSet(*simple)
    return simple
