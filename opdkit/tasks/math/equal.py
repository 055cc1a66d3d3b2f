r"""Whether two canonical answers are the same mathematical object. Runs in a worker of `pool.py`, not in the trainer.

Structure first, on text: lists and sets are unordered; points, tuples and intervals are ordered and keep their
brackets; matrices go cell by cell; an inequality is its interval; `x = 5` is 5. What is left are single expressions,
parsed whole (never a leading part) and compared by `math_algebra.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from opdkit.tasks.math.algebra import same_expression, same_relation
from opdkit.tasks.math.names import NAMES, SYMBOL, defines, is_name, may_be_name
from opdkit.tasks.math.sets import ORDER, Region, region, relation, same_sets, without_builder, without_membership
from opdkit.tasks.math.text import enclosed, split_top
from opdkit.tasks.math.units import time_of_day
from opdkit.tasks.math.values import decide, is_bare_percentage, rational

_LIST = re.compile(r"[,;]|\\lor(?![A-Za-z])")
_COMMA = re.compile(r"[,;]")
_GROUP = re.compile(r";|\\lor(?![A-Za-z])")
_COLON = re.compile(r":|(?<=[0-9]) to (?=[0-9])|\\text\{to\}")
_EQUALS = re.compile(r"=")
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin|\\end).)*)\\end\{pmatrix\}")


def handle(request: list[str]) -> bool:
    """One request of the pool: [gold, answer], both canonical."""
    gold, answer = request
    try:
        return same(gold, answer)
    except RecursionError:  # only nesting without sense is that deep, and it must not end as "could not be graded"
        return False


def warm_up() -> None:
    """Fills the parser's and sympy's caches before the server forks: a first parse costs 50 ms, a later one 2."""
    for gold, answer in _WARM_UP:
        same(gold, answer)


def same(gold: str, answer: str) -> bool:
    decision = decide(gold, answer)
    if isinstance(decision, bool):
        return decision
    gold, answer = (_without_approximation(_without_parentheses(side)) for side in decision)
    if is_bare_percentage(gold, answer):
        return same(gold, answer[:-2]) or same(gold, f"\\frac{{{answer[:-2]}}}{{100}}")
    if same_sets(gold, answer):
        return True
    if (points := _same_points(gold, answer)) is not None:
        return points
    gold, answer = _without_set_names(gold, answer)
    (gold_name, gold), (answer_name, answer) = (without_membership(without_builder(side)) for side in (gold, answer))
    if gold_name is not None and answer_name is not None and gold_name != answer_name:
        return False
    gold_elements, answer_elements = _elements(gold), _elements(answer)
    if len(gold_elements) == len(answer_elements) == 1:
        return _same_single(_without_parentheses(gold_elements[0]), _without_parentheses(answer_elements[0]))
    if _same_unordered(gold_elements, answer_elements):
        return True
    gold_region, answer_region = region(gold), region(answer)
    return gold_region is not None and answer_region is not None and _same_region(gold_region, answer_region)


def _same_single(gold: str, answer: str) -> bool:
    if gold == answer:
        return bool(gold)
    gold_ratio, answer_ratio = split_top(gold, _COLON), split_top(answer, _COLON)
    gold_sides, answer_sides = split_top(gold, _EQUALS), split_top(answer, _EQUALS)
    if len(gold_sides) == len(answer_sides) == 1 and len(gold_ratio) == len(answer_ratio) > 1:
        return _same_ratio(gold_ratio, answer_ratio)
    if len(gold_sides) > 1 or len(answer_sides) > 1:
        return _same_equation(gold_sides, answer_sides)
    if gold[:1] in ("(", "[") and answer[:1] in ("(", "[") and enclosed(gold) and enclosed(answer):
        return _same_ordered(gold, answer)
    gold_matrix, answer_matrix = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if gold_matrix and answer_matrix:
        return _same_matrix(gold_matrix[1], answer_matrix[1])
    gold_region, answer_region = region(gold), region(answer)
    if gold_region and answer_region:
        return _same_region(gold_region, answer_region)
    gold_relation, answer_relation = relation(gold), relation(answer)
    if gold_relation and answer_relation:
        return same_relation(gold_relation, answer_relation)
    for known, other in ((gold_region, answer), (answer_region, gold)):
        if known and known.variable and ORDER.search(other) and known.variable not in NAMES.findall(other):
            return False
    gold = "\\cup ".join(gold_region.pieces) if gold_region else gold
    answer = "\\cup ".join(answer_region.pieces) if answer_region else answer
    return same_expression(gold, answer)


def _same_unordered(gold: Sequence[str], answer: Sequence[str]) -> bool:
    """Every element of one has its own equal in the other."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for element in gold:
        found = next((index for index, other in enumerate(left) if same(element, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_ordered(gold: str, answer: str) -> bool:
    if gold[0] + gold[-1] != answer[0] + answer[-1]:
        return False
    gold_items, answer_items = split_top(gold[1:-1], _COMMA), split_top(answer[1:-1], _COMMA)
    if len(gold_items) != len(answer_items):
        return False
    return all(same(left, right) for left, right in zip(gold_items, answer_items, strict=True))


def _same_matrix(gold: str, answer: str) -> bool:
    shapes = []
    for matrix in (gold, answer):
        rows = [row for row in matrix.split("\\\\") if row.strip()]
        shapes.append([[cell.strip() for cell in row.split("&")] for row in rows])
    if [len(row) for row in shapes[0]] != [len(row) for row in shapes[1]]:
        return False
    cells = [[cell for row in matrix for cell in row] for matrix in shapes]
    return all(same(left, right) for left, right in zip(*cells, strict=True))


# --- equations ------------------------------------------------------------------------------------------------------


def _same_equation(gold: list[str], answer: list[str]) -> bool:
    """Sides of a = b = c on both sides. A plain value equals an equation that assigns it to a name; the gold's name
    must be one beyond doubt, or 4 would be right for x^{2}+y^{2}=4."""
    if len(answer) == 1:
        value = _assigned(gold, is_name) if defines(gold[0], gold[-1]) else None
        return value is not None and same(value, answer[0])
    if len(gold) == 1:
        value = _assigned(answer, may_be_name)
        return value is not None and same(gold[0], value)
    if len(gold) == len(answer) == 2:
        if same(gold[0], answer[0]) and same(gold[1], answer[1]):
            return True
        return same_relation((gold[0], "=", gold[1]), (answer[0], "=", answer[1]))
    return all(
        any(same(side, other) for other in others)
        for sides, others in ((gold, answer), (answer, gold))
        for side in sides
    )


def _assigned(sides: list[str], named: Callable[[str], bool]) -> str | None:
    """The value of `x = .. = value`; None if the equation is one to be solved, or false (9 = 1)."""
    if named(sides[-1]) and not named(sides[0]):
        sides = sides[::-1]  # 113 = m + n
    checked = sides[1:-1] if named(sides[0]) else sides[:-1]
    return sides[-1] if all(same(sides[-1], side) for side in checked) else None


def _without_set_names(gold: str, answer: str) -> tuple[str, str]:
    r"""`A=\{1,2\}` -> `\{1,2\}`, if the other side has no name for the set."""
    sides = [split_top(side, _EQUALS) for side in (gold, answer)]
    named = [len(parts) == 2 and is_name(parts[0]) and parts[1].startswith("\\{") for parts in sides]
    if named[0] == named[1] or len(sides[named[0]]) > 1:
        return gold, answer
    return sides[0][-1], sides[1][-1]


def _same_ratio(gold: list[str], answer: list[str]) -> bool:
    """7:32 is 14:64: every term times the other's first one. Term by term, if that says nothing (0:1) or if both sides
    may be times by the clock (8:30 and 4:15)."""
    times = [time_of_day(":".join(terms)) for terms in (gold, answer)]
    are_times = all(time is not None and (time.minute or 0) >= 10 for time in times)
    if are_times or "\\ldots" in (*gold, *answer) or any(rational(term) == 0 for term in (*gold, *answer)):
        return all(same(left, right) for left, right in zip(gold, answer, strict=True))
    return all(
        same(f"({left})\\cdot({answer[0]})", f"({right})\\cdot({gold[0]})")
        for left, right in zip(gold[1:], answer[1:], strict=True)
    )


# --- values of several unknowns --------------------------------------------------------------------------------------


def _same_points(gold: str, answer: str) -> bool | None:
    """p=5,q=2;p=7,q=2 are the points (5,2),(7,2): the unknowns in the order of the alphabet. None if neither side is
    made of such assignments."""
    named = [_assignments(side) for side in (gold, answer)]
    if named[0] and named[1]:
        return named[0][0] == named[1][0] and _same_unordered(named[0][1], named[1][1])
    if not named[0] and not named[1]:
        return None
    if (gold if named[0] else answer).startswith("("):
        return None  # (p,q)=(3,2) against (3,2): the order is the one that is named
    points = [known[1] if known else split_top(side, _LIST) for known, side in zip(named, (gold, answer), strict=True)]
    others = points[1] if named[0] else points[0]
    if not all(len(split_top(point[1:-1], _COMMA)) > 1 and point[0] == "(" and enclosed(point) for point in others):
        return None
    return _same_unordered(*points)


def _assignments(text: str) -> tuple[list[str], list[str]] | None:
    """(the unknowns, one tuple of values for each group) of `p=5,q=2;p=7,q=2`."""
    names: list[str] | None = None
    points = []
    for group in split_top(text, _GROUP):
        sides = _pairs(group) or [split_top(assignment, _EQUALS) for assignment in split_top(group, _COMMA)]
        if len(sides) < 2 or not all(len(pair) == 2 and SYMBOL.fullmatch(pair[0]) and pair[1] for pair in sides):
            return None
        values = dict(sorted(sides, key=lambda pair: (pair[0].startswith("\\"), pair[0])))
        if len(values) < len(sides) or names not in (None, list(values)):
            return None
        names = list(values)
        points.append(f"({','.join(values.values())})")
    return (names, points) if names else None


def _pairs(group: str) -> list[list[str]]:
    """(x,y)=(1,2) as x=1 and y=2; none for anything else."""
    sides = split_top(group, _EQUALS)
    if len(sides) != 2 or not all(side.startswith("(") and enclosed(side) for side in sides):
        return []
    names, values = (split_top(side[1:-1], _COMMA) for side in sides)
    return [[name, value] for name, value in zip(names, values, strict=True)] if len(names) == len(values) else []


# --- intervals and inequalities -------------------------------------------------------------------------------------


def _same_region(gold: Region, answer: Region) -> bool:
    if None not in (gold.variable, answer.variable) and gold.variable != answer.variable:
        return False
    return _same_unordered(gold.pieces, answer.pieces)


# --- taking apart ---------------------------------------------------------------------------------------------------


def _elements(text: str) -> list[str]:
    r"""The members of a list or of a set; one for a single object. `a \pm b` is two."""
    if text.startswith("\\{") and enclosed(text[1:]):
        text = text[2:-2]
    elements = []
    for element in split_top(text, _LIST):
        if "\\pm" in element or "\\mp" in element:
            elements.append(element.replace("\\pm", "+").replace("\\mp", "-").removeprefix("+"))
            elements.append(element.replace("\\pm", "-").replace("\\mp", "+").removeprefix("+"))
        elif element:
            elements.append(element)
    return elements or [""]


def _without_parentheses(text: str) -> str:
    while text.startswith("(") and text.endswith(")") and enclosed(text) and len(split_top(text[1:-1], _COMMA)) == 1:
        text = text[1:-1]
    return text


def _without_approximation(text: str) -> str:
    r"""`\pi \approx 3.14` means \pi; `x \approx 3.14` means 3.14."""
    sides = split_top(text, _APPROXIMATELY)
    if len(sides) == 2 and SYMBOL.fullmatch(sides[0]) and sides[0] not in ("\\pi", "e"):
        return sides[1]
    return sides[0]


_WARM_UP = [
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("(x+1)^{2}", "x^{2}+2x+1"),
    ("\\frac{x^{2}-1}{x-1}", "x+1"),
    ("\\ln\\sqrt{3}", "\\frac{1}{2}\\ln3"),
    ("\\log_{2}8", "3.0\\cdot1"),
    ("2\\pi+\\frac{\\pi}{3}", "\\frac{7\\pi}{3}"),
    ("\\sin^{2}x", "1-\\cos^{2}x"),
    ("\\tan(\\frac{\\pi}{4})", "\\arctan(1)"),
    ("e^{2x}", "e^{x}e^{x}"),
    ("2+3i", "3i+2"),
    ("5!", "\\binom{16}{2}"),
    ("|x|", "\\sqrt{x^{2}}"),
    ("f(x)+g_{1}(x)", "g_{1}(x)+f(x)"),
    ("[-2,\\frac{7}{\\sqrt{2}})", "-2\\le x<\\sqrt{24.5}"),
    ("\\mathbb{R}\\setminus\\{0\\}", "(-\\infty,0)\\cup(0,\\infty)"),
    ("y=2x+3", "2x-y+3=0"),
    ("2x>4", "x>2"),
    ("\\frac{1}{2}\\begin{pmatrix}2&4\\\\6&8\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("\\sum_{k=1}^{5}k", "15"),
    ("\\lfloor3.5\\rfloor", "\\max(1,3)"),
    ("10\\%", "0.1x"),
]
