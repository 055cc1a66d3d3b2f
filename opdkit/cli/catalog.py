"""Commands that list what there is."""

from __future__ import annotations

import json
import sys
from typing import Any

from opdkit.cli.base import app, console
from opdkit.run.console import Table, say


@app.command()
def methods() -> None:
    """The methods and their defaults."""
    from opdkit.methods import METHODS
    from opdkit.recipe.build import flat

    table = Table(
        "method", "what it is", "teacher says", "method keys", "the paper's defaults elsewhere", show_lines=True
    )
    for name, method in METHODS.items():
        example = method.model_validate({"name": name})
        about = (sys.modules[method.__module__].__doc__ or "").splitlines()[0]
        keys = [f"{k} = {_toml(v)}" for k, v in example.model_dump().items() if k != "name"]
        paper = [f"{key} = {_toml(value)}" for key, value in flat(method.defaults).items()]
        table.add_row(
            name,
            about,
            ", ".join(f"{v}: {a.answer}" for v, a in example.needs.views.items()) or "none",
            "\n".join(keys),
            "\n".join(paper),
        )
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut cannot be copied
    say(console, table)


@app.command()
def tasks() -> None:
    """The tasks that can be graded, and their options."""
    from opdkit.tasks import TASKS
    from opdkit.tasks.arguments import option_arguments

    table = Table("task", "what it grades", "options", show_lines=True)
    for name, task in TASKS.items():
        options = [
            f"{option.name}{'' if option.is_required else f' = {_toml(option.default)}'}\n  {option.help}"
            for option in option_arguments(task)
        ]
        table.add_row(name, _about(task), "\n".join(options))
    for column in table.columns:
        column.overflow = "fold"
    say(console, table)
    say(
        console,
        'In a recipe: task = "math", task = { name = "code", time_limit_s = 2.0 }, or your own, task = "my_task.py".',
        'On a command line: --task math, or --task "code time_limit_s=2".',
    )


def _about(task: Any) -> str:
    """The first sentence of a task's own words; of its file's, where it is the file's only task."""
    words = task.__doc__ if task.__module__.endswith(".shape") else sys.modules[task.__module__].__doc__
    return (words or "").strip().splitlines()[0]


def _toml(value: Any) -> str:
    return "-" if value is None else json.dumps(value)
