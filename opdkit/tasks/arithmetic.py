"""Generated arithmetic problems, with exact verifiers and reference solutions. K = digits per number.

    merge-K   6604=      ->  4+6=0;0+0=0;0+6=6                    K = 2 .. 8, many valid solutions
        Replace any two remaining digits by their sum modulo 10, K - 1 times, until one digit is left.
    add-K     066+784=   ->  6+4+0=10,6+8+1=15,0+7+1=08:0850      K = 1 .. 6, one solution
        Column by column from the right, "digit+digit+carry=two-digit sum"; after the colon the sum in K + 1 digits.
    multiply-K  17*08=   ->  136                                  K = 1 .. 4, one solution: for models with a calculator

More digits are harder. The problems of a variant come in a seeded pseudo-random order, so the first n of a split are
a random sample of it, however many there are. Train and test are disjoint by construction: the digest of the
problem's text decides which split it belongs to.
"""

from __future__ import annotations

import difflib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from opdkit.errors import UserError
from opdkit.tasks.base import Grade
from opdkit.types import Problem, seed_from

VARIANTS = (
    *(f"merge-{k}" for k in range(2, 9)),
    *(f"add-{k}" for k in range(1, 7)),
    *(f"multiply-{k}" for k in range(1, 5)),
)
SPLITS = ("train", "test")
# Every character of every question and solution but those of multiply-K; a character tokenizer needs no other.
ALPHABET = "0123456789+=;,:"
MULTIPLIED = "*"

GENERATED = "arithmetic:"
_TEST_SHARE = 5  # one problem in five is a test problem
_MAX_UNLIMITED = 100_000  # more of them without a limit is more likely a slip than a wish
_NUM_ROUNDS = 6  # of the permutation
_MERGE_ANSWER = re.compile(r"[0-9]\+[0-9]=[0-9](?:;[0-9]\+[0-9]=[0-9])*")
_QUESTION = re.compile(r"[0-9]+(?:(?P<added>\+[0-9]+)|(?P<multiplied>\*[0-9]+))?=")
_ADD_ANSWER = re.compile(r"[0-9+=,]*:([0-9]+)")


def parts_of(source: str) -> tuple[str, str]:
    """(variant, split) of "arithmetic:VARIANT:SPLIT". Raises UserError for a part that is missing or unknown."""
    variant, colon, split = source.removeprefix(GENERATED).partition(":")
    if not (variant and colon and split):
        raise UserError(f'{source} is incomplete: write "arithmetic:VARIANT:SPLIT", e.g. "arithmetic:merge-4:test"')
    _require_known("variant", variant, VARIANTS)
    _require_known("split", split, SPLITS)
    return variant, split


def problems(variant: str, split: str, limit: int | None, seed: int) -> list[Problem]:
    """The first `limit` problems of the split in the order of `seed`, each with a seeded reference solution.

    UserError for an unknown variant or split, and when fewer than `limit` exist (the message says how many).
    """
    _require_known("variant", variant, VARIANTS)
    _require_known("split", split, SPLITS)
    num_questions = 10 ** _num_digits(variant)
    if limit is not None and limit < 1:
        raise UserError(f"arithmetic:{variant}:{split}: limit is {limit}; ask for at least one problem")
    if limit is None and num_questions > _MAX_UNLIMITED:
        raise UserError(
            f"arithmetic:{variant}:{split} draws from {num_questions:,} problems; say how many with a limit"
        )
    found = list(itertools.islice(walk(variant, split, seed), limit))
    if limit is not None and len(found) < limit:
        raise UserError(
            f"arithmetic:{variant}:{split} has {len(found):,} problems, {limit:,} were asked for; lower the limit"
        )
    return found


def walk(variant: str, split: str, seed: int) -> Iterator[Problem]:
    """Every problem of the split once, in the order of `seed`; made as they are asked for."""
    for index in _permutation(_num_digits(variant), seed):
        question = _question(variant, index)
        if _split_of(variant, question) == split:
            yield _problem(variant, question, seed)


def random_solution(problem: Problem, seed: int) -> str:
    """A valid solution of an arithmetic problem, uniform over the choices at every step; the same for the same seed."""
    question = problem.meta["question"]
    if problem.meta["world"].startswith("add-"):
        return _add_solution(question)
    if problem.meta["world"].startswith("multiply-"):
        return str(problem.gold)
    rng = random.Random(seed_from("arithmetic", problem.id, seed))
    digits = [int(character) for character in question.rstrip("=")]
    steps = []
    while len(digits) > 1:
        first, second = (digits.pop(rng.randrange(len(digits))) for _ in range(2))
        digits.append((first + second) % 10)
        steps.append(f"{first}+{second}={digits[-1]}")
    return ";".join(steps)


def wrong_solution(problem: Problem, seed: int) -> str:
    """An attempt that is graded wrong, the same for the same seed: in half of them one step slips and all that follows
    from it is consistent, in the other half up to three digits anywhere are other ones."""
    rng = random.Random(seed_from("arithmetic wrong", problem.id, seed))
    while True:
        if rng.random() < 0.5 and not problem.meta["world"].startswith("multiply-"):
            attempt = _slip(problem, rng)
        else:
            attempt = _other_digits(random_solution(problem, rng.getrandbits(32)), rng)
        if _grade(problem, attempt).verdict == "wrong":
            return attempt


class ArithmeticTask:
    """Exact verification. merge-K: every step must be valid. add-K: the number after the colon must be the sum.
    multiply-K: the product, and nothing else.

    `parsed` is the final answer; for a merge chain with a wrong step, whose last digit proves nothing, it is the chain
    itself, so that equal `parsed` always means equal score.
    """

    name = "arithmetic"

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [_grade(problem, text.strip()) for problem, text in items]

    def close(self) -> None:
        """Nothing to release."""


def _grade(problem: Problem, text: str) -> Grade:
    if problem.gold is None:
        return Grade(score=None, verdict="error", feedback="the problem has no gold answer")
    # A file of sampled answers (`opdkit sample`) has no `meta`; its prompt is the question.
    question = problem.meta.get("question") or (problem.messages[-1]["content"] if problem.messages else "")
    shape = _QUESTION.fullmatch(question)
    if shape is None:
        raise UserError(f'problem {problem.id!r} is not a generated one; task "arithmetic" grades only its own')
    if shape["added"]:
        match = _ADD_ANSWER.fullmatch(text)
        if match is None:
            return Grade(score=0.0, verdict="no_answer")
        parsed = match.group(1)
        correct = parsed == problem.gold
    elif shape["multiplied"]:
        if not text.isdecimal():
            return Grade(score=0.0, verdict="no_answer")
        parsed, correct = text, text == problem.gold
    else:
        if _MERGE_ANSWER.fullmatch(text) is None:
            return Grade(score=0.0, verdict="no_answer")
        correct = _is_valid_merge(question, text)
        parsed = text[-1] if correct else text
    return Grade(score=float(correct), verdict="correct" if correct else "wrong", parsed=parsed)


def _is_valid_merge(question: str, chain: str) -> bool:
    remaining = list(question.rstrip("="))
    for step in chain.split(";"):
        first, second, result = step[0], step[2], step[4]
        for digit in (first, second):
            if digit not in remaining:
                return False
            remaining.remove(digit)
        if int(result) != (int(first) + int(second)) % 10:
            return False
        remaining.append(result)
    return len(remaining) == 1


def _problem(variant: str, question: str, seed: int) -> Problem:
    if variant.startswith("add-"):
        gold = _add_solution(question).split(":")[1]
    elif variant.startswith("multiply-"):
        left, right = question.rstrip("=").split("*")
        gold = str(int(left) * int(right))
    else:
        gold = str(sum(int(character) for character in question.rstrip("=")) % 10)
    problem = Problem(
        id=f"arithmetic:{variant}:{question}",
        task="arithmetic",
        messages=({"role": "user", "content": question},),
        gold=gold,
        meta={"world": variant, "question": question},
    )
    return replace(problem, solution=random_solution(problem, seed))


def _add_solution(question: str, slips: Mapping[int, int] | None = None) -> str:
    """`slips`: column, counted from the right -> what is added to its total by mistake."""
    left, right = question.rstrip("=").split("+")
    carry, columns, digits = 0, [], ""
    for column, (a, b) in enumerate(zip(reversed(left), reversed(right), strict=True)):
        total = (int(a) + int(b) + carry + (slips or {}).get(column, 0)) % 20
        columns.append(f"{a}+{b}+{carry}={total:02d}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return f"{','.join(columns)}:{carry}{digits}"


def _slip(problem: Problem, rng: random.Random) -> str:
    question = problem.meta["question"]
    if problem.meta["world"].startswith("add-"):
        num_columns = _num_digits(problem.meta["world"]) // 2
        return _add_solution(question, {rng.randrange(num_columns): rng.randrange(1, 20)})
    digits = list(question.rstrip("="))
    steps: list[str] = []
    slipping = rng.randrange(len(digits) - 1)
    while len(digits) > 1:
        first, second = (digits.pop(rng.randrange(len(digits))) for _ in range(2))
        off = rng.randrange(1, 10) if len(steps) == slipping else 0
        digits.append(str((int(first) + int(second) + off) % 10))
        steps.append(f"{first}+{second}={digits[-1]}")
    return ";".join(steps)


def _other_digits(solution: str, rng: random.Random) -> str:
    characters = list(solution)
    places = [place for place, character in enumerate(characters) if character.isdigit()]
    for place in rng.sample(places, min(rng.randint(1, 3), len(places))):
        characters[place] = rng.choice([digit for digit in "0123456789" if digit != characters[place]])
    return "".join(characters)


def _question(variant: str, index: int) -> str:
    digits = f"{index:0{_num_digits(variant)}d}"
    if variant.startswith("add-"):
        half = len(digits) // 2
        return f"{digits[:half]}+{digits[half:]}="
    if variant.startswith("multiply-"):
        half = len(digits) // 2
        return f"{digits[:half]}*{digits[half:]}="
    return f"{digits}="


def _num_digits(variant: str) -> int:
    """Digits that name one problem of the variant."""
    name, k = variant.split("-")
    return int(k) * (1 if name == "merge" else 2)


def _split_of(variant: str, question: str) -> str:
    return "test" if seed_from("arithmetic split", variant, question) % _TEST_SHARE == 0 else "train"


def _permutation(num_digits: int, seed: int) -> Iterator[int]:
    """All numbers of `num_digits` decimal digits, each once, in an order given by `seed`.

    A Feistel network with addition modulo 10**k in place of xor: a bijection whatever the round function, so even a
    variant of 10**12 problems is walked in random order without being held in memory.
    """
    num_low = num_digits // 2
    low_size, high_size = 10**num_low, 10 ** (num_digits - num_low)
    for index in range(low_size * high_size):
        high, low = divmod(index, low_size)
        for round_number in range(_NUM_ROUNDS):
            high = (high + seed_from("arithmetic order", seed, round_number, "high", low)) % high_size
            low = (low + seed_from("arithmetic order", seed, round_number, "low", high)) % low_size
        yield high * low_size + low


def _require_known(what: str, name: str, choices: tuple[str, ...]) -> None:
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    raise UserError(f"unknown arithmetic {what} {name!r}{hint} choices: {', '.join(choices)}")
