"""Exact arithmetic as a tool. Nothing is evaluated by Python: a small grammar is read, and numbers are bounded.

sum      = product  { ("+" | "-") product }
product  = unary    { ("*" | "/" | "//" | "%") unary }
unary    = "-" unary | "+" unary | power
power    = atom [ ("^" | "**") unary ]
atom     = number | "(" sum ")" | name "(" sum { "," sum } ")" | "pi"
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction

from opdkit.rollouts.environments.functions import FunctionTools, ToolError, pure

MAX_CHARACTERS = 1000
_MAX_BITS = 4096  # of a numerator or denominator
_MAX_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+)|([A-Za-z]+)|(\*\*|//|[-+*/%^(),]))")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})  # noqa: RUF001
_DIGITS = Context(prec=12, Emax=MAX_EMAX, Emin=MIN_EMIN)
_NAMES = {"pi": Fraction(math.pi)}


class Wrong(ToolError):
    """Not an expression, or one without a value. A few words for the model."""


class Calculator(FunctionTools):
    """One tool, `calculator(expression)`."""

    def __init__(self) -> None:
        description = "Computes an arithmetic expression exactly."
        argument = {"type": "string", "description": "for example (17 * 23 - 4) / 3"}
        parameters = {"type": "object", "properties": {"expression": argument}, "required": ["expression"]}
        function = {"name": "calculator", "description": description, "parameters": parameters}
        super().__init__([calculator], [{"type": "function", "function": function}])


@pure
def calculator(expression: str) -> str:
    """The value: exact where it is whole, else to 12 digits. Raises Wrong."""
    value = value_of(expression)
    if value.denominator == 1:
        return str(value.numerator)
    return str(_DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator)))


def value_of(expression: str) -> Fraction:
    """Raises Wrong."""
    if len(expression) > MAX_CHARACTERS:
        raise Wrong(f"an expression has {MAX_CHARACTERS} characters at most")
    reader = _Reader(_tokens(expression.translate(_SIGNS)))
    value = reader.sum()
    if reader.next:
        raise Wrong(f"{reader.next!r} is not expected")
    return value


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    text = text.rstrip().removesuffix("=").rstrip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise Wrong(f"{text[position:].strip()[:1]!r} is not known here")
        found.append(token[0].strip())
        position = token.end()
    return found


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, ""]
        self._place, self._depth = 0, 0

    @property
    def next(self) -> str:
        return self._tokens[self._place]

    def _take(self, *tokens: str) -> str:
        taken = self.next if self.next in tokens else ""
        self._place += bool(taken)
        return taken

    def sum(self) -> Fraction:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Wrong("it is nested too deep")
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        self._depth -= 1
        return value

    def _product(self) -> Fraction:
        value = self._unary()
        while sign := self._take("*", "/", "//", "%"):
            other = self._unary()
            if sign != "*" and not other:
                raise Wrong("division by zero")
            value = _bounded(_PRODUCTS[sign](value, other))
        return value

    def _unary(self) -> Fraction:
        negative = False
        while sign := self._take("-", "+"):
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._take("^", "**"):
            return base
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Wrong("it is nested too deep")
        exponent = self._unary()
        self._depth -= 1
        return _power(base, exponent)

    def _atom(self) -> Fraction:
        token = self.next
        self._place += bool(token)
        if token == "(":
            value = self.sum()
            self._closing()
            return value
        if token[:1].isdigit() or token[:1] == ".":
            return _bounded(Fraction(token.rstrip(".") if token != "." else "0"))
        if token in _NAMES:
            return _NAMES[token]
        if token in _FUNCTIONS:
            return self._called(token)
        raise Wrong(f"{token!r} is not expected" if token else "it ends too early")

    def _called(self, name: str) -> Fraction:
        if not self._take("("):
            raise Wrong(f"{name} needs parentheses")
        arguments = [self.sum()]
        while self._take(","):
            arguments.append(self.sum())
        self._closing()
        try:
            return _bounded(Fraction(_FUNCTIONS[name](*arguments)))
        except TypeError:
            raise Wrong(f"{name} does not take {len(arguments)} numbers") from None
        except (ValueError, OverflowError):
            raise Wrong(f"{name} has no value there") from None

    def _closing(self) -> None:
        if not self._take(")"):
            raise Wrong("a parenthesis is not closed")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if not base and exponent < 0:
        raise Wrong("division by zero")
    if exponent.denominator != 1:
        if base < 0:
            raise Wrong("a root of a negative number")
        try:
            return _bounded(Fraction(float(base) ** float(exponent)))
        except OverflowError:
            raise Wrong("the number is too large") from None
    bits = max(abs(base.numerator), base.denominator).bit_length()
    if abs(exponent) * bits > 2 * _MAX_BITS and abs(base) != 1 and base:
        raise Wrong("the number is too large")
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > _MAX_BITS:
        raise Wrong("the number is too large")
    return value


def _root(value: Fraction) -> Fraction:
    """Exact where it is."""
    if value < 0:
        raise ValueError
    above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
    exact = above * above == value.numerator and below * below == value.denominator
    return Fraction(above, below) if exact else Fraction(math.sqrt(value))


def _rounded(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > 100:
        raise ValueError
    scale = Fraction(10) ** int(digits)
    return Fraction(math.floor(value * scale + Fraction(1, 2))) / scale


_PRODUCTS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda value, other: Fraction(value // other),
    "%": operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Fraction | int | float]] = {
    "sqrt": _root,
    "abs": lambda value: abs(value),
    "round": _rounded,
    "floor": lambda value: math.floor(value),
    "ceil": lambda value: math.ceil(value),
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "log": lambda value: math.log(value),
    "exp": lambda value: math.exp(value),
}
