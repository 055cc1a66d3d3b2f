r"""Whether two sympy expressions have the same values: exact where there are no variables, sampled where there are.

Sampling can prove that two expressions differ. That they are the same it shows for analytic functions alone, and only
if they agree at small, large, negative and integer points. Floor, ceiling, minimum, maximum and absolute value may
agree on all samples and differ elsewhere; they need a proof besides: `_same_in_every_branch` or sympy's simplification.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import sympy

_NUM_DIGITS = 50
_TOLERANCE = sympy.Float(10) ** -40  # relative
_MIN_BITS = 20  # a value with fewer significant bits is a sum that cancelled: zero
_NUM_POINTS = 4
_MIN_POINTS = 2
_MAX_FACTORIAL = 100_000
_PRIME = 1329226995784915872903807061267998883  # of 120 bits and no special form
_MAX_BOUNDARIES = 24
_MAX_TOWER = 1  # exponents above exponents, as in 2^{2^n}: their values at large points do not fit into memory

# Their numerical values can be wrong in every digit, so they count only where sympy finds a closed form.
CALCULUS = (sympy.Integral, sympy.Derivative, sympy.Limit, sympy.Sum, sympy.Product)
_FOLDED = (sympy.Abs, sympy.Max, sympy.Min)  # one analytic function on each side of a boundary
_GROWING = (sympy.exp, sympy.factorial, sympy.gamma, sympy.binomial, sympy.sinh, sympy.cosh)
_JUMPING = (sympy.floor, sympy.ceiling, sympy.frac, sympy.sign, sympy.Mod, sympy.Heaviside, sympy.Piecewise)

_SMALL_RANGES = [(2, 5, 1)]  # from, to, step of what is drawn
_RANGES = [(1009, 9973, 0.7), (2, 11, 1), (-1009, -9973, 0.7), (1009, 9973, 1), (-2, -41, 1)]
_Point = dict[sympy.Symbol, sympy.Expr]


def same_values(gold: sympy.Expr, answer: sympy.Expr) -> bool | None:
    """By value, where both have one; None if too few points have."""
    gold, answer = _folded(gold), _folded(answer)
    verdict = _same_samples(gold, answer)
    if verdict and (_breaks(gold) or _breaks(answer)):
        return _proved(gold, answer)
    if not verdict:
        return verdict
    residues = _residue(gold), _residue(answer)
    return True if None in residues else residues[0] == residues[1]


def constant_ratio(numerator: sympy.Expr, denominator: sympy.Expr) -> Any:
    """The number that is the quotient of two expressions everywhere; None if there is no such number."""
    ratios = []
    for point in _near_points(numerator, denominator):
        values = value_at(numerator, point), value_at(denominator, point)
        if None not in values and 0 not in values and all(value.is_finite for value in values):
            ratios.append(values[0] / values[1])
    if len(ratios) < _MIN_POINTS or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return None
    if sympy.im(ratios[0]) != 0:
        return None
    ratio = sympy.nsimplify(ratios[0], rational=True) if _breaks(numerator) or _breaks(denominator) else ratios[0]
    return ratio if same_values(numerator, sympy.Mul(ratio, denominator, evaluate=False)) else None


def _same_samples(gold: sympy.Expr, answer: sympy.Expr) -> bool | None:
    pairs = []
    for point in _near_points(gold, answer):
        values = value_at(gold, point), value_at(answer, point)
        if None not in values:
            pairs.append(values)
    real = [pair for pair in pairs if all(sympy.im(value) == 0 for value in pair)]
    pairs = real if len(real) >= _MIN_POINTS else pairs  # \ln x^2 and 2\ln x differ only where x is negative
    symbols = gold.free_symbols | answer.free_symbols
    if len(pairs) < (_MIN_POINTS if symbols else 1):
        return None
    if not all(_close(*pair) for pair in pairs):
        return False
    return all(_agree(gold, answer, point) for point in _far_points(gold, answer))


def _agree(gold: sympy.Expr, answer: sympy.Expr, point: _Point) -> bool:
    """Whether nothing at this point speaks against equality, which two different real values do."""
    values = value_at(gold, point, cancelled=None), value_at(answer, point, cancelled=None)
    return None in values or any(sympy.im(value) != 0 for value in values) or _close(*values)


# --- proofs for functions that break ---------------------------------------------------------------------------------


def _breaks(expression: sympy.Expr) -> bool:
    """Whether a floor, a maximum, an absolute value ... depends on a variable."""
    return any(atom.free_symbols for atom in expression.atoms(*_FOLDED, *_JUMPING))


def _folded(expression: sympy.Expr) -> sympy.Expr:
    r"""\sqrt{(x-5)^{2}} as |x-5|, for one real variable."""
    if len(expression.free_symbols) != 1 or not all(symbol.is_real for symbol in expression.free_symbols):
        return expression
    return expression.replace(
        lambda part: part.is_Pow and part.exp.is_Rational and part.exp.q % 2 == 0 and part.base.is_polynomial(),
        lambda part: sympy.Pow(sympy.factor(part.base), part.exp),
    )


def _proved(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Equality of two expressions that agree on the samples and break somewhere."""
    if gold == answer or sympy.expand(gold) == sympy.expand(answer):
        return True
    is_complex = gold.has(sympy.I) or answer.has(sympy.I)
    if not is_complex and not any(atom.free_symbols for side in (gold, answer) for atom in side.atoms(*_JUMPING)):
        verdict = _same_in_every_branch(gold, answer)
        if verdict is not None:
            return verdict
    names: dict[Any, sympy.Dummy] = {}
    opaque = [_opaque(side, names) for side in (gold, answer)]
    if not any(map(_breaks, opaque)) and _same_samples(*opaque):
        return True
    try:
        return bool(sympy.simplify((gold - answer).rewrite(sympy.floor)) == 0)
    except Exception:  # sympy raises many kinds; all mean "not proved"
        return False


def _opaque(expression: sympy.Expr, names: dict[Any, sympy.Dummy]) -> sympy.Expr:
    """Every breaking function as an unknown of its own, the same for the same argument: ⌊(n+1)/5⌋ is ⌊n/5 + 1/5⌋."""
    while atoms := [atom for atom in expression.atoms(*_FOLDED, *_JUMPING) if atom.free_symbols]:
        innermost = min(atoms, key=lambda atom: (sympy.count_ops(atom), str(atom)))
        arguments = [sympy.expand(argument) for argument in innermost.args if isinstance(argument, sympy.Expr)]
        if isinstance(innermost, sympy.Abs) and arguments[0].could_extract_minus_sign():
            arguments = [sympy.expand(-arguments[0])]
        if len(arguments) < len(innermost.args):
            return expression  # piecewise
        key = (type(innermost), tuple(arguments))
        expression = expression.xreplace({innermost: names.setdefault(key, sympy.Dummy(real=True))})
    return expression


def _same_in_every_branch(gold: sympy.Expr, answer: sympy.Expr) -> bool | None:
    """Equality of two real expressions of |..|, max and min, each analytic between the roots of certain polynomials.

    Along every variable, with the others fixed at several values, both are compared on each side of each root. None if
    the boundaries are no polynomials or too many.
    """
    boundaries = _boundaries(gold) | _boundaries(answer)
    if len(boundaries) > _MAX_BOUNDARIES:
        return None
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for variable in symbols:
        for others in _far_points(gold, answer)[::2] + _near_points(gold, answer)[:2]:
            fixed = {symbol: number for symbol, number in others.items() if symbol != variable}
            roots = _real_roots([boundary.xreplace(fixed) for boundary in boundaries], variable)
            if roots is None:
                return None
            for number in _between(roots):
                values = [value_at(side, {**fixed, variable: number}) for side in (gold, answer)]
                if values[0] is None or values[1] is None:
                    if values != [None, None]:
                        return None
                elif not _close(*values):
                    return False
    return True


def _boundaries(expression: sympy.Expr) -> set[sympy.Expr]:
    """Where |a| turns (a = 0) and max(a, b) changes (a = b); of nested ones, for every branch of the inner."""
    found: set[sympy.Expr] = set()
    for atom in expression.atoms(*_FOLDED):
        if not atom.free_symbols:
            continue
        pairs = [(atom.args[0], sympy.S.Zero)] if isinstance(atom, sympy.Abs) else itertools.combinations(atom.args, 2)
        for left, right in pairs:
            found.update(_branches(left - right))
            if len(found) > _MAX_BOUNDARIES:
                return found
    return found


def _branches(expression: sympy.Expr) -> list[sympy.Expr]:
    """The expression with |a| as a and as -a, max(a, b) as a and as b: all combinations, up to a limit."""
    pending: list[sympy.Expr] = [expression]
    done: list[sympy.Expr] = []
    while pending and len(pending) + len(done) <= _MAX_BOUNDARIES:
        current = pending.pop()
        atom = next((atom for atom in current.atoms(*_FOLDED) if atom.free_symbols), None)
        if atom is None:
            done.append(current)
        else:
            choices = [atom.args[0], -atom.args[0]] if isinstance(atom, sympy.Abs) else atom.args
            pending += [current.xreplace({atom: choice}) for choice in choices]
    return done + pending


def _real_roots(boundaries: Sequence[sympy.Expr], variable: sympy.Symbol) -> list[sympy.Expr] | None:
    roots: set[sympy.Expr] = set()
    for boundary in boundaries:
        try:
            for part in sympy.fraction(sympy.together(boundary)):
                if part.has(variable):
                    numbers = sympy.Poly(part, variable).nroots(n=20, maxsteps=200)
                    roots.update(number for number in numbers if number.is_real)
        except Exception:  # not a polynomial, or no convergence
            return None
    return sorted(roots)


def _between(roots: list[sympy.Expr]) -> list[sympy.Rational]:
    """Two numbers in each interval that the roots leave."""
    ends = [sympy.Rational(str(root)) for root in roots]
    ends = [(ends[0] if ends else 0) - 7, *ends, (ends[-1] if ends else 0) + 7]
    return [
        left + (right - left) * share
        for left, right in itertools.pairwise(ends)
        for share in (sympy.Rational(29, 97), sympy.Rational(61, 97))
    ]


# --- values and points -----------------------------------------------------------------------------------------------


def value_at(expression: sympy.Expr, point: _Point, cancelled: Any = sympy.S.Zero) -> Any:
    """A complex number of 50 digits, or an infinity; None if there is none at this point. `cancelled`: what to take for
    a sum of which no digit is left."""
    if expression.has(*CALCULUS):
        return None
    try:
        value = expression.evalf(_NUM_DIGITS, subs=point)
        if value in (sympy.oo, -sympy.oo):
            return value
        parts = value.as_real_imag()
    except Exception:  # sympy raises many kinds; all mean "not a number here"
        return None
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    real, imaginary = (cancelled if part.is_Float and part._prec < _MIN_BITS else part for part in parts)
    return None if real is None or imaginary is None else real + sympy.I * imaginary


def _close(left: Any, right: Any) -> bool:
    if left == right:
        return True
    if not (left.is_finite and right.is_finite):
        return False
    return bool(abs(left - right) <= _TOLERANCE * max(abs(left), abs(right)))


def _near_points(*expressions: sympy.Expr) -> list[_Point]:
    """Values for the variables, chosen by their names: the same in every process. Positive, but for the last point;
    complex if one of the expressions is."""
    symbols = _symbols(expressions)
    if not symbols:
        return [{}]
    is_complex = any(expression.has(sympy.I) for expression in expressions)
    points = []
    for index in range(_NUM_POINTS):
        point = {}
        for symbol in symbols:
            value = sympy.Rational(_draw(index, symbol) % 9973 + 1009, 4001)  # 0.25 .. 2.75
            point[symbol] = -value if index == _NUM_POINTS - 1 else value
            if is_complex:
                point[symbol] += sympy.I * value / 3
        points.append(point)
    return points


def _far_points(*expressions: sympy.Expr) -> list[_Point]:
    """Large and negative numbers, small, negative and large integers; no large ones for towers of exponents."""
    symbols = _symbols(expressions)
    if not symbols:
        return []
    towers = max(map(_tower, expressions)) > _MAX_TOWER
    points = []
    for start, end, step in _SMALL_RANGES if towers else _RANGES:
        span = abs(end - start)
        draws = {symbol: _draw(f"{start} {step}", symbol) % span for symbol in symbols}
        sign = 1 if start > 0 else -1
        points.append({symbol: (start + sign * draw) * sympy.Rational(str(step)) for symbol, draw in draws.items()})
    return points


def _draw(index: int | str, symbol: sympy.Symbol) -> int:
    return int.from_bytes(hashlib.blake2b(f"{index} {symbol}".encode(), digest_size=4).digest(), "big")


def _symbols(expressions: Sequence[sympy.Expr]) -> list[sympy.Symbol]:
    return sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)


def _tower(expression: sympy.Basic) -> int:
    """How many exponents and factorials of variables stand above each other: 1 in 2^n, 2 in 2^{2^n}."""
    if not expression.free_symbols:
        return 0
    if isinstance(expression, sympy.Pow):
        exponent = 1 + _tower(expression.exp) if expression.exp.free_symbols else 0
        return max(_tower(expression.base), exponent)
    return isinstance(expression, _GROWING) + max(map(_tower, expression.args), default=0)


def _residue(expression: sympy.Expr) -> int | None:
    """The rational number that rationals make by arithmetic, modulo a prime; None for anything else.

    Numbers of any size (2^{100000} + 1) that agree in 50 digits and in this are the same."""
    if isinstance(expression, sympy.Rational):
        return expression.p * pow(expression.q, -1, _PRIME) % _PRIME if expression.q % _PRIME else None
    if isinstance(expression, (sympy.Add, sympy.Mul)):
        parts = [_residue(part) for part in expression.args]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return (sum(known) if isinstance(expression, sympy.Add) else math.prod(known)) % _PRIME
    if isinstance(expression, sympy.Pow):
        base, exponent = _residue(expression.base), expression.exp.doit()
        if not base or not exponent.is_Integer:
            return base if base == 0 and exponent.is_positive else None
        return pow(base, int(exponent), _PRIME)
    if isinstance(expression, sympy.factorial) and expression.args[0].is_Integer:
        number = int(expression.args[0])
        return math.factorial(number) % _PRIME if 0 <= number <= _MAX_FACTORIAL else None
    return None
