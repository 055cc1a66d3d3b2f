"""From what a recipe says of its environment to what makes one.

    environment = "calculator"                                 one of ENVIRONMENTS, with its defaults
    environment = { name = "my_env.py:Shop", shelves = 3 }     your own: the arguments of its class are its options
    environment = "my_package.shop"                            of a module, also from the current folder
    environment = "shop"                                       what an installed package calls so, as an entry point

Yours is imported in a process of its own, never here, and what the file held then is what runs.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, create_model

from opdkit.errors import UserError
from opdkit.installed import installed
from opdkit.tasks.arguments import option_arguments
from opdkit.tasks.options import option_sentence, task_table
from opdkit.tasks.user.imports import UserCode, fields_of, file_digest, find
from opdkit.tasks.user.process import Failed, UserProcess

WORKER = "opdkit.rollouts.environments._worker"
_OURS = "opdkit.rollouts.environments"
ENVIRONMENTS: Mapping[str, str] = {
    "calculator": f"{_OURS}.calculator:Calculator",
    "python": f"{_OURS}.python:Python",
    "search": f"{_OURS}.search:Search",
    "game": f"{_OURS}.game:Game",
    "replay": f"{_OURS}.replay:Replay",
    "trl": f"{_OURS}.adapters.trl:Trl",
    "openenv": f"{_OURS}.adapters.openenv:OpenEnv",
    "verl": f"{_OURS}.adapters.verl:Verl",
    "verifiers": f"{_OURS}.adapters.verifiers:Verifiers",
    "verifiers_v1": f"{_OURS}.adapters.verifiers_v1:VerifiersV1",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source(UserCode):
    """Where an environment is imported from. columns: of the data, that its `reset` reads in Problem.row; files: none
    of ours."""

    def start(self) -> UserProcess:
        """A process that has imported it. Raises UserError."""
        process = UserProcess(WORKER)
        try:
            self.import_in(process)
        except Failed as error:
            process.end()
            raise UserError(f"the environment {self.reference} cannot be imported: {error}") from None
        except BaseException:
            process.end()
            raise
        return process


class EnvironmentOptions(BaseModel):
    """An environment that has been chosen, with every option resolved. Made by `resolve_environment`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    name: str  # as the recipe has it
    source: ClassVar[Source]

    @property
    def options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}

    @property
    def user_files(self) -> dict[str, str]:
        """{name: sha256} of the user's file, of what it imports from beside it, and of files that options name."""
        own = {f"{self.name}{part}": digest for part, (_, digest) in type(self).source.files.items()}
        for key, value in self.options.items():
            file = str(value).rpartition(":")[0] if ".py:" in str(value) else str(value)
            if isinstance(value, str) and (digest := file_digest(Path(file).expanduser())):
                own[f"{self.name} {key} {file}"] = digest
        return own

    @property
    def columns_asked(self) -> tuple[str, ...]:
        """Columns of the data that it reads, beside those that the recipe names; "*": every one."""
        return type(self).source.columns


def resolve_environment(value: Any) -> EnvironmentOptions:
    """From a name, a table, or what is resolved already. Raises ValueError with a sentence for each fault."""
    if isinstance(value, EnvironmentOptions):
        return value
    if isinstance(value, str):
        value = task_table(value)
    if not value or not isinstance(value, Mapping) or not str(value.get("name") or "").strip():
        known = ", ".join(ENVIRONMENTS)
        raise ValueError(f"give the name of an environment, or a table with a name and options (known: {known})")
    model = _model(str(value["name"]), _source(str(value["name"])))
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError("; ".join(option_sentence(fault, model, "environment") for fault in error.errors())) from None


ChosenEnvironment = Annotated[SerializeAsAny[EnvironmentOptions], BeforeValidator(resolve_environment)]


def _source(name: str) -> Source:
    """The same object as long as no file of it has changed."""
    if name in ENVIRONMENTS:
        return _our_source(ENVIRONMENTS[name])
    target = installed("environments").get(name)
    if target is None and (near := difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.75)):
        raise ValueError(f'does not exist; did you mean "{near[0]}"?')
    return find(
        Source,
        target or name,
        worker=WORKER,
        make=lambda said: Source(**fields_of(said)),
        slow="reset",
        unknown=f"is not an environment; known are {', '.join(ENVIRONMENTS)}, or write your own: "
        '"file.py:Class" or "package.module:Class"',
    )


def made_by(reference: str) -> Any:
    """The class of one of ENVIRONMENTS."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@lru_cache(maxsize=64)
def _our_source(reference: str) -> Source:
    made = made_by(reference)
    arguments, columns = tuple(option_arguments(made)), tuple(getattr(made, "asks_columns", ()))
    return Source(reference=reference, path=None, content=None, arguments=arguments, columns=columns, files={})


@lru_cache(maxsize=256)
def _model(name: str, source: Source) -> type[EnvironmentOptions]:
    fields: dict[str, Any] = {
        argument.name: (argument.annotation, ... if argument.is_required else argument.default)
        for argument in source.arguments
    }
    for taken in fields.keys() & {*dir(EnvironmentOptions), "name"}:
        raise ValueError(f"its option {taken} has a name that every environment has; rename it")
    fields["name"] = (Literal[name], name)
    model: type[EnvironmentOptions] = create_model(f"options of {name}", __base__=EnvironmentOptions, **fields)
    model.source = source
    return model
