"""Multiple choice: which option an answer names, and whether it is written as the prompt asks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from opdkit.data.readers import load_problems
from opdkit.tasks.multiple_choice import ChoiceGrade, MultipleChoiceTask, options_of
from opdkit.types import Problem

PARITY = Path(__file__).parents[1] / "parity" / "graders.json"
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "sciknoweval_chemistry"
OPTIONS = "Which?\n\nA: the heart\nB: CCO\nC: cco\nD: The liver.\nPlease reason step by step."


def problem(gold: str | None = "C", prompt: str = "", **meta: Any) -> Problem:
    messages = ({"role": "user", "content": prompt},) if prompt else ()
    return Problem(id="p", task="multiple_choice", messages=messages, gold=gold, meta=meta)


def grade(text: str, asked: Problem, *, strict: bool = False) -> ChoiceGrade:
    (result,) = MultipleChoiceTask(strict=strict).grade([(asked, text)])
    assert isinstance(result, ChoiceGrade)
    return result


def parity_rows() -> list[dict[str, Any]]:
    cases = {case["id"]: case for case in json.loads(PARITY.read_text())["cases"]}
    return list(cases["pub.graders.multiple_choice"]["rows"])


@pytest.mark.parametrize("row", parity_rows(), ids=lambda row: row["why"])
def test_published_rows(row: dict[str, Any]) -> None:
    """All 15 rows: the verdict, and `incorrect_format` with its right meaning (published: inverted)."""
    result = grade(row["response"], problem(row["gold"]))
    assert (result.score == 1.0) == row["expected"]
    assert result.incorrect_format is not row["format_ok"]


@pytest.mark.parametrize("row", parity_rows(), ids=lambda row: row["why"])
def test_strict_is_the_published_rule_inside_the_tags(row: dict[str, Any]) -> None:
    """strict: right and well formed. That is MOPD's rule, but for a bare letter without tags, which it accepts."""
    result = grade(row["response"], problem(row["gold"]), strict=True)
    assert (result.score == 1.0) == (row["expected"] and row["format_ok"])
    assert row["why"] == "no tags" or (result.score == 1.0) == row["graders"]["mopd_mcq"]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("the heart", "A"),
        ("The Heart", "A"),
        ("D: The liver.", "D"),
        ("(d) the liver", "D"),
        ("CCO", "B"),  # molecules are told apart by case
        ("cco", "C"),
        ("CcO", None),  # either
        ("Option C", "C"),
        ("The correct answer is (B).", "B"),
        ("**B**", "B"),
        ("$\\text{B}$", "B"),
        ("C, because D is polar", "C"),
        ("D (The liver.)", "D"),
        ("D \u2014 the liver", "D"),
        ("D (the heart)", None),
        ("A (the heart, not D)", None),
        ("D: the heart", None),  # the letter and the text contradict each other
        ("A: the heart, D: The liver.", None),
        ("A or B", None),
        ("(A) and (D)", None),
        ("Both A and B", None),
        ("All of them", None),
        ("E", None),
        ("a heart", None),
        ("", None),
    ],
)
def test_what_names_an_option(said: str, letter: str | None) -> None:
    """One option by letter, by text, or by both; never by the first letter of a word."""
    result = grade(f"<answer>{said}</answer>", problem("A", OPTIONS))
    found = result.parsed if result.parsed in tuple("ABCD") else None
    assert found == letter
    assert result.verdict == ("no_answer" if not said else "correct" if letter == "A" else "wrong")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>A</answer> but then <answer>B", "A"),  # the last complete one
        ("so <answer>\nB", "B"),  # cut at the stop token
        ("so <answer>Because", None),
        ("<answer><answer>B</answer></answer>", "B"),
        ("<ANSWER>B</Answer>", "B"),
        ("I say \\boxed{B}.", "B"),
        ("Final answer: B", "B"),
        ("The answer is not A, the answer is **B**.", "B"),
        ("The answer is B because of the charge.", "B"),
        ("the answer is a matter of taste", None),
        ("<think>the answer is A</think>The answer is B.", "B"),
        ("<think><answer>A</answer></think> I do not know.", None),
        ("<think>it never ends <answer>A</answer>", None),
        ("A or B, who knows", None),
        ("", None),
    ],
)
def test_where_the_answer_is(text: str, letter: str | None) -> None:
    """Tags, then boxes, lines and phrases, never in the thinking. Not shown: every phrase a model may use."""
    result = grade(text, problem("D"))
    assert result.parsed == letter
    assert result.verdict == ("wrong" if letter else "no_answer")


@pytest.mark.parametrize(
    ("prompt", "well_formed"),
    [
        ("Put the letter into <answer></answer>.", "<answer>B</answer>"),
        ("Put the letter into \\boxed{}.", "\\boxed{B}"),
        ("End with a line 'Answer: $LETTER'.", "Answer: B"),
    ],
)
def test_the_prompt_says_which_format_is_right(prompt: str, well_formed: str) -> None:
    """GPQA prompts want a line or a box, SciKnowEval's want tags; strict holds an answer to what it was asked."""
    for text in ("<answer>B</answer>", "\\boxed{B}", "Answer: B"):
        result = grade(text, problem("B", prompt))
        assert result.score == 1.0 and result.incorrect_format is (text != well_formed)
        assert grade(text, problem("B", prompt), strict=True).score == float(text == well_formed)


def test_options_come_from_the_row_or_the_question() -> None:
    """A list or table in the row wins; of lettered lines, the last list; else A to D. Two and ten options work."""
    assert list(options_of(problem(options=["x", "y"]))) == ["A", "B"]
    assert options_of(problem(options={"A": "x", "E": "y"})) == {"A": "x", "E": "y"}
    lines = "A: not an option\nThe options:\n" + "\n".join(f"({c}) text {c}" for c in "ABCDEFGHIJ")
    assert list(options_of(problem(prompt=lines))) == list("ABCDEFGHIJ")
    assert list(options_of(problem(prompt="A. A sentence."))) == list("ABCD")
    assert grade("<answer>J</answer>", problem("J", lines)).score == 1.0
    assert grade("<answer>text J</answer>", problem("J", lines)).score == 1.0


@pytest.mark.parametrize("gold", [None, "F", "A and B"])
def test_a_gold_that_is_no_option_leaves_the_answer_ungraded(gold: str | None) -> None:
    """Not a zero: no answer could have won."""
    (result,) = MultipleChoiceTask().grade([(problem(gold), "<answer>A</answer>")])
    assert (result.score, result.verdict) == (None, "error")


def test_feedback_is_about_the_format_alone() -> None:
    """A well-formed wrong answer gets none, so the right letter cannot be read off it."""
    assert grade("<answer>B</answer>", problem("C")).feedback is None
    for gold in "ABCD":
        told = grade("I think it is the second", problem(gold)).feedback
        assert told == "The answer must be one letter out of A, B, C, D, alone, between <answer> and </answer>."


@pytest.mark.parametrize(
    "text",
    [
        "<answer>",
        "</answer>",
        "<answer>A",
        "\\boxed{",
        "answer is ",
        "answer:",
        "*",
        "(",
        "\n",
        " ",
        "A: ",
        "<think>",
        "A ",
    ],
)
def test_a_megabyte_of_anything_takes_a_moment(text: str) -> None:
    """No text makes reading slower than linear. Does not bound the machine's speed: 5 s are 50 times what is needed."""
    hostile = text * (1_000_000 // len(text))
    started = time.monotonic()
    for around in (hostile, f"<answer>{hostile}</answer>"):
        grade(around, problem("C", OPTIONS))
    assert time.monotonic() - started < 5.0


MARKUP = [
    "{}",
    "${}$",
    "$${}$$",
    "**{}**",
    "*{}*",
    "`{}`",
    '"{}"',
    "'{}'",
    "\u201c{}\u201d",
    "\\({}\\)",
    "\\text{{{}}}",
    "**{}.**",
]
PHYSICS = [  # as such data have it: mathematics, units that are letters, primes, quotations, emphasis
    ["$5 \\mu C$", "$-5 \\mu C$", "5 \\mu A", "zero"],
    ["$x$ and $y$", "$y$ and $x$", "$x$", "x"],
    ["$C$", "$\\mu C$", "the charge $C$", "25 C"],
    ["*E. coli*", "*C. elegans*", "D-glucose", "**both** A and B"],
    ["5'-ATG-3'", "3'-ATG-5'", "5'", "5"],
    ["`a`", "a", "`a` or `b`", '"a"'],
    ["$\\frac{1}{2} m v^{2}$", "$m g h$.", "\\(k T\\)", "\\textbf{none} of them"],
    ["the so-called 'heat death'", "'heat' death", 'a "cold" start', '"cold"'],
    ["37 C", "37 D", "$37^\\circ C$", "$37^\\circ D$"],
    ["$\\vec{A} \\cdot \\vec{B}$", "$A$, $B$ and $C$", "$A B$", "f(x) = A + D"],
]


def clashes(texts: list[str], said: str, own: str) -> bool:
    """Whether these words are, within marks, those of another option too, or a letter: then nobody can tell."""
    others = [text for text in texts if own in text and text in said and text != own]
    return bool(others) or (said.strip("*$`\"'.") in tuple("ABCD") and said != own)


def assert_own_texts_are_accepted(asked: list[Problem]) -> int:
    """Every option of every problem, in all markup, by its text alone and after its letter: right where it is the gold,
    wrong where any other is. Returns the number of answers."""
    items: list[tuple[Problem, str]] = []
    wanted: list[tuple[str, str]] = []
    for one in asked:
        options = {letter: " ".join(str(text).split()) for letter, text in options_of(one).items()}
        texts = list(options.values())
        for letter, text in options.items():
            if texts.count(text) > 1:
                continue
            written = [markup.format(text) for markup in MARKUP]
            said = [words for words in written if not clashes(texts, words, text)]
            said += [f"The answer is {text}", f"Answer: {text}."] if said else []
            said += [f"{letter}: {words}" for words in written] + [f"**{letter}**: {text}", f"({letter}) {text}"]
            items += [(one, f"<answer>{words}</answer>") for words in said]
            wanted += [(letter, words) for words in said]
    results = MultipleChoiceTask().grade(items)
    for (one, _), (letter, words), result in zip(items, wanted, results, strict=True):
        assert (result.parsed, words, one.meta) == (letter, words, one.meta)
        assert result.score == float(letter == one.gold)
    return len(items)


@pytest.mark.parametrize("options", PHYSICS, ids=str)
def test_an_option_s_own_text_is_its_name_whatever_it_begins_or_ends_with(options: list[str]) -> None:
    """`$`, `*`, backticks, quotes and primes at an end belong to the text; the C of \\mu C is no letter."""
    for gold in "ABCD":
        assert assert_own_texts_are_accepted([problem(gold, options=options)]) > 4 * len(MARKUP)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A: about 5 \\mu C", "A"),
        ("A: it is $Q = C$", "A"),
        ("A: 37 C", "A"),
        ("A: 37 \u00b0C.", "A"),
        ("A: CC(C)C", "A"),
        ("A (the charge is 5 \\mu C)", "A"),
        ("A: the charge, not $D$", None),
        ("A: the charge, or **D**", None),
        ("5 \\mu C", None),
        ("D-fructose", None),  # no option, and no letter
    ],
)
def test_units_and_mathematics_hold_no_letter(said: str, letter: str | None) -> None:
    asked = problem("A", options=["$5 \\mu F$", "x", "y", "D-glucose"])
    assert grade(f"<answer>{said}</answer>", asked).parsed == letter


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_of_sciknoweval_is_won_by_letter_and_by_text(split: str) -> None:
    """All golds against themselves, and every other option refused. The data lie beside the repository."""
    path = DATA / f"{split}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent: the data sets are not part of the repository")
    task = MultipleChoiceTask()
    problems = load_problems(str(path), task="multiple_choice").problems
    items = [(asked, letter, text) for asked in problems for letter, text in options_of(asked).items()]
    assert len(items) == 4 * len(problems)
    by_letter = task.grade([(asked, f"<answer>\n{letter}\n</answer>") for asked, letter, _ in items])
    assert [result.score for result in by_letter] == [float(asked.gold == letter) for asked, letter, _ in items]
    by_text = task.grade([(asked, f"<answer>{letter}: {text}</answer>") for asked, letter, text in items])
    assert [result.score for result in by_text] == [result.score for result in by_letter]
    assert assert_own_texts_are_accepted(list(problems)) > 20 * len(items)
