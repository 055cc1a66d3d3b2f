"""The math grader: equal objects, published rows, hostile answers, caches and counts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from opdkit.tasks.math import equal as math_equal
from opdkit.tasks.math.spelling import canonical
from opdkit.tasks.math.task import MathTask
from opdkit.types import Problem

ROWS = Path(__file__).parents[1] / "parity" / "graders.json"

# Rows of graders.json where we differ from the careful human verdict, with the reason. None.
DISAGREEMENTS: dict[str, str] = {}


def problem(gold: str | None, **meta: str) -> Problem:
    return Problem(id="p", task="math", messages=(), gold=gold, meta=meta)


def box(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


# gold | answer | equal. Grouped by what the pair is about; read as mathematics, not as strings.
PAIRS = r"""
\sqrt{8} | 2\sqrt{2} | yes
2\sqrt{2} | 2*sqrt(2) | yes
2*sqrt(2) | 2 | no
2 | 2*sqrt(2) | no
\frac{\sqrt{3}}{3} | 1/sqrt(3) | yes
\frac{1}{x+1} | 1/(x+1) | yes
\frac{1}{x+1} | 1/x+1 | no
1/2 | 0.5 | yes
1/3 | 0.3333333333 | no
1/3 | 0.\overline{3} | yes
\pi | 3.14159265358979 | no
.0000672 | .0000673 | no
.0000672 | 6.72\times10^{-5} | yes
10^{-20} | 10^{-21} | no
e^{-100} | e^{-101} | no
2^{100} | 1267650600228229401496703205377 | no
25! | 15511210043330985984000000 | yes
25! | 15511210043330985984000001 | no
10^{20000} | 10^{20000}+1 | no
2^{100000}-1 | 2^{100000}+1 | no
2^{2^{20}}+1 | 2^{2^{20}} | no
\frac{2^{100000}-1}{3} | \frac{1}{3}(2^{100000}-1) | yes
20000! | 20000!+1 | no
1\frac{1}{2} | 1 1/2 | yes
\frac{1}{3} | 0.\dot{3} | yes
2.5 \times 10^{-3} | 2.5·10⁻³ | yes
\log_2 8 | log₂ 8 | yes
5 | \color{red}5 | yes
5 | \textcolor{red}{5} | yes
5 | 5\\ | yes
113 | 113 = m + n | yes
113 | 112 = m + n | no
3 | 3 = x + 2 | no
60\text{ mph} | 60 miles per hour | yes
60\text{ mph} | 60 miles | no
\text{June 20} | June 20 | yes
\text{June 20} | June 21 | no
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right] | yes
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left(\begin{array}{rr}1&2\\4&3\end{array}\right) | no
9\% | 9 | no
50\text{ percent} | \frac{1}{2} | yes
1e3 | 1000 | yes

2(3) | 6 | yes
2(3) | 5 | no
2 3 | 5 | no
2\frac{1}{2} | 2.5 | yes
2\frac{1}{2} | 1 | no
2\frac{3}{2} | 3 | yes
2\binom{5}{2} | 20 | yes
\frac{4}{2}\frac{1}{3} | \frac{2}{3} | yes

(x+1)(x-1) | x^2-1 | yes
(x+1)(x-1) | x^2+1 | no
\sin^2 x+\cos^2 x | 1 | yes
\cot x | \frac{\cos x}{\sin x} | yes
\sqrt{x^2} | |x| | yes
\sqrt{x^2} | x | no
\ln x^2 | 2\ln x | yes
\log 2 | \ln 2 | yes
\log 100 | 2 | yes
\log_{10} 100 | 2 | yes
\lg 100 | 2 | yes
\lg 2 | \ln 2 | no
\log_2 8 | 4 | no
p - q | q - p | no
f'(x) | f''(x) | no
0.5 | 0.5' | no
A | A^T | no
\gamma+1 | 1 | no
\gamma+1 | 1+\gamma | yes
\lnot p | otp | no
f^{-1}(x) | \frac{1}{f(x)} | no
dx\wedge dy | dy\wedge dx | no
\mathbb{Z}_5 | \mathbb{Z}_6 | no
\zeta(3)+1 | 1+\zeta(3) | yes
\zeta(3) | \zeta(2) | no
O(n) | O(n^2) | no
F_4 | F_5 | no
X | x | no
\gcd(4,6) | 2 | yes
\gcd(a,p-1) | \gcd(a,p-2) | no
\frac{n(n+1)}{2} | \sum_{k=1}^{n} k | yes
\int_0^1 x dx | \frac12 | yes
\int_0^1 x dx | \int_0^2 x dx | no
2+3i | 3i+2 | yes
2+3i | 2-3i | no
e^{i\pi} | -1 | yes
\sin 30^\circ | \frac12 | yes
\tan^{-1}(1) | \frac{\pi}{4} | yes

\{1,2\} | 2, 1 | yes
(1,2) | 1,2 | no
(1,2) | \{1,2\} | no
(1,2) | (2,1) | no
(3,-2) | (5,-7) | no
1,1,2 | 1,2 | no
1\pm\sqrt{19} | 1+\sqrt{19},1-\sqrt{19} | yes
1\pm\sqrt{19} | 1+\sqrt{19} | no
\pm1,\pm2 | -2,-1,1,2 | yes
x=\frac{1}{2} \text{ and } y=3 | y=3, x=0.5 | yes
x\in\{1,2\} | 1,2 | yes
\{3\} | 3 | yes
100, 200 | 100,200 | yes
100,200 | 100, 200 | yes
100200 | 100,200 | yes
1, a, a^2, \ldots, a^n | 1,a,a^2,\dots,a^n | yes
(1,2),(3,4) | (3,4),(1,2) | yes
(1,2),(3,4) | (2,1),(4,3) | no

[0,1) | 0\le x<1 | yes
[0,1) | (0,1] | no
(-\infty, 2] | x \le 2 | yes
(-\infty, 2] | x < 2 | no
-2\le x\le 7 | 7\ge x\ge -2 | yes
x>2 | y>2 | no
2x>4 | x>2 | yes
-x<-2 | x>2 | yes
x>2 | x<2 | no
x>2 | x\ge 2 | no
x^2<4 | -2<x<2 | yes
x^2<4 | (-2,2) | yes
x^2<4 | -2<y<2 | no
x\neq 0 | (-\infty,0)\cup(0,\infty) | yes
x\neq 0 | \mathbb{R}\setminus\{0\} | yes
[1,2]\cup[3,4] | 3\le x\le 4 \text{ or } 1\le x\le2 | yes
[1,2]\cup[3,4] | [1,2]\cup[3,5] | no
\mathbb{R} | (-\infty,+\infty) | yes
\mathbb{Q} | \mathbb{R} | no
\infty | -\infty | no
\emptyset | \{\} | yes
|w+i|>1 | |w-i|>1 | no

\begin{pmatrix}1/3&\sqrt{8}\\0&1\end{pmatrix} | \begin{bmatrix}\frac13&2\sqrt2\\0&1\end{bmatrix} | yes
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix} | no
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix} | no
\frac12\begin{pmatrix}2\\4\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | yes

x=5 | 5 | yes
5 | x = 5 | yes
x=5 | y=5 | no
x=5 | 5=x | yes
x=2+3=5 | x=5 | yes
x=5 | x=7=5 | no
a=b=0 | b=a=0 | yes
a=b=0 | a=0 | no
a+b=c | a+\infty b=c | no
113 | m+n=113 | yes
2x+3 | f(x)=2x+3 | yes
5 | x=2+3=5 | yes
5 | x=2+4=5 | no
1 | 9=1 | no
5 | x+3=5 | no
1 | 2x+z=1 | no
(1,2) | (x,y)=(1,2) | yes
5 | \text{Area}=5 | yes
\text{(C)} | z=\text{C} | yes
5x-7y+11z+4=0 | 10x-14y+22z=-8 | yes
5x-7y+11z+4=0 | 5x-7y+11z+5=0 | no
\sqrt{x}=2 | x=4 | yes
e^A = I + (e - 1)A | e^A = I + (e - 2)A | no
\pi | \pi\approx 3.14 | yes
3.14 | x\approx 3.14 | yes

15 | 15\text{ cm} | yes
15 | 15cm | yes
15 | 15 m | yes
15\text{ cm} | 15 | yes
15\text{ cm} | 15\text{ m} | no
15\text{ square meters} | 15\text{ m}^2 | yes
15\text{ meters} | 15\text{ m}^2 | no
60\text{ mph} | 60\text{ miles per hour} | yes
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ | yes
30^\circ | (30^\circ) | yes
5 | 5 apples | yes
15 dollars | \$15 | yes
\$32,\!348 | 32348 | yes
10\text{ million} | 10 | no
6\pi\text{ square units} | 6\pi | yes
5m | 5 | no
4210_5 | 4210 | yes
4210_5 | 4210_7 | no
4210_5 | 555 | no
40_9 | 40_{0} | no

\text{(C)} | c | yes
C | \textbf{(C)}\ 12 | yes
12 | \textbf{(C)}\ 12 | yes
12 | \textbf{(C)}\ 13 | no
\text{(B)} | \textbf{(C)}\ 12 | no
\text{(C)} | -\text{(C)} | no
east | \text{East} | yes
neither | (neither) | yes
no solution | \text{No solution.} | yes
listen | silent | no
\text{two} | 2 | no
"""
CASES = [tuple(line.rsplit(" | ", 2)) for line in PAIRS.strip().splitlines() if line]


@pytest.fixture(scope="module")
def graded(math_task: MathTask) -> dict[tuple[str, ...], str]:
    """All pairs in one batch, as a trainer would grade them."""
    grades = math_task.grade([(problem(gold), box(answer)) for gold, answer, _ in CASES])
    return {case: grade.verdict for case, grade in zip(CASES, grades, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " | ".join(case))
def test_pairs_by_hand(graded: dict[tuple[str, ...], str], case: tuple[str, str, str]) -> None:
    """Equal mathematical objects are equal, others are not: a list one can check by reading."""
    assert graded[case] == ("correct" if case[2] == "yes" else "wrong")


def test_verdicts_in_the_worker_equal_verdicts_in_this_process(graded: dict[tuple[str, ...], str]) -> None:
    """A confined worker that cannot import what sympy loads late gives silent wrong verdicts (spec/sandbox.md 5): the
    same comparison without a worker must agree on every pair. Half the pairs need algebra."""
    for gold, answer, expected in CASES:
        if gold == "100, 200" or answer == "100, 200":
            continue  # which of the two readings is meant is settled before the worker
        here = math_equal.same(canonical(gold), canonical(answer))
        assert (graded[gold, answer, expected] == "correct") is here, (gold, answer)


def test_published_rows(math_task: MathTask) -> None:
    """All 64 math rows of the vectors: careful human verdicts. The published graders agree on 20 to 60 of them."""
    (rows,) = [case["rows"] for case in json.loads(ROWS.read_text())["cases"] if case["id"] == "pub.graders.math"]
    grades = math_task.grade([(problem(row["gold"]), row["response"]) for row in rows])
    wrong = {row["id"]: row["why"] for row, grade in zip(rows, grades, strict=True) if grade.score != row["expected"]}
    assert len(rows) == 64
    assert set(wrong) == set(DISAGREEMENTS)


def test_hostile_answers_are_wrong_and_cost_only_themselves() -> None:
    """Towers, huge sums and integrals end as verdict "timeout", score 0; neighbours and later answers are unharmed; a
    repeated bomb costs nothing. Limits of 0.5 CPU seconds keep the test short."""
    bombs = ["9^{9^{9^{9}}}+1", r"\sum_{k=1}^{10^9}k^k", r"\lfloor 10^{10^9}\pi\rfloor"]
    harmless = [
        "9**9**9**9",
        "100000000!",
        r"\binom{10^9}{5\cdot10^8}",
        "10^{10^{10}}",
        '__import__("os").system("id")',
    ]
    items = [(problem(r"\sqrt{2}"), box(answer)) for answer in [*bombs, *harmless, "2^{1/2}"]]
    task = MathTask(num_workers=2, cpu_s=0.5)
    try:
        verdicts = [grade.verdict for grade in task.grade(items)]
        assert verdicts == ["timeout"] * 3 + ["wrong"] * 5 + ["correct"]
        started_s = time.monotonic()
        assert [grade.verdict for grade in task.grade(items)] == verdicts
        assert time.monotonic() - started_s < 0.5
        assert (task.stats.num_timeout, task.stats.pool.num_timeouts, task.stats.num_cached) == (6, 3, len(items))
        assert task.stats.pool.num_workers_started <= 2 + 3
    finally:
        task.close()


def test_unreadable_answers_are_wrong_with_the_reason(math_task: MathTask) -> None:
    """Beyond 2000 characters or 200 brackets nothing is parsed, and the count says how often."""
    before = math_task.stats.num_unreadable
    grades = math_task.grade([(problem("1"), box("1" * 2001)), (problem("1"), box("(" * 201 + "1" + ")" * 201))])
    assert [(grade.score, grade.verdict, grade.parsed) for grade in grades] == [(0.0, "wrong", None)] * 2
    assert grades[0].feedback == "the answer has 2001 characters; at most 2000 are read"
    assert grades[1].feedback == "the answer nests 201 brackets; at most 200 are read"
    assert math_task.stats.num_unreadable == before + 2


@pytest.mark.parametrize(("gold", "reason"), [(None, "no gold"), ("", "it is empty"), ("$$", "it is empty")])
def test_without_a_usable_gold_the_answer_stays_ungraded(math_task: MathTask, gold: str | None, reason: str) -> None:
    """An ungraded answer is None, never 0."""
    (grade,) = math_task.grade([(problem(gold), box("1"))])
    assert (grade.score, grade.verdict) == (None, "error")
    assert reason in str(grade.feedback)


def test_a_failing_comparison_is_an_error_not_a_zero(math_task: MathTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the worker's own code raises or dies, the answer stays ungraded, says why, and is asked again next time."""
    from opdkit.tasks.pool import Outcome

    pair = (problem(r"\sqrt{17}"), box("17^{0.5}"))
    monkeypatch.setattr(math_task._pool, "map", lambda requests: [Outcome(status="crash", value="KeyError: 1")])
    (grade,) = math_task.grade([pair])
    assert (grade.score, grade.verdict, grade.feedback) == (None, "error", "the comparison failed: KeyError: 1")
    monkeypatch.undo()
    assert math_task.grade([pair])[0].verdict == "correct"


def test_golds_may_be_boxed_or_in_dollars(math_task: MathTask) -> None:
    """AIME24 ships \\boxed{204}; others ship $..$."""
    golds = [r"\boxed{204}", "$204$", "204.", r"\boxed{\boxed{204}}"]
    assert [grade.score for grade in math_task.grade([(problem(gold), box("204")) for gold in golds])] == [1.0] * 4
    (grade,) = math_task.grade([(problem(r"\boxed{204"), box("204"))])
    assert (grade.verdict, grade.feedback) == ("error", "the gold answer cannot be used: its box never closes")


def test_the_answer_style_is_the_problems(math_task: MathTask) -> None:
    """A boxed answer does not count where an "Answer:" line was asked for; with an unknown style nothing is graded."""
    lines = problem("34", answer_style="answer_line")
    grades = math_task.grade([(lines, "Answer: 34"), (lines, box("34")), (problem("34"), "Answer: 34")])
    assert [grade.verdict for grade in grades] == ["correct", "no_answer", "no_answer"]
    (grade,) = math_task.grade([(problem("34", answer_style="tag"), box("34"))])
    assert grade.score is None and grade.feedback is not None and "answer_style is 'tag'" in grade.feedback


def test_equal_answers_share_one_vote(math_task: MathTask) -> None:
    """For maj@n: right answers vote as the gold, wrong ones by value where they are plain numbers. Wrong expressions
    are not compared with each other, only their spelling is unified."""
    answers = [r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}", "0.50", r"\frac24", r"\sqrt 3", r"\sqrt{3}", ""]
    grades = math_task.grade([(problem(r"\frac{\sqrt{2}}{2}"), box(answer)) for answer in answers])
    assert [grade.parsed for grade in grades] == [r"\frac{\sqrt{2}}{2}"] * 2 + ["1/2"] * 2 + [r"\sqrt{3}"] * 2 + [None]


def test_a_pair_is_compared_once(math_task: MathTask) -> None:
    """1000 equal answers, however spelled, in one batch and the next: one request."""
    before = math_task.stats
    items = [(problem(r"\sqrt{7}"), box(answer)) for answer in ["7^{1/2}", "7^{1/2} ", "$7^{1/2}$", "7^(1/2)"] * 250]
    for _ in range(2):
        assert {grade.verdict for grade in math_task.grade(items)} == {"correct"}
    after = math_task.stats
    assert after.pool.num_requests == before.pool.num_requests + 1
    assert after.num_cached == before.num_cached + 1000
    assert after.num_correct == before.num_correct + 2000


def test_integers_need_no_worker() -> None:
    """The most common answers start no process at all."""
    task = MathTask()
    items = [(problem(str(i)), box(f"{i + i % 2:,}")) for i in range(1000)]
    assert sum(grade.score or 0 for grade in task.grade(items)) == 500
    assert task.stats.pool.num_servers_started == 0
    assert task.stats.num_decided_here == 1000
    task.close()
