"""Tools as OpenAI function schemas: whether they can be offered, and whether a call fits.

Of JSON Schema, what function schemas are written in: type, enum, const, properties, required, additionalProperties,
items, anyOf, oneOf, allOf, $ref into $defs, and bounds of numbers, texts and lists. A tool whose schema says more is
refused when it is read, so nothing is left unchecked in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opdkit.rollouts.environments.base import Tool
from opdkit.tasks.tool_calls import Call, same

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_DEPTH = 32
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_BOUNDS = {
    "minimum": ("at least", lambda value, bound: value >= bound),
    "maximum": ("at most", lambda value, bound: value <= bound),
    "exclusiveMinimum": ("above", lambda value, bound: value > bound),
    "exclusiveMaximum": ("below", lambda value, bound: value < bound),
}
_SIZES = {"minLength": "at least", "maxLength": "at most", "minItems": "at least", "maxItems": "at most"}
_CHECKED = {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "$ref", "$defs", "nullable"),
    *("anyOf", "oneOf", "allOf", *_BOUNDS, *_SIZES),
}
_SAID = {"title", "description", "default", "examples", "format", "$schema", "strict", "deprecated", "return", "$id"}


def name_of(tool: Tool) -> str:
    return str(tool["function"]["name"])


def tool_faults(tools: Sequence[Any]) -> Iterator[str]:
    """A sentence for each thing that is wrong with what an environment offers."""
    seen: set[str] = set()
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            yield f'tool {place} is no {{"type": "function", "function": {{...}}}}'
            continue
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield f"tool {place} has the name {str(name)[:80]!r}; a name is 1 to 64 letters, digits, _, - or ."
            continue
        if name in seen:
            yield f"two tools have the name {name}, and a call could mean either; rename one"
        seen.add(name)
        parameters = function.get("parameters", {"type": "object", "properties": {}})
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            yield f"the parameters of the tool {name} are no schema of an object"
            continue
        try:
            json.dumps(tool, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            yield f"the tool {name} cannot be written as JSON: {error}"
            continue
        yield from (f"the schema of the tool {name}: {fault}" for fault in _schema_faults(parameters, parameters, 0))


def call_fault(call: Call, tools: Sequence[Tool]) -> str | None:
    """Why a tool cannot take the call, as a sentence for the model; None: it can."""
    known = {name_of(tool): tool for tool in tools}
    if call.fault is not None:
        of = f" of {call.name}" if call.name else ""
        return f"error: the call{of} cannot be read: {call.fault}"
    if call.name not in known:
        return f"error: there is no tool {call.name[:80]!r}; the tools are {', '.join(known)}"
    parameters = known[call.name]["function"].get("parameters") or {"type": "object", "properties": {}}
    fault = next(_faults(call.arguments, parameters, parameters, "", 0), None)
    if fault is None:
        unknown = sorted((call.arguments or {}).keys() - parameters.get("properties", {}).keys())
        if unknown and not parameters.get("additionalProperties"):
            takes = ", ".join(parameters.get("properties", {})) or "none"
            fault = f"there is no argument {unknown[0][:80]!r}; the arguments are {takes}"
    return None if fault is None else f"error: the call of {call.name} does not fit: {fault}"


def _schema_faults(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[str]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield f"{str(schema)[:80]!r} is no schema"
        return
    if depth > _MAX_DEPTH:
        yield f"it is nested more than {_MAX_DEPTH} deep"
        return
    if unknown := sorted(schema.keys() - _CHECKED - _SAID):
        yield f"{unknown[0]!r} is nothing that calls are checked for; leave it out, or check it in the tool"
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _TYPES:
            yield f"{kind!r} is no type of JSON (types: {', '.join(_TYPES)})"
    if "$ref" in schema and _referred(schema["$ref"], root) is None:
        yield f"$ref {str(schema['$ref'])[:80]!r} leads nowhere; it must be #/$defs/NAME"
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        yield "properties is no table"
        return
    required = schema.get("required", [])
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        yield "required is no list of names"
    parts = [*properties.values(), *(schema[key] for key in ("items", "additionalProperties") if key in schema)]
    for key in ("anyOf", "oneOf", "allOf"):
        parts += schema.get(key, [])
    parts += schema.get("$defs", {}).values()
    for part in parts:
        yield from _schema_faults(part, root, depth + 1)


def _faults(value: Any, schema: Any, root: Mapping[str, Any], where: str, depth: int) -> Iterator[str]:
    """What of the value does not fit. where: its place, as the model knows it."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{where or 'this'} may not be there"
        return
    if depth > _MAX_DEPTH:  # a $ref into itself
        yield f"{where} is nested too deep"
        return
    if "$ref" in schema:
        yield from _faults(value, _referred(schema["$ref"], root) or {}, root, where, depth + 1)
    if value is None and schema.get("nullable"):
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{where or 'the arguments'} must be {' or '.join(map(_with_article, kinds))}, not {_shown(value)}"
        return
    for key, allowed in (("enum", schema.get("enum")), ("const", [schema.get("const")])):
        if key in schema and not any(same(value, tolerant=False) == same(one, tolerant=False) for one in allowed or ()):
            choices = ", ".join(json.dumps(one) for one in (allowed or ())[:20])
            yield f"{where} must be {'one of ' if key == 'enum' else ''}{choices}, not {_shown(value)}"
    yield from _bound_faults(value, schema, where)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            each = [next(_faults(value, part, root, where, depth + 1), None) for part in schema[key]]
            fitting = sum(fault is None for fault in each)
            if fitting == 0 or (key == "oneOf" and fitting > 1):
                yield next((f for f in each if f), f"{where} fits {fitting} of the forms, and must fit one")
    for part in schema.get("allOf", ()):
        yield from _faults(value, part, root, where, depth + 1)
    if isinstance(value, dict):
        yield from _object_faults(value, schema, root, where, depth)
    if isinstance(value, list) and "items" in schema:
        for place, item in enumerate(value):
            yield from _faults(item, schema["items"], root, f"{where}[{place}]", depth + 1)


def _object_faults(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str, depth: int
) -> Iterator[str]:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"the argument {where + '.' if where else ''}{name} is missing"
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        place = f"{where}.{name[:80]}" if where else name[:80]
        if name in properties:
            yield from _faults(item, properties[name], root, place, depth + 1)
        elif others is False:
            yield f"there is no argument {place!r}; the arguments are {', '.join(properties) or 'none'}"
        elif isinstance(others, Mapping):
            yield from _faults(item, others, root, place, depth + 1)


def _bound_faults(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        for key, (words, holds) in _BOUNDS.items():
            if key in schema and not holds(value, schema[key]):
                yield f"{where} must be {words} {schema[key]}, not {_shown(value)}"
    if isinstance(value, str | list):
        kind, unit = ("Length", "characters") if isinstance(value, str) else ("Items", "items")
        for key, words in _SIZES.items():
            if key.endswith(kind) and key in schema:
                fits = len(value) >= schema[key] if key.startswith("min") else len(value) <= schema[key]
                if not fits:
                    yield f"{where} must have {words} {schema[key]} {unit}, not {len(value)}"


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _referred(reference: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not isinstance(reference, str) or not reference.startswith("#/$defs/"):
        return None
    found = root.get("$defs", {}).get(reference.removeprefix("#/$defs/"))
    return found if isinstance(found, Mapping) else None


def _with_article(kind: str) -> str:
    return "null" if kind == "null" else f"{'an' if kind[0] in 'aio' else 'a'} {kind}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
