"""Extraction and spelling: from a model's text to one canonical answer."""

from __future__ import annotations

import time

import pytest

from opdkit.errors import UserError
from opdkit.tasks.math.spelling import Unreadable, canonical
from opdkit.tasks.math.task import extract_answer
from opdkit.tasks.math.values import as_text, decide, rational


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{7}.", "7"),
        (r"\boxed{3} no, \boxed{4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x}", r"\left\{x"),  # an escaped brace opens nothing
        (r"\boxed {7}", "7"),
        (r"\boxed 7", "7"),
        (r"$\boxed 42$ is it", "42"),
        (r"\boxed\frac{1}{2} done", r"\frac{1}{2}"),
        (r"\boxed{5}. Put it in \boxed form.", "5"),  # prose
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{5} then \boxed{6 and so on", "5"),
        (r"\boxed{5} then \boxed{6 {x} and so on", "5"),
        (r"\boxed{5 \boxed{6}", "6"),
        (r"} } \boxed{8}", "8"),
        (r"{ \boxed{8} }", "8"),
        (r'{"answer": "\\boxed{9}"}', "9"),
        (r"\boxed{ 1 }", "1"),
        ("\\boxed{\n12\n}", "12"),
        (r"\boxed{}", None),
        (r"\boxed{5} and \boxed{}", None),  # the last box that closes is the answer, and it is empty
        (r"\boxed{5 and then", None),
        (r"\boxedfoo{5}", None),
        (r"The answer is 5.", None),
        ("", None),
    ],
)
def test_the_last_complete_box(text: str, answer: str | None) -> None:
    """Which box counts, by hand: the conventions of tests/parity/graders.json."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("steps\nAnswer: 34", "34"),
        ("Answer: 1\nWait.\nAnswer: 2\n", "2"),
        ("**Answer:** $34$", "$34$"),
        ("Answer: **34**", "34"),
        ("Final answer : \\boxed{34}.", "34"),
        ("Answer:\n34", "34"),
        ("ANSWER: x = 3\nThank you", "x = 3"),
        ("Answer:", None),
        (r"\boxed{34}", None),
        ("The answers: 34", None),
        ("Answer: \\boxed{34", None),
    ],
)
def test_the_answer_line(text: str, answer: str | None) -> None:
    """Style "answer_line" (DAPO's prompt) reads the last "Answer:", and nothing else."""
    assert extract_answer(text, "answer_line") == answer


def test_an_unknown_style_is_refused() -> None:
    """A recipe's slip is not a wrong answer."""
    with pytest.raises(UserError, match="answer_style is 'box'; choices: boxed, answer_line"):
        extract_answer("", "box")


LONG = ["\\boxed{" * 50_000, "\\boxed{x}" * 30_000, "\\boxed " * 40_000, "\\" * 300_000, "{" * 300_000, "}" * 300_000]
LONG += ["answer" * 50_000, "answer:" * 40_000, "answer" + "*" * 300_000, "Answer:" + "\n" * 300_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_extraction_is_linear(text: str) -> None:
    """Texts made to be slow for backtracking or nested scans: 300 kB in well under a second (quadratic would be
    minutes)."""
    started_s = time.process_time()
    for style in ("boxed", "answer_line"):
        extract_answer(text, style)
    assert time.process_time() - started_s < 2.0


SPELLINGS = [
    (r"\frac{1}{2}", [r"\dfrac12", r"\frac {1}{2}", r"$\tfrac{1}{2}$.", "½", r"\frac 12", r"\left.\frac{1}{2}\right."]),
    (r"\frac{5}{9}", [r"\frac59", r"\frac 5 9", r"\frac{5}9", r"\frac5{9}", r"\\frac{5}{9}"]),
    ("10080", [r"10,\!080", "10,080", r"10{,}080", "10 080", r"10\,080", "010080", r"\text{10,080}", "+10080"]),
    ("0.5", [".5", "0.5", "0.5.", "00.5"]),
    (r"(3,\frac{\pi}{2})", [r"\left( 3, \frac{\pi}{2} \right)", r"\bigl(3,\;\frac\pi2\bigr)"]),
    (r"(3,4)", [r"\langle 3, 4\rangle", "( 3 , 4 )"]),
    (r"x=1\lor x=-4", [r"x=1 \text{ or } x=-4", "x = 1 or x = -4", r"x=1\lor x=-4"]),
    (r"\sqrt{2}/2", ["sqrt(2)/2", r"\sqrt{2}/2", r"\sqrt2/2", "√2/2"]),
    (r"x^{2}", ["x**2", "x^2", "x²", "x^{2}", "x^(2)", "{x}^2"]),
    ("2^{10}", ["2^10", "2**10", "2^{10}"]),
    (r"90^{\circ}", ["90°", r"90^\circ", r"90^{\circ}", r"90\degree"]),
    (r"25\%", ["25%", r"25\%", "25 percent", r"25\text{ percent}"]),
    (r"-2\le x\le7", [r"-2 \leq x \leq 7", "-2 <= x <= 7", "-2 ≤ x ≤ 7"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"]),
    (r"\text{(C)}", [r"\textbf{(C)}", r"\mathrm{(C)}", r"\textbf{ (C) }"]),
    (r"15\text{cm}", [r"15\text{ cm}", r"15 \mathrm{ cm}", r"15\,\mbox{cm}"]),
    (r"\mathbb{R}", [r"\mathbb R", "ℝ", r"\mathbb{R}"]),  # noqa: RUF001
    (r"\emptyset", [r"\varnothing", r"\{\}", "∅", r"\emptyset"]),
    ("f''(x)", ["f''(x)", r"f^{\prime\prime}(x)", "f’’(x)"]),  # noqa: RUF001
]  # fmt: skip


@pytest.mark.parametrize(("spelling", "texts"), SPELLINGS)
def test_one_spelling(spelling: str, texts: list[str]) -> None:
    """Every way of writing it ends as the same text, which is itself unchanged."""
    assert {canonical(text) for text in texts} == {spelling}
    assert canonical(spelling) == spelling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1,234)", "(1,234)"),  # a point
        ("1,23,4567", "1,23,4567"),
        ("100,200", "100200"),
        ("100, 200", "100,200"),
        (r"\{1,234\}", r"\{1,234\}"),
        (r"x=1 \quad 200", "x=1 200"),  # a wide space separates
        ("+", "+"),
        ("$$", ""),
        (" . ", ""),
    ],
)
def test_what_is_not_joined_or_lost(text: str, expected: str) -> None:
    """Commas and spaces separate unless they can only group digits."""
    assert canonical(text) == expected
    assert canonical("100,200", join_thousands=False) == "100,200"


TOO_MUCH = ["x" * 2001, "(" * 201 + "1" + ")" * 201, "{" * 1000, "\\text{" * 201 + "a"]
TOO_MUCH += ["^" * 300, "\\frac" * 300, "10^" + "-" * 300]


@pytest.mark.parametrize("text", TOO_MUCH, ids=lambda text: repr(text[:12]))
def test_the_unreadable_is_refused(text: str) -> None:
    """Longer than 2000 characters or nested more than 200 deep: refused before any recursion."""
    with pytest.raises(Unreadable):
        canonical(text)


MALFORMED = [
    "}}{{",
    r"\frac",
    r"\sqrt[",
    r"\text{",
    r"\text{a",
    "x^",
    r"\begin{",
    "\\",
    "\x00",
    "\ud800",
    r"\left",
    "(((",
]
MALFORMED += ["_" * 99, "1,234" * 300, "0 000" * 300, "\\!" * 900, "a b" * 600, "{" * 200 + "}" * 200, "0a" * 900]
MALFORMED += [r"\text{a}" * 240]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:12]))
def test_malformed_text_is_spelled_without_a_fuss(text: str) -> None:
    """Whatever comes out, nothing raises and nothing takes long, in spelling and in the decisions on it."""
    started_s = time.process_time()
    spelled = canonical(text)
    decide(spelled, "1")
    decide("1", spelled)
    decide(spelled, "15\\text{cm}")
    assert time.process_time() - started_s < 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        ("-0.50", "-1/2"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"-\frac{3}{4}", "-3/4"),
        ("3/4", "3/4"),
        (r"1\frac{1}{2}", "3/2"),
        (r"-1\frac{1}{2}", "-3/2"),
        (r"2\frac{3}{2}", None),  # a product
        (r"25\%", "1/4"),
        (r"0.\overline{3}", "1/3"),
        (r"0.1\overline{6}", "1/6"),
        (r"2.\overline{45}", "27/11"),
        (r"1.2\cdot10^{3}", "1200"),
        (r"5\cdot10^{-2}", "1/20"),
        ("1e-3", "1/1000"),
        (r"\frac{1}{0}", None),
        ("x", None),
        ("", None),
    ],
)
def test_plain_numbers_are_exact(text: str, value: str | None) -> None:
    """Fractions, not floats: numbers one can do in the head."""
    number = rational(text)
    assert (None if number is None else str(number)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"\text{Yes}", "yes"),
        ("East", "east"),
        ("no solution", "no solution"),
        (r"\text{(C)}", "c"),
        ("abc", None),
        ("x", None),
        (r"15\text{cm}", None),
        (r"-\text{C}", None),
    ],
)
def test_words_are_told_from_variables(text: str, words: str | None) -> None:
    """Text is compared as text: as a product of letters, "listen" would equal "silent"."""
    assert as_text(text) == words
