"""Tool use: which calls an answer makes, and when they are the gold's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.tasks.base import Grade
from opdkit.tasks.tool_calls import MAX_CALLS, calls_in, same
from opdkit.tasks.tool_use import MAX_FEEDBACK_CHARACTERS, ToolUseTask
from opdkit.types import Problem

PARITY = Path(__file__).parents[1] / "parity" / "graders.json"
GOLDS = Path(__file__).parents[2].parent / "shared" / "data" / "tooluse" / "test.jsonl"
Calls = list[tuple[str, dict[str, Any]]]

OSLO: Calls = [("getWeather", {"city": "Oslo", "days": 3})]
TWO: Calls = [("send", {"to": "Ann"}), ("send", {"to": "Bob"})]


def gold(calls: Calls) -> str:
    return json.dumps([{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls])


def react(calls: Calls) -> str:
    return "Thought: go\n" + "\n".join(f"Action: {n}\nAction Input: {json.dumps(a)}" for n, a in calls)


def hermes(calls: Calls) -> str:
    return "".join(
        f"I call.\n<tool_call>\n{json.dumps({'name': n, 'arguments': a}, indent=1)}\n</tool_call>\n" for n, a in calls
    )


def openai(calls: Calls) -> str:
    entries = [{"type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    return "```json\n" + json.dumps({"role": "assistant", "tool_calls": entries}) + "\n```\nDone."


def plain(calls: Calls) -> str:
    return "The calls:\n" + json.dumps([{"name": n, "parameters": a} for n, a in calls])


def lines(calls: Calls) -> str:
    return "\n".join(json.dumps({"name": n, "arguments": a}) for n, a in calls)


def inline(calls: Calls) -> str:
    return " then ".join(json.dumps({"name": n, "arguments": a}) for n, a in calls)


WAYS = [react, hermes, openai, plain, lines, inline]


def grade(text: str, asked: str, **options: Any) -> Grade:
    problem = Problem(id="p", task="tool_use", messages=(), gold=asked)
    return ToolUseTask(**options).grade([(problem, text)])[0]


def parity_rows() -> list[dict[str, Any]]:
    cases = {case["id"]: case for case in json.loads(PARITY.read_text())["cases"]}
    return list(cases["pub.graders.tool_use"]["rows"])


@pytest.mark.parametrize("row", parity_rows(), ids=lambda row: row["why"])
def test_published_rows(row: dict[str, Any]) -> None:
    """All 15 rows, of which the published grader gets 9."""
    assert (grade(row["response"], row["gold"]).score == 1.0) == row["expected"]


def test_every_gold_of_the_benchmark_is_won() -> None:
    """All golds score 1 against themselves in every way of writing calls (published: 2 of 68 never can); with a call
    that is missing, made twice, renamed, or given another argument they score 0. The data lie beside the repository."""
    if not GOLDS.exists():
        pytest.skip(f"{GOLDS} is absent: the data sets are not part of the repository")
    problems = load_problems(str(GOLDS), task="tool_use").problems
    assert len(problems) == 34
    right, wrong = [], []
    for problem in problems:
        assert problem.gold is not None
        calls: Calls = [(c["Action"], json.loads(c["Action_Input"])) for c in json.loads(problem.gold)]
        (name, arguments), rest = calls[0], calls[1:]
        right += [(problem, way(calls)) for way in WAYS]
        for corrupted in (
            rest,
            [calls[0], *calls],
            [(f"{name}s", arguments), *rest],
            [(name, {**arguments, "z": 1}), *rest],
        ):
            wrong += [(problem, way(corrupted)) for way in WAYS]
    task = ToolUseTask()
    assert {result.score for result in task.grade(right)} == {1.0}
    assert {result.score for result in task.grade(wrong)} == {0.0}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("calls", [OSLO, TWO, [("maps.search[v2]", {"q": {"a": [1, {"b": None}]}, "s": '} "] \n'})]])
def test_every_way_of_writing_calls(way: Any, calls: Calls) -> None:
    """Nested arguments, braces and quotes inside strings, names with dots and brackets; one changed value is wrong."""
    assert grade(way(calls), gold(calls)).score == 1.0
    name, arguments = calls[0]
    assert grade(way([(name, {**arguments, "extra": 0}), *calls[1:]]), gold(calls)).score == 0.0
    assert grade(way([(f"{name}2", arguments), *calls[1:]]), gold(calls)).score == 0.0
    assert grade(way([*calls, calls[0]]), gold(calls)).score == 0.0  # made twice


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("Action: f\nAction Input: {}", [("f", {})]),
        ("Action: f\nAction Input:", [("f", {})]),
        ("Action: f\nAction Input: None\nObservation: ok", [("f", {})]),
        ("Action: f", [("f", {})]),
        ("**Action:** `f`\n**Action Input:** `x`", [("f", None)]),
        ('Thought: a. Action: f Action Input: {"a": 1} Action: g', [("f", {"a": 1}), ("g", {})]),
        ('Action: f\nAction Input: ```json\n{"a": 1}\n```', [("f", {"a": 1})]),
        ('Action: f\nAction Input:\n\n{\n "a": 1\n}\nThought: done', [("f", {"a": 1})]),
        (
            'Action: f\nAction Input: {"a": "Action: g\\nAction Input: {}"}',
            [("f", {"a": "Action: g\nAction Input: {}"})],
        ),
        ('Action: f\nAction Input: {"a": 1, "a": 2}', [("f", None)]),
        ('Action: f\nAction Input: {"a": NaN}', [("f", None)]),
        ('Action: f\nAction Input: {"a": 1e999}', [("f", None)]),
        ("Action: f\nAction Input: [1]", [("f", None)]),
        ('<think>Action: g\nAction Input: {}</think>Action: f\nAction Input: {"a": 1}', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": {}}', [("f", {})]),  # stopped right behind its JSON
        ('<tool_call>{"name": "f", "argum', [("", None)]),  # cut off
        ('<tool_call>{"tool": "f"}</tool_call>', [("", None)]),
        ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', [("f", {}), ("g", {})]),
        ('{"a": 1}\nI would call nothing.', []),
        ("Reaction: f\nTransaction: 3", []),
        ("Thought: Action: guess would be risky", []),
        (f"Thought:{' ' * 100}Action: guess would be risky", []),
        (f"{'x' * 100}\n  Action: f", [("f", {})]),
        ("Thought: <tool_call> would be risky.\nAction: f", [("f", {})]),
        ("<tool_call>\nf(1)\n</tool_call>", [("", None)]),
        ("Thought: Action: guess would be risky\nAction: f\nAction Input: {}", [("f", {})]),
        ("Thought: Action: guess\nAction: f", [("f", {})]),
        ("I would write Action: NAME and Action Input: {} but nothing fits.", []),
        ("The next Action: f", []),
        ('Action: f\nThought: Action Input: {"a": 0} is wrong\nAction Input: {"a": 1}', [("f", {"a": 1})]),
        ('Thought: go. Action: f\nAction Input: {"a": 1}', [("f", {"a": 1})]),
        ("- **Action**: f\n- **Action Input**: {}", [("f", {})]),
        ("1. Action: f\n2) Action: g", [("f", {}), ("g", {})]),
        ("> Action: f\r\n> Action Input: {}\r\n", [("f", {})]),
        ("Action: f\r\n", [("f", {})]),
        ("", []),
    ],
)
def test_what_is_a_call(text: str, calls: list[tuple[str, dict[str, Any] | None]]) -> None:
    """Pairs of name and arguments as a careful reader finds them; None: they cannot be read, and the call is wrong."""
    from opdkit.tasks.final_text import after_thinking

    assert [(call.name, call.arguments) for call in calls_in(after_thinking(text))] == calls


def test_order_is_free_unless_asked_for() -> None:
    swapped = react(TWO[::-1])
    assert grade(swapped, gold(TWO)).score == 1.0
    result = grade(swapped, gold(TWO), ordered=True)
    assert (result.score, result.feedback) == (0.0, "The calls are not in the order needed.")
    assert grade(react(TWO), gold(TWO), ordered=True).score == 1.0


def test_optional_calls_may_be_left_out() -> None:
    """ToolAlpaca's mark: the call depends on what an earlier one returns, which nobody has seen yet."""
    asked = gold([("get", {"id": 1}), ("[Optional]put", {"id": 1})])
    for name in ("put", "[Optional]put"):
        assert grade(react([("get", {"id": 1}), (name, {"id": 1})]), asked).score == 1.0
        assert grade(react([("get", {"id": 1}), (name, {"id": 1})]), asked, ordered=True).score == 1.0
        assert grade(react([(name, {"id": 1}), ("get", {"id": 1})]), asked, ordered=True).score == 0.0
        assert grade(react([("get", {"id": 1}), (name, {"id": 2})]), asked).score == 0.0
        assert grade(react([(name, {"id": 1})]), asked).score == 0.0
    assert grade(react([("get", {"id": 1})]), asked).score == 1.0


def test_types_matter_unless_tolerated() -> None:
    """1 is 1.0, never true or "1"; tolerant: text that reads as a value is that value, and nothing else is."""
    for said, wanted, strict, tolerant in [
        (1.0, 1, True, True),
        ("1", 1, False, True),
        (1, "1", False, True),
        ("true", True, False, True),
        ("null", None, False, True),
        (True, 1, False, False),
        (0, False, False, False),
        ("Oslo ", "Oslo", False, True),
        ("oslo", "Oslo", False, False),
        ([1, "2"], ["1", 2], False, True),
        ([1, 2], [2, 1], False, False),
        ("[1]", [1], False, False),
        ("1e999", "1e999", True, True),
        ("", None, False, False),
    ]:
        answer, asked = react([("f", {"a": said})]), gold([("f", {"a": wanted})])
        assert grade(answer, asked).score == float(strict), (said, wanted)
        assert grade(answer, asked, tolerant=True).score == float(tolerant), (said, wanted)
    assert same(10**22, tolerant=False) == same(1e22, tolerant=False)


@pytest.mark.parametrize(
    "bad", [None, "", "not JSON", "[{}]", '{"name": 3}', '[{"name": "f", "arguments": "{"}]', "[[1]]"]
)
def test_a_gold_that_cannot_be_read_leaves_the_answer_ungraded(bad: str | None) -> None:
    problem = Problem(id="p", task="tool_use", messages=(), gold=bad)
    (result,) = ToolUseTask().grade([(problem, react(OSLO))])
    assert (result.score, result.verdict) == (None, "error") and result.feedback


def test_no_call_is_right_where_none_is_needed() -> None:
    assert grade("Nothing to do.", "[]").verdict == "correct"
    assert grade(react(OSLO), "[]").verdict == "wrong"
    result = grade("Nothing to do.", gold(OSLO))
    assert (result.score, result.verdict, result.parsed) == (0.0, "no_answer", None)


def test_feedback_holds_nothing_of_the_gold() -> None:
    """Secret names and values of the gold occur in no feedback, whatever is wrong with the answer."""
    secret = [("secretTool", {"secretKey": "secretValue"}), ("shown", {"secretKey": "secretOther", "n": 8713})]
    answers = [
        "no call",
        react([("shown", {"n": 1})]),
        react([("other", {})]),
        react([("shown", {"n": 1}), ("shown", {"n": 1})]),
        "Action: shown\nAction Input: {broken",
        hermes([("shown", {"n": 1})]) + '<tool_call>{"na',
    ]
    for ordered in (False, True):
        for answer in answers:
            feedback = grade(answer, gold(secret), ordered=ordered).feedback
            assert feedback and "ecret" not in feedback and "8713" not in feedback
    partly = grade(react(TWO[:1]), gold(TWO)).feedback
    assert partly == "A call is missing."
    assert grade(react([*TWO, TWO[0]]), gold(TWO)).feedback == "Call 3 (send): it was made already."


def test_reveal_reproduces_the_published_leak() -> None:
    """Only where asked for; within limits, whatever the answer."""
    feedback = grade(react([("getNews", {})]), gold(OSLO), feedback="reveal").feedback
    assert feedback == (
        "Actions mismatch: predicted ['getNews'], expected ['getWeather']; "
        "Action inputs mismatch: predicted [{}], expected [{'city': 'Oslo', 'days': 3}]"
    )
    long = grade(react([("f", {"a": "x" * 10_000})]), gold(OSLO), feedback="reveal").feedback
    assert long is not None and len(long) <= MAX_FEEDBACK_CHARACTERS
    assert grade(react(OSLO), gold(OSLO), feedback="reveal").feedback is None
    with pytest.raises(UserError, match="feedback is 'all'; choices: outcome, reveal"):
        ToolUseTask(feedback="all")  # type: ignore[arg-type]


def test_equal_calls_are_one_vote() -> None:
    """`parsed` does not depend on key order or on how calls are written; it does on which calls they are."""
    votes = {grade(way([("f", {"b": 1, "a": 2})]), gold(OSLO)).parsed for way in WAYS}
    votes.add(grade(react([("f", {"a": 2, "b": 1})]), gold(OSLO)).parsed)
    assert votes == {'[{"arguments": {"a": 2, "b": 1}, "name": "f"}]'}


HOSTILE = (
    *("[", "{", '{"', '{"a":', '{"a":[1,', "Action: a ", 'Action: a\nAction Input: {"k":"', "Action Input:{", "*", " "),
    *("\n", "<tool_call>", "<tool_call>{", "```\n{\n", '{ "name" ', "<think>", "9", '"'),
    'Action: a Action Input: {"k":[1,',
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_megabyte_of_anything_takes_a_moment(piece: str) -> None:
    """Time is linear and JSON bounded in depth, digits and attempts. 5 s are 20 times what is needed here."""
    hostile = piece * (1_000_000 // len(piece))
    started = time.monotonic()
    for around in (hostile, f'Action: f\nAction Input: {{"a": {hostile}', f"<tool_call>{hostile}</tool_call>"):
        assert grade(around, gold(OSLO)).score == 0.0
        assert len(calls_in(around)) <= MAX_CALLS
    assert time.monotonic() - started < 5.0


def test_deep_json_is_refused_not_followed() -> None:
    """33 levels are too many, 20 are not; 100000 do not end the process."""
    for depth, right in ((20, True), (40, False), (100_000, False)):
        value = "[" * depth + "]" * depth
        answer = f'Action: f\nAction Input: {{"a": {value}}}'
        if depth < 100:
            asked = json.dumps([{"name": "f", "arguments": {"a": json.loads(value)}}])
            result = grade(answer, asked)
            assert (result.score == 1.0) == right
        else:
            assert grade(answer, gold(OSLO)).score == 0.0
