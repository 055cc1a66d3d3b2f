"""Pages of the site that are written from the code when it is built: recipe keys and commands.

mkdocs calls `on_page_markdown`. A page says where a part goes, `<!-- keys: opdkit.recipe.sections.TrainSection -->`; a
name that does not exist stops the build.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from html import escape
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_PART = re.compile(r"^<!-- (keys|choices|pages|commands):? ?(\S*) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _PART.sub(lambda part: _WRITERS[part[1]](part[2]), markdown)


def comments(path: Path) -> dict[int, tuple[str, bool]]:
    """{line: (text, whether it has the line to itself)} of a Python file's comments."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: (token.string.lstrip("#: "), not token.line[: token.start[1]].strip()) for token in tokens}


@cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """{field: what the source says of it}: the comment beside a field, or the lines of comment right above it."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or not cls.__module__.startswith("opdkit."):
            continue
        path = Path(inspect.getsourcefile(cls) or "")
        said = comments(path)
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for field in next(node for node in nodes if node.name == cls.__name__).body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            above = field.lineno
            while said.get(above - 1, ("", False))[1]:
                above -= 1
            lines = [said[line][0] for line in range(above, (field.end_lineno or field.lineno) + 1) if line in said]
            if lines:
                found[field.target.id] = " ".join(lines)
    return found


def keys_of(name: str) -> str:
    """The keys of one pydantic model."""
    return "\n".join(_table(named(name), named(name).model_fields))


def choices_of(name: str) -> str:
    """Every row of a table such as `opdkit.contexts.CONTEXTS`: a heading, the first words of its page, its keys."""
    lines: list[str] = []
    for key, model in named(name).items():
        lines += [f"### `{key}`", "", _first_words(model), "", *_table(model, _own_fields(model)), ""]
        for section, values in getattr(model, "defaults", {}).items():
            lines += [f"- `[{section}]` {', '.join(f'`{one} = {_toml(value)}`' for one, value in values.items())}"]
        lines.append("")
    return "\n".join(lines)


def pages_of(name: str) -> str:
    """The docstring of the file of every row of a table, as it stands there: formulas, sources, where we differ."""
    lines: list[str] = []
    for key, model in named(name).items():
        doc = inspect.cleandoc(importlib.import_module(model.__module__).__doc__ or "")
        source = model.__module__.replace(".", "/")
        lines += [f"## `{key}`", "", f"`{source}.py`", "", f'<pre class="docstring">{escape(doc)}</pre>', ""]
    return "\n".join(lines)


def named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _own_fields(model: type[BaseModel]) -> list[str]:
    """Fields that a class and its nearer relatives define; those of all methods have tables of their own."""
    shared = ("opdkit.methods.base", "opdkit.methods.distillation", "opdkit.methods.weighting.base")
    relatives = [cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls.__module__ not in shared]
    own = {field for cls in relatives for field in inspect.get_annotations(cls)}
    return [field for field in model.model_fields if field in own and field not in ("name", "kind")]


def _first_words(model: type) -> str:
    doc = model.__dict__.get("__doc__") or importlib.import_module(model.__module__).__doc__ or ""
    return _cell(" ".join(doc.split("\n\n")[0].split()))


def _table(model: type[BaseModel], names: Iterable[str]) -> Iterator[str]:
    said, made = descriptions(model), _made(model)
    rows = []
    for name in names:
        field = model.model_fields[name]
        value = getattr(made, name) if made else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() and not made else _default(value)
        kind = _type(field.annotation) + _bounds(field.metadata)
        rows.append(f"| `{name}` | {kind} | {default} | {_cell(said.get(name, ''))} |")
    yield from ("| key | type | default | |", "|---|---|---|---|", *rows) if rows else ("No keys of its own.",)


def _made(model: type[BaseModel]) -> BaseModel | None:
    """One with nothing but defaults; None where a key is required. Some defaults follow from others."""
    try:
        return model.model_validate({})
    except ValidationError:
        return None


def _default(value: Any) -> str:
    return "its keys' defaults" if isinstance(value, BaseModel) else _code(_toml(value))


def _toml(value: Any) -> str:
    """A default as a recipe would write it; None, which TOML lacks, as a dash."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def _type(annotation: Any) -> str:
    """A type in the words of TOML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(_code(_toml(value)) for value in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    words = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not type(None)))
    return "table"


def _bounds(metadata: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            bounds = {sign: getattr(part, key) for key, sign in signs.items() if hasattr(part, key)}
            found += [f"{sign} {bound}" for sign, bound in bounds.items() if bound < 2**31 - 1]  # no index is longer
    return f", {', '.join(dict.fromkeys(found))}" if found else ""


def _code(text: str) -> str:
    return "-" if text == "-" else f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands(_: str) -> str:
    """Every command with its options."""
    import typer.main

    import opdkit.cli

    return "\n".join(_command(typer.main.get_command(opdkit.cli.base.app), "opdkit"))


def _command(command: Any, words: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield from (f"## {words}", "", _cell(inspect.cleandoc(command.help or "")), "")
        yield from ("| option | default | |", "|---|---|---|")
        for option in command.params:
            is_option = option.param_type_name == "option"
            names = " ".join(f"`{name}`" for name in option.opts) if is_option else f"`{option.name.upper()}`"
            default = "required" if option.required else _shown(option.default)
            yield f"| {names} | {default} | {_cell(getattr(option, 'help', None) or '')} |"
        yield ""
    for name, one in inner.items():
        yield from _command(one, f"{words} {name}")


def _shown(default: Any) -> str:
    """A flag that is off, and an option that may be given several times and is not, have none to show."""
    nothing = default is None or default is False or callable(default) or default in ("", (), [])
    return "-" if nothing else _code(str(default))


_WRITERS = {"keys": keys_of, "pages": pages_of, "choices": choices_of, "commands": commands}
