"""Which files a Python file imports from beside it, read off its text: nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path


def files_beside(file: Path, content: bytes, *, root: Path, package: str | None = None) -> Mapping[str, Path]:
    """{path below `root`: file} of what `file` imports from there, and what these import, without `file` itself.

    root: where absolute names are looked up. package: only names of this one are (a folder of installed packages holds
    everybody's). Text that is no Python imports nothing.
    """
    found: dict[str, Path] = {}
    left = [(file, content)]
    while left:
        here, text = left.pop()
        for name in (part for whole in _imported(here, text, root) for part in _with_packages(whole)):
            path = _file_of(root, name)
            if path is None or path == file or (package is not None and name.partition(".")[0] != package):
                continue
            shown = str(path.relative_to(root))
            if shown not in found:
                found[shown] = path
                left.append((path, path.read_bytes()))
    return dict(sorted(found.items()))


def _with_packages(name: str) -> Iterator[str]:
    """a, a.b and a.b.c of a.b.c: a package's own file runs before what is in it."""
    parts = name.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _imported(file: Path, text: bytes, root: Path) -> Iterator[str]:
    """Dotted names; of `from a import b` a.b, since b may be a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = file.parents[node.level - 1]
                if not folder.is_relative_to(root):
                    continue
                base = ".".join([*folder.relative_to(root).parts, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _file_of(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    choices = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((choice for choice in choices if name and choice.is_file()), None)
