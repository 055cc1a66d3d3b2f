r"""What an equation names: in `AB=5` and `f(x)=2x` the left side is a name for the right one, in `x^{2}+y^{2}=4` not.

A name's value may stand for the equation. The right side of an equation to be solved, of a curve or of a recurrence
says nothing without its left side.
"""

from __future__ import annotations

import re

from opdkit.tasks.math.text import enclosed, split_top

NAMES = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
SYMBOL = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])'*(?:_\{[^{}]*\})?")
_SUBSCRIPT = r"'*(?:_\{[^{}]*\})?"
_OBJECT = (  # a segment, an angle, a vector: never an unknown
    rf"(?:[A-Z]+{_SUBSCRIPT}|m?\\(?:angle|triangle) ?[A-Z]+"
    rf"|\\(?:vec|hat|bar|overline|tilde|overrightarrow|mathcal|mathbb)\{{[^{{}}]*\}}{_SUBSCRIPT})"
)
_ANGLE = rf"(?:{_OBJECT}|\\(?:alpha|beta|gamma|delta|theta|phi|varphi|omega|psi))"
_NAME = rf"(?:{_OBJECT}|(?:\\[A-Za-z]+|[a-z]){_SUBSCRIPT})"  # one way to read each: A:A:A:... must not take long
_TRIGONOMETRIC = r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)|det|dim|deg|arg)(?:\^\{[0-9]+\})?"
_QUANTITY = re.compile(
    rf"{_NAME}|\|{_OBJECT}(?:[-+]{_OBJECT})*\||\\\|(?:{_OBJECT}|[a-z])\\\||\[[A-Z]{{3,}}\]"  # |AB|, a norm, an area
    rf"|{_NAME}(?::{_NAME})+|\\frac\{{{_NAME}\}}\{{{_NAME}\}}|{_NAME}/{_NAME}"  # a ratio
    rf"|\({_NAME}(?:,{_NAME})+\)|{_NAME}\\c[au]p ?{_NAME}"
    rf"|{_TRIGONOMETRIC} ?(?:{_ANGLE}|\({_ANGLE}\))"
    r"|\\(?:lim|sum|int|prod)(?![A-Za-z]).*|\\mathbb\{[A-Z]\}[(\[].*[)\]]|E\[[A-Z]\]"
)
_VARIABLE = r"(?:[A-Za-z]|\\(?!partial)[a-z]+)"
_POWER = r"(?:\^\{[0-9a-z]\})?"
DERIVATIVE = re.compile(  # dy/dx, \frac{d^{2}y}{dx^{2}}, \frac{\partial u}{\partial x}
    rf"\\frac\{{(?:d|\\partial){_POWER} ?({_VARIABLE})\}}\{{(?:(?:d|\\partial) ?{_VARIABLE}{_POWER} ?)+\}}"
    rf"|(?<![A-Za-z\\])d{_POWER}([A-Za-z])/d[A-Za-z]{_POWER}(?![A-Za-z])"
)
_APPLICATION = re.compile(rf"({SYMBOL.pattern})(?:\^\{{[^{{}}]*\}})?(\(.*\))")
_COMPOSITION = re.compile(r"\([A-Za-z]\\circ ?[A-Za-z]\)\([^()]*\)")
_FUNCTIONS = set("fghFGHPETLuvwpqy") | {"\\phi", "\\psi", "\\varphi", "\\Phi", "\\Psi", "\\pi", "\\zeta", "\\sigma"}
_NOT_SYMBOLS = {"\\text", "\\frac", "\\lim", "\\sum", "\\int", "\\prod"}
_SCRIPTS = re.compile(r"[_^]\{[^{}]*\}")
_COMMA = re.compile(r",")
_SIGN = re.compile(r"(?<=.)[-+]")


def is_name(side: str) -> bool:
    r"""x, x_1, f(2), P(A), AB, |AB|, S_1:S, \frac{dy}{dx}, \text{Area}: something that is given a value."""
    if side.startswith("\\text{") or DERIVATIVE.fullmatch(side) or _COMPOSITION.fullmatch(side):
        return True
    application = _APPLICATION.fullmatch(side)
    if application and _is_application(application[1], application[2]):
        return True
    return _QUANTITY.fullmatch(side) is not None


def may_be_name(side: str) -> bool:
    """Also sums and products without numbers, m+n: whoever writes `m+n=113` for a gold 113 knows the value."""
    if is_name(side):
        return True
    bare = _SCRIPTS.sub("", side)
    return not any(character.isdigit() for character in bare) and len(set(NAMES.findall(bare))) > 1


def defines(name: str, value: str) -> bool:
    """Whether `name = value` gives a value: not if the name comes back in it, as in y'=5y, a_n=a_{n-1}+2, x=x^2-6."""
    if name.startswith("("):
        return value.startswith("(") and len(split_top(name[1:-1], _COMMA)) == len(split_top(value[1:-1], _COMMA))
    derivative = DERIVATIVE.fullmatch(name)
    symbol = derivative[1] or derivative[2] if derivative else name
    base = NAMES.match(symbol)
    if base is None or base[0] in _NOT_SYMBOLS or ":" in symbol or "/" in symbol:
        return True
    if symbol == base[0]:
        return symbol not in SYMBOL.findall(value)
    return base[0] not in NAMES.findall(value)


def _is_application(symbol: str, argument: str) -> bool:
    r"""f(x+1) and y(0), but not \sin(x), a(b+c) and x(x+1)."""
    if not enclosed(argument) or (symbol.startswith("\\") and symbol not in _FUNCTIONS):
        return False
    letter = NAMES.match(symbol)
    assert letter is not None
    names = {*NAMES.findall(argument)}
    if letter[0] in names and len(names) > 1:
        return False  # f(f(x))=x is an equation for f
    return letter[0] in _FUNCTIONS or (letter[0] not in names and len(split_top(argument[1:-1], _SIGN)) == 1)
