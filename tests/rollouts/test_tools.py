"""Tool calls as four families of models write them, and whether they fit a schema."""

import pytest

from opdkit.rollouts.environments.schema import call_fault, tool_faults
from opdkit.rollouts.tools import parse_calls
from opdkit.tasks.tool_calls import Call

HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
ONE = ("f", {"x": 1})
HARMONY = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("call_format", "text", "calls"),
    [
        ("hermes", HERMES, [ONE]),
        ("hermes", f"Let me see.\n{HERMES}\n{HERMES}", [ONE] * 2),
        ("hermes", f"<think>\n{HERMES}\n</think>\n\n391", []),
        ("hermes", f"<think>\nhm</think>\n\n{HERMES}", [ONE]),
        ("hermes", f"<think>\n{HERMES}", []),  # a thought that never ends
        ("hermes", "I could write <tool_call> here.", []),
        ("hermes", HERMES + '<tool_call>\n{"name": "g", "arg', [ONE, ("g", None)]),
        ("hermes", '<tool_call>\n{"name": "g", "arguments": {"x', [("g", None)]),
        ("hermes", "<tool_call>", [("", None)]),
        ("hermes", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>", [ONE]),
        ("hermes", "<tool_call>\n<function=f>\n<parameter=x>\n1", [("f", None)]),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', [ONE]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', [ONE]),
        ("llama3", 'It is {"name": "f", "parameters": {"x": 1}}', []),
        ("llama3", '{"name": "f", "parameters": {"x": 1}} is what I call', []),
        ("llama3", '{"name": "f", "parameters": {"x', [("f", None)]),
        ("llama3", '{"name": "Bob", "age": 3}', []),
        ("llama3", "{1, 2, 3}", []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]', [ONE, ("g", {})]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}', [ONE]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "argu', [("f", None)]),
        ("harmony", HARMONY + '{"x": 1}', [ONE]),
        ("harmony", "<|channel|>analysis<|message|>to=functions.f<|end|>" + HARMONY + '{"x": 1}', [ONE]),
        ("harmony", HARMONY + '{"x', [("f", None)]),
        ("harmony", "<|channel|>final<|message|>391", []),
    ],
)  # fmt: skip
def test_calls(call_format, text: str, calls: list) -> None:
    parsed = parse_calls(text, call_format)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert [call.name for call in parsed.malformed] == [name for name, arguments in calls if arguments is None]
    assert len({call.id for call in parsed.calls}) == len(parsed.calls)


def test_a_prompt_may_have_opened_the_thought() -> None:
    assert not parse_calls(HERMES, "hermes", in_thought=True).calls
    assert parse_calls(f"hm</think>{HERMES}", "hermes", in_thought=True).calls


def test_ids() -> None:
    """What the model calls a call is kept; two of one name, and what is no name, are called by us."""
    own = '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "f", "arguments": {}, "id": "%s"}]'
    assert [c.id for c in parse_calls(own % "abcdefghi", "mistral", turn=2).calls] == ["abcdefghi", "t0002c001"]
    assert [c.id for c in parse_calls(own % "<|im_end|>", "mistral").calls] == ["abcdefghi", "t0000c001"]
    # Mistral's template refuses ids of another length, and a model may write one of ours.
    calls = parse_calls("[TOOL_CALLS]f[CALL_ID]t0000c001[ARGS]{}[TOOL_CALLS]f[CALL_ID]short[ARGS]{}", "mistral").calls
    assert [c.id for c in calls] == ["t0000c001", "t0000c002"]


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "units": {"enum": ["C", "F"]},
        "where": {"type": "array", "items": {"$ref": "#/$defs/place"}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"city": "Oslo", "days": 3.0, "units": "C", "where": [{"x": 1}], "note": None}, None),
        ({}, "the argument city is missing"),
        ({"city": 3}, "city must be a string, not 3"),
        ({"city": ""}, "city must have at least 1 characters, not 0"),
        ({"city": "Oslo", "days": True}, "days must be an integer, not true"),
        ({"city": "Oslo", "days": 10}, "days must be at most 9, not 10"),
        ({"city": "Oslo", "units": "K"}, 'units must be one of "C", "F", not "K"'),
        ({"city": "Oslo", "where": [{"x": 1}, {}]}, "the argument where[1].x is missing"),
        ({"city": "Oslo", "note": 3}, "note must be a string, not 3"),
        ({"city": "Oslo", "day": 3}, "there is no argument 'day'; the arguments are city, days, units, where, note"),
    ],
)
def test_arguments_are_checked(arguments: dict, fault: str | None) -> None:
    assert list(tool_faults([WEATHER])) == []
    said = call_fault(Call("weather", arguments), [WEATHER])
    assert said == (None if fault is None else f"error: the call of weather does not fit: {fault}")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"type": "object", "properties": {"what": {"type": "text"}}}, "'text' is no type of JSON"),
        ({"type": "object", "properties": {"what": {"pattern": "a*"}}}, "'pattern' is nothing that calls are checked"),
        ({"type": "string"}, "no schema of an object"),
        ({"type": "object", "properties": {"what": {"$ref": "#/$defs/none"}}}, "leads nowhere"),
        ({"type": "object", "properties": {}, "required": "what"}, "required is no list"),
    ],
)
def test_bad_schemas(parameters: dict, sentence: str) -> None:
    (fault,) = tool_faults([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert sentence in fault


def test_names_of_tools() -> None:
    named = [{"type": "function", "function": {"name": name}} for name in ("f", "f", "<|im_end|>")]
    faults = list(tool_faults([*named, {"name": "g"}]))
    assert [fault.split(";")[0][:40] for fault in faults] == [
        "two tools have the name f, and a call co",
        "tool 2 has the name '<|im_end|>'",
        'tool 3 is no {"type": "function", "funct',
    ]
