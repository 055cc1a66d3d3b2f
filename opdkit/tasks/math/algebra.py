r"""Single expressions: parsed whole by latex2sympy, equal if their values are, else if math-verify proves it.

Values come first because they are exact where it matters: at 50 digits, at four points if there are variables, e^{-100}
is not e^{-101} and a rounded decimal is not the number, which an absolute tolerance would take for equal. What has no
value (unknown functions, sets, matrices, inequalities) is left to math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from opdkit.tasks.math.names import DERIVATIVE
from opdkit.tasks.math.sampling import CALCULUS, constant_ratio, same_values

_PARSE_CACHE_SIZE = 8192

_RELATIONS = {"=": sympy.Eq, "\\ne": sympy.Ne, "<": sympy.Lt, ">": sympy.Gt, "\\le": sympy.Le, "\\ge": sympy.Ge}
_FLIPPED = {"=": "=", "\\ne": "\\ne", "<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}

_CASE_SENSITIVE = ConversionConfig(lowercase_symbols=False)
# latex2sympy recognises commands by their beginning (\lnot p as \ln(otp)), so only those it knows reach it.
_UNKNOWN_COMMAND = re.compile(
    r"\\(?!(?:frac|sqrt|binom|cdot|div|pi|infty|cup|cap|setminus|in|mathbb|mathcal|emptyset|text|overline|bar|hat|vec|tilde"
    r"|sum|prod|int|lim|to|[lr]floor|[lr]ceil|max|min|gcd|lcm|begin|end|det|ln|log|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)"
    r"|(?:sin|cos|tan)h|ar(?:sin|cos|tan)h|alpha|beta|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu"
    r"|nu|xi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega"
    r"|hbar|ell|nabla|angle|triangle|le|ge|ne)(?![A-Za-z]))[A-Za-z]"
)
# What it would read, but as something else: `2 3` as 5, `40_{9}` as 40, set builders as quotients, gcd(a, p - 1) as 1,
# an inverse function as a quotient; and it drops primes after numbers.
_UNREADABLE = re.compile(
    r"[0-9] [0-9]|[0-9]_|[0-9)}]'|[A-Za-z].*:|:.*[A-Za-z]|\\text\{[^{}]*[^A-Za-z{}][^{}]*\}|\\(?:gcd|lcm).*[A-Za-z]"
    r"|(?<![A-Za-z])[A-Za-z]\^\{-1\}\(|(?:\\[gln]e|[<>=]) ?(?:\\[gln]e|[<>=])"
)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_PREPARATIONS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(max|min)\\\{([^{}]*)\\\}"), r"\\\1(\2)"),
    # A Leibniz derivative is one name; latex2sympy would evaluate it to 0.
    (DERIVATIVE, lambda match: "D_{" + re.sub(r"[^A-Za-z0-9]", "", match[0]).replace("frac", "") + "}"),
    # 4/3\pi r^{3} is (4/3)\pi r^{3}: a quotient of two numbers before a product is its coefficient. x/2y stays x/(2y).
    (
        re.compile(
            r"(?<![0-9A-Za-z.)}!'])([0-9]+(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?)(?=[A-Za-z(]|\\(?!cdot|div)[a-z])"
        ),
        r"\\frac{\1}{\2}",
    ),
    # latex2sympy reads an integer before a number as a mixed number: 2(3) as 5, 2\binom{5}{2} as 12.
    (re.compile(r"(?<=[0-9])(?=[({]|\\(?:binom|det|gcd|lcm|max|min|lfloor|lceil)(?![A-Za-z]))"), r"\\cdot "),
    (re.compile(r"(?<=[)])(?=[(0-9]|\\frac)"), r"\\cdot "),
    (re.compile(r"(\\frac\{(?!d\}\{d)[^{}]*\}\{[^{}]*\})(?=[(0-9]|\\frac|\\binom)"), r"\1\\cdot "),
    # It reads \pi(2) as a function of 2, but \pi(r+1) as a product.
    (re.compile(r"(?<=\\pi)(?=\()"), r"\\cdot "),
    # It drops primes and transposes, applies \gamma to what follows, and takes degrees for radians.
    (re.compile(r"(?<=[A-Za-z])('+)"), lambda match: "_{" + "prime" * len(match[1]) + "}"),
    (re.compile(r"\^\{(?:T|\\top)\}"), "^{(T)}"),
    (re.compile(r"\\gamma(?![A-Za-z])|\\Gamma(?![A-Za-z(])"), lambda match: "g_{" + match[0][1:] + "}"),
    (re.compile(r"([0-9.]+)\^\{\\circ\}"), r"(\\frac{\1\\pi}{180})"),
]
_INTEGER_BEFORE_FRACTION = re.compile(r"(?<![0-9.])([0-9]+)(?=\\frac\{([0-9]+)\}\{([0-9]+)\})|([0-9])(?=\\frac)")
_BARE_LOG = re.compile(r"\\log(?![A-Za-z_])")


def same_expression(gold: str, answer: str) -> bool:
    r"""A bare \log means the natural or the decimal logarithm, whichever makes both sides agree."""
    if _same_parsed(*_parse_all(gold, answer)):
        return True
    if _BARE_LOG.search(gold) or _BARE_LOG.search(answer):
        return _same_parsed(*_parse_all(*(_BARE_LOG.sub(r"\\ln", side) for side in (gold, answer))))
    return False


def same_relation(gold: tuple[str, str, str], answer: tuple[str, str, str]) -> bool:
    r"""Whether two relations (left, sign, right) say the same: 2x > 4 and 2 < x. Signs are = < > \le \ge \ne.

    Then left - right of one is a constant times that of the other, or both have the same solutions in one real unknown.
    """
    sides = _parse_all(gold[0], gold[2], answer[0], answer[2])
    if not all(_is_scalar(side) for side in sides):
        return None not in sides and sides[:2] == sides[2:] and gold[1] == answer[1]
    ratio = constant_ratio(_minus(sides[0], sides[1]), _minus(sides[2], sides[3]))
    if ratio is not None:
        return bool(answer[1] == (gold[1] if ratio > 0 else _FLIPPED[gold[1]]))
    solutions = [_solutions(gold[1], *sides[:2]), _solutions(answer[1], *sides[2:])]
    return solutions[0] is not None and solutions[0] == solutions[1]


def _same_parsed(gold: Any, answer: Any) -> bool:
    if gold is None or answer is None:
        return False
    if _is_scalar(gold) and _is_scalar(answer):
        verdict = same_values(gold, answer)
        if verdict is not None:
            return verdict
    if isinstance(gold, sympy.Set) != isinstance(answer, sympy.Set) and (_is_scalar(gold) or _is_scalar(answer)):
        return False  # [5,5] is not 5
    if isinstance(gold, (Relational, BooleanAtom)) or isinstance(answer, (Relational, BooleanAtom)):
        return bool(gold == answer) and not isinstance(gold, BooleanAtom)  # x^{2}\ge0 is nothing but true
    if isinstance(gold, sympy.Eq) != isinstance(answer, sympy.Eq):
        return False  # math-verify would compare the right side alone
    if any(isinstance(side, sympy.Basic) and side.has(*CALCULUS) for side in (gold, answer)):
        return bool(gold == answer)
    return _prove(gold, answer) or (not isinstance(gold, sympy.Eq) and _prove(answer, gold))


def _prove(gold: Any, answer: Any) -> bool:
    # The time limits of math-verify need the main thread and whole seconds; the pool's need neither.
    return bool(math_verify.verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))


def solutions(relation: tuple[str, str, str]) -> tuple[str, sympy.Set] | None:
    """(unknown, the real numbers for which a relation in one unknown holds); None if sympy does not find them."""
    left, right = _parse_all(relation[0], relation[2])
    return _solutions(relation[1], left, right) if _is_scalar(left) and _is_scalar(right) else None


def real_number(text: str) -> sympy.Expr | None:
    """The real number or infinity that a canonical expression is; None for anything else."""
    (parsed,) = _parse_all(text)
    if not _is_scalar(parsed) or parsed.free_symbols or parsed.is_extended_real is not True:
        return None
    return parsed


def _solutions(sign: str, left: sympy.Expr, right: sympy.Expr) -> tuple[str, sympy.Set] | None:
    """(unknown, its solutions); None unless there is one unknown and sympy finds at least one solution."""
    symbols = left.free_symbols | right.free_symbols
    if len(symbols) != 1 or left.has(sympy.I) or right.has(sympy.I):
        return None
    try:
        solutions = _RELATIONS[sign](left, right).as_set()
    except Exception:  # sympy raises many kinds; all mean "cannot be solved"
        return None
    if solutions.is_empty is not False or solutions.has(sympy.ConditionSet):
        return None
    return symbols.pop().name, solutions


def _minus(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    return sympy.Add(left, sympy.Mul(-1, right, evaluate=False), evaluate=False)


def _is_scalar(parsed: Any) -> bool:
    return isinstance(parsed, sympy.Expr) and not isinstance(parsed, (Relational, sympy.MatrixExpr, sympy.MatrixBase))


def _parse_all(*texts: str) -> list[Any]:
    """Symbols are real numbers, unless an i is about."""
    is_real = not any(_IMAGINARY.search(text) for text in texts)
    return [_parse(text, is_real) for text in texts]


@lru_cache(maxsize=_PARSE_CACHE_SIZE)
def _parse(text: str, is_real: bool) -> Any:
    """The sympy object of a whole canonical expression; None if latex2sympy cannot read all of it."""
    if _UNREADABLE.search(text):
        return None
    for pattern, replacement in _PREPARATIONS:
        text = pattern.sub(replacement, text)
    text = _INTEGER_BEFORE_FRACTION.sub(_mixed_or_product, text)
    if _UNKNOWN_COMMAND.search(text):
        return None
    try:
        parsed = latex2sympy(
            text, is_real=is_real or None, normalization_config=None, conversion_config=_CASE_SENSITIVE
        )
        return _exact_atoms(parsed)
    except Exception:  # the parser raises bare Exceptions, sympy many kinds; all mean "cannot be read"
        return None


def _mixed_or_product(match: re.Match[str]) -> str:
    whole, top, bottom, digit = match.groups()
    if digit is None and 0 < int(top) < int(bottom):
        return whole  # 1\frac{1}{2} is a mixed number
    return (whole or digit) + "\\cdot "


def _exact_atoms(parsed: Any) -> Any:
    """Decimals become exact fractions, a free i the imaginary unit, and sums and integrals their values."""
    if not isinstance(parsed, sympy.Basic):
        return parsed
    exact: dict[Any, Any] = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    exact |= {symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}
    parsed = parsed.xreplace(exact) if exact else parsed
    derivatives = parsed.atoms(sympy.Derivative)
    unknown = any(derivative.expr.free_symbols - {*derivative.variables} for derivative in derivatives)
    return parsed.doit() if parsed.has(*CALCULUS) and not unknown else parsed  # y may depend on x in \frac{d}{dx}y
