"""The arithmetic task: formats, verifiers, splits, seeds and refusals."""

from __future__ import annotations

import itertools

import pytest

from opdkit.errors import UserError
from opdkit.tasks import TASKS
from opdkit.tasks.arithmetic import ALPHABET, MULTIPLIED, VARIANTS, ArithmeticTask, problems, random_solution
from opdkit.types import Problem

SMALL_WORLDS = ["merge-2", "merge-3", "merge-4", "add-1", "add-2"]


def problem(world: str, question: str, gold: str) -> Problem:
    meta = {"world": world, "question": question}
    return Problem(id=question, task="arithmetic", messages=(), gold=gold, meta=meta)


def verdicts(problem: Problem, *answers: str) -> list[tuple[float | None, str, str | None]]:
    grades = ArithmeticTask().grade([(problem, answer) for answer in answers])
    return [(grade.score, grade.verdict, grade.parsed) for grade in grades]


def test_the_merge_example_of_the_specification() -> None:
    """6604 in three merges (ecosystem.md 7a), and by other paths: many solutions are right."""
    merge = problem("merge-4", "6604=", "6")
    right = ["4+6=0;0+0=0;0+6=6", "6+6=2;2+0=2;2+4=6", " 0+4=4;4+6=0;6+0=6\n"]
    assert verdicts(merge, *right) == [(1.0, "correct", "6")] * 3


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("4+6=0;0+0=0;0+6=5", "the last sum is wrong"),
        ("4+6=1;1+0=1;1+5=6", "a wrong sum in the middle, the right last digit"),
        ("6+6=2;2+4=6", "a digit is left over"),
        ("6+6=2;6+0=6;6+4=0", "a digit is used twice"),
        ("4+4=8;8+6=4;4+0=4", "a digit that is not there"),
        ("6+6=2;2+0=2;2+4=6;6+0=6", "one merge too many"),
    ],
)
def test_a_merge_chain_with_a_wrong_step_is_wrong(answer: str, why: str) -> None:
    """Every step is checked, not only the last digit. The vote is the chain, so it never counts with right answers."""
    assert verdicts(problem("merge-4", "6604=", "6"), answer) == [(0.0, "wrong", answer)], why


def test_the_add_example_of_the_specification() -> None:
    """066 + 784 (ecosystem.md 7b). Only the number after the colon is judged, as there."""
    add = problem("add-3", "066+784=", "0850")
    solution = "6+4+0=10,6+8+1=15,0+7+1=08:0850"
    assert random_solution(add, 0) == solution
    assert verdicts(add, solution, "6+4+0=10:0850", "6+4+0=10:0851", "6+4+0=10:850") == [
        (1.0, "correct", "0850"),
        (1.0, "correct", "0850"),
        (0.0, "wrong", "0851"),
        (0.0, "wrong", "850"),
    ]


@pytest.mark.parametrize(
    "text", ["", "6", ";", "4+6=", "4+6=0;", "a" * 100_000, "\u0664+\u0666=\u0660", ":" * 1000, "1:2:3", "\x00", "="]
)
def test_malformed_answers_are_no_answer(text: str) -> None:
    """Hostile text gets a score and never raises. Arabic digits match no format, though int() would read them."""
    for world, question, gold in [("merge-4", "6604=", "6"), ("add-3", "066+784=", "0850")]:
        assert verdicts(problem(world, question, gold), text) == [(0.0, "no_answer", None)]


@pytest.mark.parametrize("world", VARIANTS)
def test_reference_solutions_are_right_and_in_the_alphabet(world: str) -> None:
    """For every world: solutions, fresh and stored, pass the verifier; ALPHABET covers all text."""
    found = problems(world, "train", 20, seed=1)
    answers = [(p, text) for p in found for text in (p.solution or "", random_solution(p, 7), random_solution(p, 8))]
    assert all(grade.score == 1.0 for grade in ArithmeticTask().grade(answers))
    text = "".join(text + p.messages[0]["content"] for p, text in answers)
    assert set(text) <= set(ALPHABET + (MULTIPLIED if world.startswith("multiply") else ""))


def test_a_merge_problem_has_several_solutions() -> None:
    """Fresh demonstrations differ by seed and repeat for the same seed."""
    merge = problems("merge-5", "train", 1, seed=0)[0]
    assert len({random_solution(merge, seed) for seed in range(20)}) > 10
    assert random_solution(merge, 3) == random_solution(merge, 3)


@pytest.mark.parametrize("world", SMALL_WORLDS)
def test_splits_partition_the_world(world: str) -> None:
    """Train and test share nothing and together are everything; about one problem in five is for testing."""
    train, test = (
        [p.messages[0]["content"] for p in problems(world, split, None, seed=5)] for split in ("train", "test")
    )
    num_questions = 10 ** (int(world[-1]) * (2 if world.startswith("add") else 1))
    assert not set(train) & set(test)
    assert len(set(train)) + len(set(test)) == len(train) + len(test) == num_questions
    assert 0.1 < len(test) / num_questions < 0.3


def test_order_is_seeded_and_limit_takes_the_first() -> None:
    """Same seed, same list; another seed, another order of the same ids; a limit is a prefix."""
    full = problems("merge-4", "train", None, seed=3)
    assert problems("merge-4", "train", 50, seed=3) == full[:50]
    other = problems("merge-4", "train", None, seed=4)
    assert [p.id for p in other] != [p.id for p in full]
    assert {p.id for p in other} == {p.id for p in full}
    assert all(p.task == "arithmetic" and p.id == f"arithmetic:merge-4:{p.messages[0]['content']}" for p in full)


def test_order_looks_random() -> None:
    """Neighbours in the order do not resemble each other: first digits of 2000 consecutive problems are spread evenly
    and independent of the digit before (chi-square, 99.9 % bound for 81 degrees of freedom)."""
    first = [int(p.messages[0]["content"][0]) for p in problems("merge-4", "train", 2000, seed=0)]
    counts = dict.fromkeys(itertools.product(range(10), range(10)), 0)
    for pair in itertools.pairwise(first):
        counts[pair] += 1
    expected = len(first) / 100
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 149


def test_a_huge_world_is_drawn_from_without_listing_it() -> None:
    """add-6 has 10**12 problems; 100 of them take milliseconds."""
    assert len({p.id for p in problems("add-6", "test", 100, seed=0)}) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("merge-44", "train", 1, 0),
            r"unknown arithmetic variant 'merge-44', did you mean 'merge-4'\? choices: merge-2",
        ),
        (("sums", "train", 1, 0), "unknown arithmetic variant 'sums'; choices: merge-2"),
        (("merge-4", "tset", 1, 0), r"unknown arithmetic split 'tset', did you mean 'test'\? choices: train, test"),
        (("merge-2", "train", 100, 0), "arithmetic:merge-2:train has 87 problems, 100 were asked for; lower"),
        (("merge-8", "train", None, 0), "draws from 100,000,000 problems; say how many with a limit"),
        (("merge-4", "train", 0, 0), "limit is 0; ask for at least one problem"),
    ],
)
def test_refusals(arguments: tuple[str, str, int | None, int], message: str) -> None:
    """What the user can get wrong, and the sentence that says so."""
    with pytest.raises(UserError, match=message):
        problems(*arguments)


def test_a_foreign_problem_is_refused_and_a_missing_gold_is_not_a_zero() -> None:
    """Another dataset's row under task "arithmetic" is the recipe's fault; no gold means ungraded, not wrong."""
    foreign = Problem(id="row-1", task="arithmetic", messages=(), gold="3")
    with pytest.raises(UserError, match="'row-1' is not a generated one"):
        ArithmeticTask().grade([(foreign, "3")])
    ungraded = Problem(id="x", task="arithmetic", messages=(), gold=None, meta={"world": "merge-2", "question": "12="})
    grade = ArithmeticTask().grade([(ungraded, "1+2=3")])[0]
    assert (grade.score, grade.verdict) == (None, "error")


def test_a_problem_read_from_a_file_is_graded_by_its_question() -> None:
    """`opdkit sample` writes the prompt and the gold, and no `meta`."""
    for question, gold, right, wrong in (
        ("604=", "0", "6+0=6;6+4=0", "6+0=6;6+4=1"),
        ("6+7=", "13", "6+7=13:13", ":14"),
    ):
        problem = Problem(id="f", task="arithmetic", messages=({"role": "user", "content": question},), gold=gold)
        grades = ArithmeticTask().grade([(problem, right), (problem, wrong)])
        assert [grade.score for grade in grades] == [1.0, 0.0]


def test_tasks_are_made_by_name() -> None:
    """TASKS holds every task under its own name; close() may be called twice. Terms of a reward need options."""
    options = {
        "weighted": {"terms": {"a": (1.0, ArithmeticTask())}},
        "format": {"pieces": ["a"]},
        "length": {"free_characters": 1, "max_characters": 2},
    }
    for name, make in TASKS.items():
        task = make(**options.get(name, {}))
        assert task.name == name
        task.close()
        task.close()
