"""A task's options, from its name or table in a recipe to the task itself.

    task = "math"                                           one of TASKS, with its defaults
    task = { name = "tool_use", feedback = "reveal" }       with options: the keyword arguments it is made with
    task = "my_task.py"    task = "my_pkg.my_task:Grader"   your own (`user/task.py`); read because you named it
    task = "mine"                                           what an installed package calls so, as an entry point

On a command line, and wherever a task is one line of text: `tool_use`, `tool_use feedback=reveal`, or the table.
What an option may be is said by the type of the argument, and by an `Option` beside it.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
)

from opdkit.installed import installed
from opdkit.tasks import TASKS
from opdkit.tasks.arguments import OptionArgument, option_arguments
from opdkit.tasks.base import Task
from opdkit.tasks.none import NoTask
from opdkit.tasks.user.rewards import PREFIX, InProcess
from opdkit.tasks.user.task import UserTask, load_user_task
from opdkit.tasks.weighted import WeightedTask, WeightedTerm
from opdkit.types import Problem

TermName = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]  # part of a metric's name


class TaskOptions(BaseModel):
    """A task that has been chosen, with every option resolved. Made by `resolve_task`; one class for each task."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    name: str  # as the recipe has it
    factory: ClassVar[Callable[..., Task]]
    user_task: ClassVar[UserTask | InProcess | None] = None

    @property
    def options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}

    @property
    def text(self) -> str:
        """One line that `resolve_task` reads as these options: what differs from the defaults."""
        said = {key: value for key, value in self.model_dump(mode="json", exclude_none=True).items()}
        for argument in type(self).model_fields:
            if argument != "name" and getattr(self, argument) == type(self).model_fields[argument].default:
                said.pop(argument, None)
        return self.name if len(said) == 1 else _inline(said)

    @property
    def main(self) -> TaskOptions:
        """Whose accuracy counts, and whose problems are read: the first term's of a `weighted` reward."""
        first = next(iter(self.options["terms"].values())) if self.factory is WeightedTask else None
        return self if first is None else first.task.main

    @property
    def user_files(self) -> dict[str, str]:
        """{name: sha256} of the user's own tasks and of what they import from beside them, also of terms."""
        own = type(self).user_task
        found = {} if own is None else {f"{self.name}{part}": digest for part, digest in own.digests.items()}
        for term in self.options["terms"].values() if self.factory is WeightedTask else ():
            found |= term.task.user_files
        return found

    @property
    def columns_asked(self) -> tuple[str, ...]:
        """Columns of the data that its reward functions ask for, also as terms; `rewards.ALL`: every one."""
        own = type(self).user_task
        terms = self.options["terms"].values() if self.factory is WeightedTask else ()
        asked = {*(own.columns if own else ()), *(name for term in terms for name in term.task.columns_asked)}
        return tuple(sorted(asked))

    @property
    def needs_gold(self) -> bool:
        """Whether it, or any term of a sum, grades by a gold answer."""
        return self._needs("needs_gold")

    @property
    def needs_gold_or_tests(self) -> bool:
        """Whether it cannot grade problems that are a prompt alone."""
        return self.needs_gold or self._needs("needs_tests")

    def _needs(self, what: str) -> bool:
        terms = self.options["terms"].values() if self.factory is WeightedTask else ()
        return bool(getattr(self.factory, what, False)) or any(term.task._needs(what) for term in terms)

    @property
    def is_none(self) -> bool:
        """Whether there is no grader."""
        return self.factory is NoTask

    def can_grade(self, problem: Problem) -> bool:
        return not self.is_none and (problem.has_gold or not self.needs_gold_or_tests)

    def make(self) -> Task:
        """The task. Raises UserError for options that cannot go together."""
        return self.factory(**{key: _made(value) for key, value in self.options.items()})

    @property
    def bounds(self) -> tuple[float, float]:
        """(the least that a right answer gets, the most that a wrong one gets), for scores of 0 or 1. Of a sum: if
        terms besides the first are in [0, 1], and `length` in [-1, 0], and all of them are against the answer."""
        if self.factory is not WeightedTask:
            return (-1.0, 0.0) if self.name == "length" else (1.0, 0.0)
        terms = list(self.options["terms"].values())
        lowest_right, highest_wrong = (terms[0].weight * end for end in terms[0].task.bounds)
        for term in terms[1:]:
            ends = [-term.weight, 0.0] if term.task.name == "length" else [term.weight, 0.0]
            lowest_right, highest_wrong = lowest_right + min(ends), highest_wrong + max(ends)
        return lowest_right, highest_wrong

    def warnings(self, where: str) -> list[str]:
        """What works and is probably not meant; `where`: the key that holds these options."""
        said = getattr(self.factory, "warnings", None)
        found = [f"{where}: {sentence}" for sentence in said(self.options)] if said else []
        for name, term in self.options["terms"].items() if self.factory is WeightedTask else ():
            found += term.task.warnings(f"{where}.terms.{name}.task")
        return found


def _grades(task: TaskOptions) -> TaskOptions:
    if task.is_none:
        raise ValueError("none grades nothing, and a sum needs every term; remove the term")
    return task


class Term(BaseModel):
    """One term of a `weighted` reward."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    weight: float
    task: Annotated[ChosenTask, AfterValidator(_grades)]

    def make(self) -> WeightedTerm:
        return WeightedTerm(self.weight, self.task.make())


def resolve_task(value: Any) -> TaskOptions:
    """From a name, a table, or what is resolved already. Raises ValueError with a sentence for each fault."""
    if isinstance(value, TaskOptions):
        return value
    if isinstance(value, str):
        value = task_table(value)
    if not value or not isinstance(value, Mapping) or not str(value.get("name") or "").strip():
        raise ValueError(f"give the name of a task, or a table with a name and options (tasks: {', '.join(TASKS)})")
    model = options_model(str(value["name"]))
    try:
        chosen = model.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError("; ".join(option_sentence(fault, model) for fault in error.errors())) from None
    faults = getattr(model.factory, "faults", None)
    if faults is not None and (said := faults(chosen.options)):
        raise ValueError("; ".join(said))
    return chosen


ChosenTask = Annotated[SerializeAsAny[TaskOptions], BeforeValidator(resolve_task)]
Term.model_rebuild()


def options_model(name: str) -> type[TaskOptions]:
    """The options of a task, as a pydantic model. Raises ValueError for a name that is no task."""
    if name in TASKS:
        return _model(name, TASKS[name], None)
    if name.startswith(PREFIX):
        raise ValueError(
            "was a function given to opdkit.train, and is in no file: give it again (reward=...), or put it into a "
            f'file and name that, "my_rewards.py:{name.removeprefix(PREFIX)}"'
        )
    target = installed("tasks").get(name)
    if target is None and (near := difflib.get_close_matches(name, TASKS, n=1, cutoff=0.75)):
        raise ValueError(f'does not exist; did you mean "{near[0]}"?')
    user_task = load_user_task(target or name, known=tuple(TASKS))
    return _model(name, user_task, user_task)


def in_process(function: Callable[..., Any], name: str) -> TaskOptions:
    """A reward function that no other process can import, as a task that has been chosen."""
    described = InProcess(function, f"{PREFIX}{name}")
    return _model(described.name, described, described).model_validate({"name": described.name})


@lru_cache(maxsize=256)
def _model(name: str, factory: Callable[..., Task], user_task: UserTask | InProcess | None) -> type[TaskOptions]:
    arguments: Sequence[OptionArgument] = option_arguments(factory) if user_task is None else user_task.arguments
    fields: dict[str, Any] = {
        argument.name: (argument.annotation, ... if argument.is_required else argument.default)
        for argument in arguments
    }
    for taken in fields.keys() & {*dir(TaskOptions), "name"}:
        raise ValueError(f"its option {taken} has a name that every task has; rename it")
    if factory is WeightedTask:
        fields["terms"] = (dict[TermName, Term], Field(min_length=1))
    fields["name"] = (Literal[name], name)
    model: type[TaskOptions] = create_model(f"options of {name}", __base__=TaskOptions, **fields)
    model.factory = staticmethod(factory)  # else a function would become a method
    model.user_task = user_task
    return model


def task_table(line: str) -> dict[str, Any]:
    """`name`, `name key=value ...` with values as TOML or bare words, or a TOML table."""
    if line.lstrip().startswith("{"):
        try:
            return dict(tomllib.loads(f"task = {line.strip()}")["task"])
        except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"is not a TOML table on one line: {error}") from None
    name, *settings = line.split() or [""]
    if not settings or not all("=" in setting for setting in settings):
        return {"name": line}
    found: dict[str, Any] = {"name": name}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def _inline(value: Any) -> str:
    """TOML on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML writes text, numbers and booleans as JSON does


def _made(value: Any) -> Any:
    return {name: term.make() for name, term in value.items()} if _is_terms(value) else value


def _is_terms(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(term, Term) for term in value.values())


def option_sentence(fault: Mapping[str, Any], model: type[BaseModel], kind: str = "task") -> str:
    """What pydantic found wrong with the options of a task (or of whatever else `kind` is)."""
    key = ".".join(str(part) for part in fault["loc"])
    known = [field for field in model.model_fields if field != "name"]
    if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f" (options: {', '.join(known) or 'none'})"
        return f"{key} is not an option of this {kind}{hint}"
    if fault["type"] == "missing":
        return f"{key} is missing; add it"
    reason = fault["msg"].removeprefix("Value error, ")
    return f"{key} = {fault['input']!r}: {reason[0].lower()}{reason[1:]}"
