"""Commands that list what there is."""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from opdkit.cli.base import AsJson, app, console
from opdkit.errors import UserError
from opdkit.run.console import Table, say, say_json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from opdkit.methods.base import Method
    from opdkit.tasks.arguments import OptionArgument


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this one; also one of your own, as a recipe names it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The methods, a line each; of one: formula, paper, keys, defaults, and a recipe to begin with."""
    from opdkit.installed import installed
    from opdkit.methods import METHODS

    chosen: Mapping[str, type[Method]] = METHODS if name is None else {name: _method_named(name)}
    if as_json:
        say_json(console, {one: _described(one, method) for one, method in chosen.items()})
        return
    if name is not None:
        say(console, *"\n".join(_page(name, _described(name, chosen[name]))).split("\n"))
        return
    others = installed("methods")
    width = max(map(len, [*chosen, *others])) + 2
    for one, method in chosen.items():
        about = textwrap.shorten(_words(method).splitlines()[0], max(20, console.width - width), placeholder=" ...")
        say(console, f"{one:<{width}}{about}")
    for one, target in others.items():
        say(console, f"{one:<{width}}installed: {target}")
    say(console, "opdkit methods NAME shows one: formula, paper, keys, defaults, a recipe")


def _method_named(name: str) -> type[Method]:
    """Raises UserError for a name that is none."""
    from opdkit.methods import METHODS
    from opdkit.methods.base import Method
    from opdkit.recipe.fields import did_you_mean
    from opdkit.recipe.user_code import METHOD, user_class

    try:
        found = METHODS.get(name) or user_class(name, METHOD)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
    if found is None:
        raise UserError(f"{name} is no method{did_you_mean(name, METHODS)}")
    assert issubclass(found, Method)
    return found


def _described(name: str, method: type[Method]) -> dict[str, Any]:
    """What `methods --json` says of one."""
    from pydantic import ValidationError

    fields = {key: field for key, field in method.model_fields.items() if key != "name"}
    try:
        example: Method | None = method.model_validate({"name": name})
    except ValidationError:  # one that must be told something
        example = None
    keys = {
        key: {"default": None if field.is_required() else getattr(example, key, field.default)} | _choices(field)
        for key, field in fields.items()
    }
    needs = None if example is None else example.needs
    return {
        "about": _words(method).splitlines()[0],
        "text": _words(method),
        "views": {} if needs is None else {view: asked.answer for view, asked in needs.views.items()},
        "needs_reward": needs is not None and needs.reward,
        "keys": json.loads(json.dumps(keys, default=str)),
        "defaults": {section: dict(default) for section, default in method.defaults.items()},
        "recipe": _recipe(name, method, asks_teacher=needs is not None and needs.teacher is not None),
    }


def _choices(field: FieldInfo) -> dict[str, Any]:
    kinds = [field.annotation, *get_args(field.annotation)]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return ({"choices": words} if words else {}) | ({"required": True} if field.is_required() else {})


def _words(method: type[Method]) -> str:
    """Of its file, which is what the paper says; of the class, where the file says nothing."""
    module = sys.modules.get(method.__module__)
    return inspect.cleandoc(getattr(module, "__doc__", None) or method.__doc__ or method.__name__)


def _recipe(name: str, method: type[Method], *, asks_teacher: bool) -> str:
    """What a recipe must say for it; the rest is its defaults."""
    from opdkit.toml import dumps

    teacher = {"teacher": {"kind": "model", "path": "TEACHER"}}
    return dumps(
        {
            "name": "mine",
            "model": {"path": "STUDENT"},
            **(teacher if asks_teacher and "teacher" not in method.defaults else {}),
            "data": {"train": "train.jsonl", "task": "math"},
            "method": {"name": name},
            "train": {"steps": 100},
        }
    ).strip()


def _page(name: str, said: Mapping[str, Any]) -> list[str]:
    """One method for the terminal."""
    asked = [f"{view}: {answer}" for view, answer in said["views"].items()]
    lines = [name, "", said["text"], "", f"Asks of every token  {', '.join(asked) or 'nobody'}"]
    lines += [
        f"Needs rewards        {'yes' if said['needs_reward'] else 'no'}",
        "",
        "Keys of [method] and their defaults",
    ]
    for key, what in said["keys"].items():
        choices = f"    # {', '.join(map(str, what['choices']))}" if "choices" in what else ""
        value = "(must be given)" if what.get("required") else _toml(what["default"], none="(not set)")
        lines.append(f"  {key} = {value}{choices}")
    lines += ["", "Its defaults elsewhere"]
    lines += [
        f"  {section}.{k} = {_toml(v)}" for section, default in said["defaults"].items() for k, v in default.items()
    ]
    return [
        *lines,
        "",
        "A recipe to begin with (opdkit check says what else)",
        "",
        textwrap.indent(said["recipe"], "  "),
    ]


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help='Show this one, e.g. "mopd/math_mopd".', show_default=False)
    ] = None,
    copy: Annotated[Path | None, typer.Option(help="Write it to this file, to change it.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """The recipes that come with opdkit, a line each; `check` and `train` take their names as they take files."""
    from opdkit.recipe.fields import did_you_mean
    from opdkit.recipe.shipped import about, shipped_recipes

    known = shipped_recipes()
    chosen = None if name is None else name.removeprefix("recipes/").removesuffix(".toml")
    if chosen is not None and chosen not in known:
        raise UserError(f"{name} is no recipe of opdkit's{did_you_mean(chosen, known)}")
    if copy is not None:
        if chosen is None:
            raise UserError("--copy needs the name of a recipe")
        if copy.exists():
            raise UserError(f"{copy} is there already; name another file, or remove it")
        copy.write_text(known[chosen].read_text(encoding="utf-8"), encoding="utf-8")
        say(console, f"wrote {copy}")
    elif as_json:
        say_json(console, {one: {"about": about(known[one]), "file": str(known[one])} for one in known})
    elif chosen is not None:
        say(console, *known[chosen].read_text(encoding="utf-8").rstrip("\n").split("\n"))
    else:
        width = max(map(len, known)) + 2
        for one, file in known.items():
            said = textwrap.shorten(about(file), max(20, console.width - width), placeholder=" ...")
            say(console, f"{one:<{width}}{said}")
        say(console, "opdkit recipes NAME shows one, --copy FILE writes it")


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """The tasks that can be graded, and their options."""
    from opdkit.installed import installed
    from opdkit.tasks import TASKS
    from opdkit.tasks.arguments import option_arguments

    if as_json:
        say_json(console, {name: _task_described(task) for name, task in TASKS.items()})
        return
    table = Table("task", "what it grades", "options", show_lines=True)
    _add_rows(table, {name: (task, option_arguments(task)) for name, task in TASKS.items()}, installed("tasks"))
    say(console, table)
    say(
        console,
        'In a recipe: task = "math", task = { name = "code", time_limit_s = 2.0 }, or your own, task = "my_task.py".',
        'On a command line: --task math, or --task "code time_limit_s=2".',
    )


@app.command()
def environments(as_json: AsJson = False) -> None:
    """The environments that a student can act in, and their options."""
    from opdkit.installed import installed
    from opdkit.rollouts.environments.options import ENVIRONMENTS, made_by
    from opdkit.tasks.arguments import option_arguments

    made = {name: made_by(reference) for name, reference in ENVIRONMENTS.items()}
    if as_json:
        say_json(console, {name: _task_described(environment) for name, environment in made.items()})
        return
    table = Table("environment", "what it is", "options", show_lines=True)
    rows = {name: (environment, option_arguments(environment)) for name, environment in made.items()}
    _add_rows(table, rows, installed("environments"))
    say(console, table)
    say(
        console,
        'In a recipe, under [episode]: environment = "calculator", environment = { name = "python", state = true }, '
        'or your own, environment = "my_env.py:Shop".',
    )


def _add_rows(
    table: Table, rows: Mapping[str, tuple[Any, Sequence[OptionArgument]]], others: Mapping[str, str]
) -> None:
    """A name, the first sentence of what it is, and its options; and what others have installed."""
    for name, (made, options) in rows.items():
        shown = [
            f"{option.name}{'' if option.is_required else f' = {_toml(option.default)}'}\n  {option.help}"
            for option in options
        ]
        table.add_row(name, _about(made), "\n".join(shown))
    for name, target in others.items():
        table.add_row(name, f"installed: {target}", "")
    for column in table.columns:
        column.overflow = "fold"


def _task_described(task: Any) -> dict[str, Any]:
    from opdkit.tasks.arguments import option_arguments

    options = {
        option.name: {"help": option.help}
        | ({"required": True} if option.is_required else {"default": option.default})
        | ({"choices": option.choices} if option.choices else {})
        for option in option_arguments(task)
    }
    return {"about": _about(task), "options": json.loads(json.dumps(options, default=str))}


def _about(task: Any) -> str:
    """The first sentence of a task's own words; of its file's, where it is the file's only task."""
    words = task.__doc__ if task.__module__.endswith(".shape") else sys.modules[task.__module__].__doc__
    return (words or "").strip().splitlines()[0]


def _toml(value: Any, none: str = "-") -> str:
    return none if value is None else json.dumps(value)
