"""What a task's options are, read off the arguments it is made with; and the same as JSON, since the code of a user's
task is never in this process (`user_task.py`)."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import Field

from opdkit.tasks.base import Option

_NAMES: dict[Any, str] = {
    str: "str", int: "int", float: "float", bool: "bool", type(None): "none", Any: "any", ...: "...",
    list: "list", tuple: "tuple", dict: "dict", Mapping: "mapping", Sequence: "sequence",
}  # fmt: skip
_KINDS = {name: kind for kind, name in _NAMES.items()}
_LIMITS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")  # of pydantic's Field


class OptionArgument(NamedTuple):
    name: str
    annotation: Any  # with the limits of its Option
    default: Any
    choices: tuple[str, ...]
    help: str

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


def option_arguments(described: Callable[..., Any]) -> list[OptionArgument]:
    """The arguments that a recipe can set: those of plain types. Others are for callers in Python."""
    try:
        signature = inspect.signature(described, eval_str=True)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"the arguments of {described!r} cannot be read: {error}") from None
    found = []
    takes_an_answer = not inspect.isclass(described)  # a user's function: (problem, text, options...)
    for argument in list(signature.parameters.values())[2 if takes_an_answer else 0 :]:
        if argument.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        default, annotation = argument.default, argument.annotation
        if annotation is inspect.Parameter.empty:
            annotation = Any if default in (inspect.Parameter.empty, None) else type(default)
        said = [note for note in getattr(annotation, "__metadata__", ()) if isinstance(note, Option)]
        kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if not _is_plain(annotation):
            if default is inspect.Parameter.empty:
                raise ValueError(f"its argument {argument.name} has no default and a type that a recipe cannot say")
            continue
        option = said[0] if said else Option("")
        if option.above is not None or option.at_least is not None:
            annotation = Annotated[annotation, Field(gt=option.above, ge=option.at_least)]
        if kind is tuple or get_origin(kind) is tuple:
            annotation = Annotated[annotation, Field(strict=False)]  # TOML's arrays arrive as lists
        found.append(OptionArgument(argument.name, annotation, default, _choices(kind), option.help))
    return found


def argument_as_json(argument: OptionArgument) -> dict[str, Any]:
    """Raises ValueError for a default that is no plain value."""
    try:
        said = {"name": argument.name, "type": _type_as_json(argument.annotation), "help": argument.help}
        return said if argument.is_required else {**said, "default": value_as_json(argument.default)}
    except TypeError as error:
        raise ValueError(f"its argument {argument.name} is nothing that a recipe can say: {error}") from None


def argument_from_json(said: Mapping[str, Any]) -> OptionArgument:
    """Raises ValueError, TypeError, KeyError or RecursionError for what `argument_as_json` does not make."""
    annotation = _type_from_json(said["type"])
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    default = value_from_json(said["default"]) if "default" in said else inspect.Parameter.empty
    return OptionArgument(str(said["name"]), annotation, default, _choices(kind), str(said["help"]))


def value_as_json(value: Any) -> Any:
    """Tuples stay tuples. TypeError for what no recipe can say."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", *map(value_as_json, value)]
    if isinstance(value, Mapping):
        return {"": [[value_as_json(key), value_as_json(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def value_from_json(said: Any) -> Any:
    if isinstance(said, list):
        items = map(value_from_json, said[1:])
        return tuple(items) if said[0] == "tuple" else list(items)
    if isinstance(said, dict):
        return {value_from_json(key): value_from_json(item) for key, item in said[""]}
    return said


def _type_as_json(kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is None:
        return _NAMES[kind]
    if origin is Annotated:
        base, *notes = get_args(kind)
        notes = [one for note in notes for one in (getattr(note, "metadata", None) or [note])]
        if any(type(note).__module__.startswith("pydantic.functional") for note in notes):
            raise TypeError("a validator of its own runs nowhere; check the value where it is used")
        limits = {
            name: getattr(note, name) for note in notes for name in _LIMITS if getattr(note, name, None) is not None
        }
        strict = any(getattr(note, "strict", None) is False for note in notes)
        return ["annotated", _type_as_json(base), limits | ({"strict": False} if strict else {})]
    if origin is Literal:
        return ["literal", *get_args(kind)]
    if origin in (Union, types.UnionType):
        return ["union", *map(_type_as_json, get_args(kind))]
    return [_NAMES[origin], *map(_type_as_json, get_args(kind))]


def _type_from_json(said: Any) -> Any:
    if isinstance(said, str):
        return _KINDS[said]
    name, *parts = said
    if name == "annotated":
        return Annotated[_type_from_json(parts[0]), Field(**parts[1])]
    if name == "literal":
        return Literal[tuple(parts)]
    kinds = tuple(map(_type_from_json, parts))
    if name == "union":
        return reduce(or_, kinds)
    return _KINDS[name][kinds] if kinds else _KINDS[name]


def _is_plain(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is None:
        return any(kind is plain for plain in _NAMES)
    if origin is Annotated:
        return _is_plain(get_args(kind)[0])
    if origin is Literal:
        return all(value is None or type(value) in (str, int, bool) for value in get_args(kind))
    is_known = origin in (Union, types.UnionType) or any(origin is plain for plain in _NAMES)
    return is_known and all(map(_is_plain, get_args(kind)))


def _choices(kind: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else ()
