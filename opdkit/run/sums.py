"""sums.txt of a run folder: what each of its files was when it was written, so that a changed bit is told.

One line a file, "<sha256>  <name>  <crc32 of both>", written before the file takes its name: a crash in between leaves
a line too many, never a file without one. A file that was written again has several lines and may be any of them; the
line of metrics.jsonl, which grows, says how many of its bytes it is of ("metrics.jsonl:1234"). Checkpoints have sums of
their own (SHA256SUMS). Runs from before this file have none, and nothing is said of them.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from functools import lru_cache
from pathlib import Path

SUMS = "sums.txt"
MOST_BYTES = 64 << 20  # of a stranger's


def begin(root: Path) -> None:
    """From now on the files of this run are noted."""
    (root / SUMS).touch()


def note(path: Path, content: Path) -> None:
    """That the file `content` becomes `path`, where that is a file of a run that is noted."""
    if (root := _root_of(path)) is not None:
        with content.open("rb") as file:
            _append(root, hashlib.file_digest(file, "sha256").hexdigest(), path.relative_to(root).as_posix())


def note_so_far(path: Path) -> None:
    """What is in a file that grows."""
    if (root := _root_of(path)) is not None:
        content = path.read_bytes()
        _append(root, hashlib.sha256(content).hexdigest(), f"{path.relative_to(root).as_posix()}:{len(content)}")


def changed(root: Path) -> list[str]:
    """A sentence for each file that is not what was written, beside rows/, which are compared when they are read."""
    if not (root / SUMS).is_file():
        return []
    known, faults = _known(root)
    said = list(faults)
    for name, digests in known.items():
        file, _, size = name.partition(":")
        path = root / file
        if file.startswith("rows/") or not path.is_file():
            continue
        if size and path.stat().st_size < int(size):
            said.append(f"{path} is shorter than it was: {path.stat().st_size} bytes of {size}")
        elif _digest(path, int(size) if size else None) not in digests:
            said.append(f"{path} is not what was written (its checksum in {SUMS} is another one)")
    return said


def is_changed(path: Path) -> bool:
    """Whether this file of a run is another than was written; False also where nothing is known of it."""
    root = _root_of(path)
    digests = _known(root)[0].get(path.relative_to(root).as_posix()) if root is not None else None
    return digests is not None and _digest(path, None) not in digests


def _root_of(path: Path) -> Path | None:
    return next((root for root in path.parents[:2] if (root / SUMS).is_file()), None)


def _append(root: Path, digest: str, name: str) -> None:
    line = f"{digest}  {name}"
    try:
        with (root / SUMS).open("a", encoding="utf-8") as file:
            file.write(f"{line}  {zlib.crc32(line.encode()):08x}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(root / SUMS)) from error


def _known(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    """({name: digests}, what is wrong with the list itself)."""
    at = (root / SUMS).stat()
    return _read(root, at.st_mtime_ns, at.st_size)


@lru_cache(maxsize=4)
def _read(root: Path, changed_at: int, size: int) -> tuple[dict[str, set[str]], list[str]]:
    known: dict[str, set[str]] = {}
    with (root / SUMS).open("rb") as content:
        lines = content.read(MOST_BYTES).split(b"\n")
    broken = len(lines[-1]) > 0 or (len(lines) == 1 and (root / "metrics.jsonl").is_file())
    for line in lines[:-1]:
        rest, _, check = line.decode("utf-8", "replace").rpartition("  ")
        digest, _, name = rest.partition("  ")
        file, grows, at = name.partition(":")
        inside = file and not Path(file).is_absolute() and ".." not in Path(file).parts
        if not inside or (grows and not at.isdecimal()) or check != f"{zlib.crc32(rest.encode()):08x}":
            broken = True
            continue
        if grows:
            known = {other: found for other, found in known.items() if other.partition(":")[0] != file}
        known.setdefault(name, set()).add(digest)
    return known, [f"{root / SUMS} is damaged: not every file could be compared"] if broken else []


def _digest(path: Path, size: int | None) -> str | None:
    """Of its first `size` bytes (None: of all); None for what cannot be read."""
    try:
        with path.open("rb") as file:
            if size is None:
                return hashlib.file_digest(file, "sha256").hexdigest()
            return hashlib.sha256(file.read(size)).hexdigest()
    except OSError:
        return None
