"""The math grader on answers read by a careful person: `math_rows.jsonl`, and more of the same kinds.

Of every leniency there are near misses that stay refused, and answers that a model may find to be rewarded without
knowing anything: tautologies, lists of candidates, undefined values, equations whose sides nobody can read.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from opdkit.tasks.math.names import DERIVATIVE, may_be_name
from opdkit.tasks.math.sets import without_builder
from opdkit.tasks.math.spelling import canonical
from opdkit.tasks.math.task import MathTask
from opdkit.tasks.math.values import decide
from opdkit.types import Problem

FILES = ["math_rows.jsonl", "math_kinds.jsonl"]

# Answers that say nothing of any problem.
EMPTY = r"""
= | x= | =x | x=x | 0=0 | 1=1 | x-x=0 | A=A | f(x)=f(x) | x<x | x\le x | x\ne x | x^2\ge 0 | x+1>x | !!! | x=!!!
x=\foo | f(x)=\foo | y=\bar{} | \foo=\foo | : | 0:0 | x:x | \cup | \cup\cup | \setminus | \lor | \in | x\in | x\in x
< | x< | <x | \{x\} | \{x:\} | \{x:x\} | \{x:x=x\} | \{x|x\in\} | () | [] | (,) | \infty-\infty | 0\cdot\infty
\frac{0}{0} | x=\frac{0}{0} | \frac{x}{0} | 0^{-1} | nan | zoo | oo-oo | None | True | \text{} | \text{.} | \text{is}
The answer is | the answer is correct | \text{The answer is correct} | \text{yes or no} | 0,1,2,3,4,5,6,7,8,9,10
0 or 1 or 2 or 3 | \{0,1,2,3,4,5\} | x\pm x | a.m. | 8:30 a.m. | p=1,q=2;p=3,q=4 | x=1;x=2 | (A)(B)(C)(D) | ** | `` | \%
\begin{pmatrix}\end{pmatrix} | \begin{cases}1\\2\end{cases} | \frac{dy}{dx}=0 | \lim_{x\to0} | \int | \approx | \pm
' | || | _8 | ^\circ | \$ | \pounds | \gcd(x,x) | O(1) | \equiv | \mid | x | \frac{1}{0} | -\frac{1}{0}
"""
GOLDS = r"""
5 | 7/2 | 75\% | \sqrt{2} | x^2+1 | \frac{dy}{dt}=5y | x^2+y^2=4 | ax+by+cz=0 | y=2x-3 | f(f(x))=x | \emptyset
y=\begin{cases}1\\3\end{cases} | \lfloor n/5\rfloor | \max(n,5) | |x-2| | x>2 | (-\infty,2)\cup(3,\infty) | \{1,7\}
(1,2) | S_1:S=7:32 | 9:45\text{ p.m.} | \text{Evelyn} | \text{no solution} | \infty | a_n=a_{n-1}+a_{n-2} | 2+3i
\gcd(a,b)=2 | \begin{pmatrix}1\\2\end{pmatrix} | f(x)=\max\{x,\gcd(x,2)\}
"""


def items_of(rows: list[dict[str, Any]]) -> list[tuple[Problem, str]]:
    return [
        (
            Problem(
                id="p", task="math", messages=(), gold=row["gold"],
                meta={"answer_style": row["style"]} if "style" in row else {},
            ),
            row["answer"] if row.get("whole_text") else f"So \\boxed{{{row['answer']}}}.",
        )
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_graded_as_a_careful_person_would(math_task: MathTask, name: str) -> None:
    """Right and wrong answers of all kinds. Rows with `hinges_on_convention` follow docs/guides/grading.md."""
    rows = [json.loads(line) for line in (Path(__file__).parent / name).read_text().splitlines()]
    grades = math_task.grade(items_of(rows))
    differ = [row for row, grade in zip(rows, grades, strict=True) if grade.score != float(row["right"])]
    assert len(rows) > 180 and not differ


def test_no_answer_that_says_nothing_is_rewarded(math_task: MathTask) -> None:
    """Nor left ungraded: an answer that makes the comparison fail would be as good as no punishment."""
    answers = [answer.strip() for line in EMPTY.strip().splitlines() for answer in line.split(" | ")]
    golds = [gold.strip() for line in GOLDS.strip().splitlines() for gold in line.split(" | ")]
    rows = [{"gold": gold, "answer": answer} for gold in golds for answer in answers]
    grades = math_task.grade(items_of(rows))
    assert [row for row, grade in zip(rows, grades, strict=True) if grade.score != 0.0] == []


FRAGMENTS = [
    "A:",
    "A+",
    "AB'",
    "(A,",
    "\\vec{",
    "dx",
    "\\frac{dx}{d",
    "\\{x:",
    "x\\in ",
    "p=1;",
    "the is ",
    "\\text{is}",
]
FRAGMENTS += ["**a", "<b>", "\\$1", "1 million ", "8:30 ", "1\\over ", "USD ", "1/2x", "not "]


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_reading_is_linear(fragment: str) -> None:
    """2000 characters that a backtracking pattern may choke on, in well under a second."""
    started_s = time.process_time()
    text = (fragment * 1000)[:1990]
    decide(canonical(text[:150]), "1")
    decide(text, "1")
    for read in (may_be_name, without_builder, DERIVATIVE.search):
        read(text)
    assert time.process_time() - started_s < 1.0
