"""Code of the user's that a recipe names (a task, an environment): where it is, what a process of its own says of it,
and the same code again in every process that runs it later.

    "file.py", "file.py:Name"                    a file
    "package.module", "package.module:Name"      a module; from the current folder, too
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opdkit.errors import UserError
from opdkit.tasks.arguments import OptionArgument, argument_from_json
from opdkit.tasks.base import GraderDown
from opdkit.tasks.user.process import Failed, Lost, UserProcess

START_LIMIT_S = 60.0  # of importing what the recipe names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UserCode:
    """What a recipe's reference names."""

    reference: str
    path: Path | None  # of the file; None: a module
    content: bytes | None  # of the file, when it was first read: this is what runs, also if it is edited during a run
    arguments: tuple[OptionArgument, ...]
    columns: tuple[str, ...]  # of the data, that it asks for
    files: Mapping[str, tuple[str, str]]  # "", or " imports NAME" -> path, sha256; empty: opdkit's own

    @property
    def is_as_read(self) -> bool:
        """Whether no file of it has changed."""
        return all(file_digest(Path(file)) == digest for file, digest in self.files.values())

    def import_in(self, process: UserProcess) -> None:
        """Raises UserError where it is other code by now, Failed where it cannot be imported."""
        said = process.ask(_request(self.reference, self.path, self.content), START_LIMIT_S)
        for part, (file, digest) in self.files.items():
            if said["files"].get(part) != [file, digest] and not (part == "" and self.content is not None):
                raise UserError(
                    f"{file} has changed since it was first read; start again, for the same code throughout"
                )


C = TypeVar("C", bound=UserCode)
_known: dict[tuple[type[UserCode], str, Path], UserCode] = {}


def find(
    kind: type[C], reference: str, *, worker: str, make: Callable[[Mapping[str, Any]], C], slow: str, unknown: str
) -> C:
    """The same object as long as no file of it has changed.

    worker: the module whose process imports it. make: from what that says and the fields of a UserCode. slow: where
    what takes long belongs. unknown: says of a name without file or module that it is none.
    Raises ValueError with one sentence: not there, broken, without end, or not of this kind.
    """
    module_name = reference.partition(":")[0]
    path = Path(module_name).expanduser() if module_name.endswith(".py") else None
    if path is None and "." not in module_name and ":" not in reference:
        raise ValueError(unknown)
    if path is not None and not path.is_file():
        raise ValueError(f"there is no file {path} (looked up from {Path.cwd()})")
    key = (kind, reference, Path.cwd())
    found = _known.get(key)
    if not isinstance(found, kind) or not found.is_as_read:
        found = _described(reference, None if path is None else path.resolve(), worker, make, slow)
        _known[key] = found
    return found


def _described(reference: str, path: Path | None, worker: str, make: Callable[[Mapping[str, Any]], C], slow: str) -> C:
    content = None if path is None else path.read_bytes()
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    process = UserProcess(worker)
    try:
        said = process.ask(_request(reference, path, content), START_LIMIT_S)
        files = {
            str(part): (str(file), digest if digest and not part else str(known))
            for part, (file, known) in said["files"].items()
        }
        fields = {
            "reference": reference,
            "path": path,
            "content": content,
            "arguments": tuple(argument_from_json(argument) for argument in said["arguments"]),
            "columns": tuple(str(name) for name in said["columns"]),
            "files": files,
        }
        return make({**said, **fields})
    except Lost as error:
        raise ValueError(
            f"{path or reference} cannot be imported: {error}; what is slow or may not return belongs into {slow}"
        ) from None
    except (Failed, GraderDown, UserError) as error:
        raise ValueError(str(error)) from None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path or reference} was imported by a process that answers nonsense: {error!r}") from None
    finally:
        process.end()


def fields_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of a UserCode, among all that a process said."""
    return {name: said[name] for name in UserCode.__slots__}


def file_digest(file: Path) -> str | None:
    """None: it cannot be read."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def _request(reference: str, path: Path | None, content: bytes | None) -> dict[str, Any]:
    """What tells the other side which code to import: of a file, the bytes that were read first."""
    encoded = None if content is None else base64.b64encode(content).decode()
    return {"do": "import", "reference": reference, "path": None if path is None else str(path), "content": encoded}
