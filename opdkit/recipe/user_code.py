"""Methods, contexts and weights that are not ours, imported because a recipe names them, and never otherwise.

    name = "my_file.py:Mine"        a class of a file; "my_file.py" where it defines one alone
    name = "my_package.part:Mine"   of a module that can be imported, also from the current folder
    name = "mine"                   what an installed package calls so, as an entry point (`opdkit.installed`)

It is the user's code, with the user's rights, in this process. The digests of its file and of what that imports from
beside it are part of a run, as those of a user's task are.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, create_model

from opdkit.contexts import CONTEXTS, Context
from opdkit.installed import installed
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.weighting import PROBLEM_WEIGHTS, TOKEN_WEIGHTS, TURN_WEIGHTS
from opdkit.methods.weighting.base import Named
from opdkit.recipe.user_files import files_beside
from opdkit.tasks.base import place_and_fault

_FAILURES = (Exception, SystemExit)


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What a key of a recipe chooses: one of ours, or a class of the user's with this base."""

    word: str
    key: str  # of the recipe's section: what chooses
    table: Mapping[str, type[BaseModel]]
    base: type[BaseModel]
    group: str  # of entry points
    one_of: tuple[str, ...] = ()  # methods of which a class must define one at least


METHOD = Kind("method", "name", METHODS, Method, "methods")
CONTEXT = Kind("context", "kind", CONTEXTS, Context, "contexts", ("read", "read_groups"))
TOKENS = Kind("weight of tokens", "name", TOKEN_WEIGHTS, Named, "token_weights")
TURNS = Kind("weight of turns", "name", TURN_WEIGHTS, Named, "turn_weights")
PROBLEMS = Kind("weight of problems", "name", PROBLEM_WEIGHTS, Named, "problem_weights")


@dataclass(frozen=True, slots=True)
class _Imported:
    module: ModuleType
    shown: str
    digests: Mapping[str, str]  # "", or " imports NAME" -> sha256


_modules: dict[tuple[Path, str], ModuleType] = {}  # (file, its sha256)
_once: dict[Path, str] = {}  # modules, with their sha256 when they were first named
_classes: dict[tuple[type[BaseModel], str], type[BaseModel]] = {}
_digests: dict[type[BaseModel], Mapping[str, str]] = {}


def is_reference(name: str) -> bool:
    """Whether it says where a class is, and is no name of a table."""
    return ":" in name or name.endswith(".py")


def class_of(name: Any, kind: Kind) -> type[BaseModel] | None:
    """The row of `kind.table`, or `user_class`; None for what is neither. Raises ValueError as that does."""
    return kind.table.get(name) or user_class(name, kind) if isinstance(name, str) else None


def user_class(name: str, kind: Kind) -> type[BaseModel] | None:
    """The class, whose `kind.key` is `name`; None for a plain name that no installed package has either.

    Raises ValueError with the rest of a sentence: not there, broken, or no `kind.word`.
    """
    target = name if is_reference(name) else installed(kind.group).get(name)
    if target is None:
        return None
    where, _, attribute = target.partition(":")
    imported = _from_file(Path(where).expanduser()) if where.endswith(".py") else _from_module(where)
    found = _class_of(imported, attribute, kind)
    if (found, name) not in _classes:
        own: dict[str, Any] = {kind.key: (Literal[name], name)}
        _classes[found, name] = create_model(found.__name__, __base__=found, __module__=found.__module__, **own)
    chosen = _classes[found, name]
    _digests[chosen] = imported.digests
    return chosen


def digests_of(chosen: BaseModel) -> Mapping[str, str]:
    """{"": sha256 of its file, " imports NAME": of what that imports from beside it}; empty for what is ours."""
    return _digests.get(type(chosen), {})


def fault_of(error: BaseException) -> str:
    """What the user's code raised, in one line with its place."""
    return place_and_fault(error, skip=__file__)


def _class_of(imported: _Imported, attribute: str, kind: Kind) -> type[BaseModel]:
    classes = [value for value in vars(imported.module).values() if inspect.isclass(value)]
    own = [one for one in classes if one.__module__ == imported.module.__name__ and not one.__name__.startswith("_")]
    fitting = [value for value in own if issubclass(value, kind.base)]
    names = ", ".join(value.__name__ for value in fitting or own) or "no class"
    if not attribute and len(fitting) != 1:
        raise ValueError(f"does not say which class of {imported.shown} is meant ({names}); add :CLASS")
    found: Any = getattr(imported.module, attribute, None) if attribute else fitting[0]
    if found is None:
        raise ValueError(f"cannot be found: {imported.shown} has no {attribute}; it defines {names}")
    base = f"{kind.base.__module__}.{kind.base.__name__}"
    if not inspect.isclass(found) or not issubclass(found, kind.base):
        raise ValueError(f"is no {kind.word}; make {attribute} in {imported.shown} a class with the base {base}")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"is no whole {kind.word}: {found.__name__} does not define {', '.join(lacking)} (see {base})")
    if kind.one_of and all(getattr(found, name) is getattr(kind.base, name) for name in kind.one_of):
        raise ValueError(
            f"is no whole {kind.word}: {found.__name__} defines neither {' nor '.join(kind.one_of)} (see {base})"
        )
    return found


def _from_file(path: Path) -> _Imported:
    if not path.is_file():
        raise ValueError(f"cannot be found: there is no file {path} (looked up from {Path.cwd()})")
    path = path.resolve()
    content = path.read_bytes()  # what runs, and what the digest is of
    own = hashlib.sha256(content).hexdigest()
    digests = {"": own, **_known(files_beside(path, content, root=path.parent))}
    if (path, own) not in _modules:
        spec = importlib.util.spec_from_file_location(f"opdkit_user_{path.stem}_{own[:12]}", path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pydantic and dataclasses look their module up
        _also_look_in(path.parent)
        try:
            exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
        except _FAILURES as error:
            del sys.modules[spec.name]
            raise ValueError(f"cannot be imported: {fault_of(error)}") from error
        _modules[path, own] = module
    return _Imported(_modules[path, own], path.name, digests)


def _from_module(name: str) -> _Imported:
    _also_look_in(Path.cwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"cannot be found: there is no module {error.name} (looked up in {Path.cwd()} as well)"
            ) from None
        raise ValueError(f"cannot be imported: {fault_of(error)}") from error
    except _FAILURES as error:
        raise ValueError(f"cannot be imported: {fault_of(error)}") from error
    file = Path(getattr(module, "__file__", None) or "")
    if file.suffix != ".py" or not file.is_file():
        return _Imported(module, name, {})
    depth = name.count(".") + (file.name == "__init__.py")
    package = name.partition(".")[0]
    beside = files_beside(file, file.read_bytes(), root=file.resolve().parents[depth], package=package)
    return _Imported(module, name, _known({"": file, **beside}))


def _known(files: Mapping[str, Path]) -> dict[str, str]:
    """Their digests. Python imports a module once: one that was edited since then is not what would run."""
    found = {}
    for name, path in files.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if _once.setdefault(path.resolve(), digest) != digest:
            raise ValueError(f"needs {path}, which has changed since this process imported it; start Python again")
        found[f" imports {name}" if name else ""] = digest
    return found


def _also_look_in(folder: Path) -> None:
    """Last: nothing that is installed is hidden by it."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
