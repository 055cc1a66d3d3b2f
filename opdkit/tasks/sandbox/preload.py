"""Imports in the zygote whatever a program may import: once the walls stand, no module can be read from disk."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

# Not for programs (other interpreters, tests, installers, windows), or with effects at import (a browser, a poem, the
# terminal).
_SKIPPED = frozenset(
    {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "test", "tests", "lib2to3", "ensurepip"}
    | {
        "venv",
        "distutils",
        "readline",
        "rlcompleter",
        "conftest",
        "__main__",
        "idle_test",
        "f2py",
        "pip",
        "mypy_plugin",
    }
)
_SKIPPED_PREFIXES = ("_test", "_xx", "_tkinter")


def preload(packages: Sequence[str]) -> list[str]:
    """Imports the standard library and `packages`, all with their submodules. Returns the packages not installed."""
    absent = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules are still modules
        for name in sorted(sys.stdlib_module_names):
            _import_tree(name)
        for name in packages:
            if _import_tree(name) is None:
                absent.append(name)
    return absent


def _import_tree(name: str) -> ModuleType | None:
    last = name.rpartition(".")[2]
    if last in _SKIPPED or last.startswith(_SKIPPED_PREFIXES):
        return None
    try:
        module = importlib.import_module(name)
    except (ImportError, AttributeError, OSError, RuntimeError, SystemExit):
        return None  # modules of other platforms, or without the library they wrap
    for child in _children(module):
        _import_tree(child)
    return module


def _children(module: ModuleType) -> Iterator[str]:
    with contextlib.suppress(AttributeError):  # only packages have a path
        for info in pkgutil.iter_modules(module.__path__):
            yield f"{module.__name__}.{info.name}"
