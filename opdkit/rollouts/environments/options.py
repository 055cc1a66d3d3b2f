"""From what a recipe says of its environment to what makes one.

    environment = "calculator"                                 one of ENVIRONMENTS, with its defaults
    environment = { name = "my_env.py:Shop", shelves = 3 }     your own: the arguments of its class are its options
    environment = "my_package.shop"                            of a module, also from the current folder
    environment = "shop"                                       what an installed package calls so, as an entry point

Yours is imported in a process of its own, never here, and what the file held then is what runs.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, create_model

from opdkit.errors import UserError
from opdkit.installed import installed
from opdkit.tasks.arguments import OptionArgument, argument_from_json, option_arguments
from opdkit.tasks.base import GraderDown
from opdkit.tasks.options import option_sentence, task_table
from opdkit.tasks.user.process import Failed, Lost, UserProcess
from opdkit.tasks.user.task import START_LIMIT_S, file_digest, import_request

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
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Where an environment is imported from."""

    reference: str
    path: Path | None  # of the file; None: a module
    content: bytes | None  # of the file, when it was first read
    arguments: tuple[OptionArgument, ...]
    columns: tuple[str, ...]  # of the data, that its `reset` reads in Problem.row
    files: Mapping[str, tuple[str, str]]  # "", or " imports NAME" -> path, sha256; empty: ours

    def start(self) -> UserProcess:
        """A process that has imported it. Raises UserError."""
        process = UserProcess(WORKER)
        try:
            said = process.ask(import_request(self.reference, self.path, self.content), START_LIMIT_S)
            for part, (file, digest) in self.files.items():
                if said["files"].get(part) != [file, digest] and not (part == "" and self.content is not None):
                    raise UserError(f"{file} has changed since it was first read; start again")
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


_sources: dict[tuple[str, Path], Source] = {}


def _source(name: str) -> Source:
    """The same object as long as no file of it has changed."""
    if name in ENVIRONMENTS:
        return _our_source(ENVIRONMENTS[name])
    target = installed("environments").get(name)
    if target is None and (near := difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.75)):
        raise ValueError(f'does not exist; did you mean "{near[0]}"?')
    reference = target or name
    module_name = reference.partition(":")[0]
    path = Path(module_name).expanduser() if module_name.endswith(".py") else None
    if path is None and "." not in module_name and ":" not in reference:
        known = ", ".join(ENVIRONMENTS)
        raise ValueError(
            f'is not an environment; known are {known}, or write your own: "file.py:Class" or "package.module:Class"'
        )
    if path is not None and not path.is_file():
        raise ValueError(f"there is no file {path} (looked up from {Path.cwd()})")
    found = _sources.get((reference, Path.cwd()))
    if found is None or any(file_digest(Path(file)) != digest for file, digest in found.files.values()):
        path = None if path is None else path.resolve()
        found = _sources[reference, Path.cwd()] = _described(
            reference, path, None if path is None else path.read_bytes()
        )
    return found


def made_by(reference: str) -> Any:
    """The class of one of ENVIRONMENTS."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@lru_cache(maxsize=64)
def _our_source(reference: str) -> Source:
    made = made_by(reference)
    arguments, columns = tuple(option_arguments(made)), tuple(getattr(made, "asks_columns", ()))
    return Source(reference=reference, path=None, content=None, arguments=arguments, columns=columns, files={})


def _described(reference: str, path: Path | None, content: bytes | None) -> Source:
    process = UserProcess(WORKER)
    try:
        said = process.ask(import_request(reference, path, content), START_LIMIT_S)
        digest = None if content is None else hashlib.sha256(content).hexdigest()
        return Source(
            reference=reference,
            path=path,
            content=content,
            arguments=tuple(argument_from_json(argument) for argument in said["arguments"]),
            columns=tuple(str(name) for name in said["columns"]),
            files={
                str(part): (str(file), digest if digest and not part else str(known))
                for part, (file, known) in said["files"].items()
            },
        )
    except Lost as error:
        raise ValueError(
            f"{path or reference} cannot be imported: {error}; what is slow or may not return belongs into reset"
        ) from None
    except (Failed, GraderDown, UserError) as error:
        raise ValueError(str(error)) from None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path or reference} was imported by a process that answers nonsense: {error!r}") from None
    finally:
        process.end()


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
