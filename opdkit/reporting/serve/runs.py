"""The runs below a folder, by the names in their addresses, and their pages, made again when their files change.

A run folder is a stranger's: only folders that were found are read, no link leads out of the folder that is served, and
what fails to be shown is a sentence on its page.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opdkit.errors import UserError
from opdkit.printable import printable
from opdkit.reporting.compare import comparison
from opdkit.reporting.decode import tokenizer_decode
from opdkit.reporting.files import writer_lives
from opdkit.reporting.html.document import Live, document, notes, part
from opdkit.reporting.html.markup import tag
from opdkit.reporting.page import page
from opdkit.reporting.run import read_run
from opdkit.reporting.serve.index import index_page

DEPTH = 2  # folders below the served one: a pipeline's stages are below its own
MOST_RUNS = 200  # the newest
MOST_FILES = 20_000  # of a run that are looked at
MOST_PAGES = 32  # kept in memory
REST = 10.0  # a page is not made again before this many times the seconds that it took have passed


@dataclass(slots=True)
class Made:
    """A page as it was made. mark: of the files that it was made from."""

    mark: str
    text: bytes
    at: float  # time.monotonic
    seconds: float


@dataclass(slots=True)
class Runs:
    """What is served of a folder. Raises UserError for one that holds no run."""

    root: Path
    _made: dict[str, Made] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.root = Path(os.path.realpath(self.root))
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no folder; give a run folder, or the folder of several")
        if not self.found():
            raise UserError(f"{self.root} holds no run (no recipe.toml, no metrics.jsonl); start one, then serve it")

    def found(self) -> dict[str, Path]:
        """Name -> folder, the newest first."""
        if _is_run(self.root):
            return {self.root.name: self.root}
        runs = sorted(_below(self.root, DEPTH), key=_changed, reverse=True)[:MOST_RUNS]
        return {str(run.relative_to(self.root)): run for run in runs}

    def index(self) -> Made:
        found = self.found()
        states = [(name, self.mark(run), writer_lives(run)) for name, run in found.items()]
        return self._page("", _digest(states), lambda mark: index_page(self.root.name, found, self._leading_out, mark))

    def run(self, name: str) -> Made | None:
        """None: there is no such run."""
        run = self.found().get(name)
        if run is None:
            return None
        return self._page(name, self.mark(run), lambda mark: self._show(run, mark))

    def several(self, names: Sequence[str]) -> Made | None:
        found = self.found()
        if not names or any(name not in found for name in names):
            return None
        runs = [found[name] for name in dict.fromkeys(names)]
        key, mark = "\0".join(("compare", *names)), _digest([self.mark(run) for run in runs])
        return self._page(key, mark, lambda mark: self._compare(runs, mark))

    def mark(self, run: Path) -> str:
        """Changes when a file of the run does."""
        return _digest([(str(path), _stamp(path)) for path in _files(run)])

    def _page(self, key: str, mark: str, make: Callable[[str], str]) -> Made:
        """As it was made last, where nothing changed or it was made just now."""
        with self._lock:  # one at a time: pages are made by training machines too
            made = self._made.get(key)
            if made and (made.mark == mark or time.monotonic() - made.at < REST * made.seconds):
                return made
            start = time.monotonic()
            text = make(mark).encode()
            self._made.pop(key, None)
            made = self._made[key] = Made(mark, text, time.monotonic(), time.monotonic() - start)
            while len(self._made) > MOST_PAGES:
                self._made.pop(next(iter(self._made)))
            return made

    def _show(self, run: Path, mark: str) -> str:
        live = Live(mark, up="../../")
        return self._or_sentence(run.name, live, [run], lambda: self._page_of(run, live))

    def _page_of(self, run: Path, live: Live) -> str:
        contents = read_run(run)
        return page(contents, tokenizer_decode(contents), live)

    def _compare(self, runs: Sequence[Path], mark: str) -> str:
        live = Live(mark, up="./")
        return self._or_sentence("Comparison", live, runs, lambda: comparison([read_run(run) for run in runs], live))

    def _or_sentence(self, title: str, live: Live, runs: Sequence[Path], make: Callable[[], str]) -> str:
        try:
            for run in runs:
                if why := self._leading_out(run):
                    raise UserError(why)
            return make()
        except UserError as error:
            why = str(error)
        except Exception as error:  # a stranger's files: whatever they make fail, the other runs are still served
            why = printable(f"this run cannot be shown ({type(error).__name__}: {error})")
        return document(title, tag("header", tag("h1", title)), [part("Warnings", notes([why]))], live=live)

    def _leading_out(self, run: Path) -> str | None:
        """A sentence where a link of the run leads out of the folder that is served."""
        for path in _files(run):
            if path.is_symlink() or path.parent.is_symlink():
                real = Path(os.path.realpath(path))
                if not real.is_relative_to(self.root):
                    return (
                        f"{path.relative_to(self.root)} is a link that leads out of {self.root}: the run is not shown"
                    )
        return None


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in inside:
        path = folder / name
        if name.startswith("."):
            continue
        if _is_run(path):
            yield path
        if depth > 1:
            yield from _below(path, depth - 1)


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in ("recipe.toml", "metrics.jsonl"))


def _changed(run: Path) -> float:
    return max((_stamp(run / name)[0] for name in ("metrics.jsonl", "recipe.toml", "summary.json")), default=0.0)


def _files(run: Path) -> Iterator[Path]:
    """All that a page is made from."""
    yield from (run / name for name in ("recipe.toml", "environment.json", "metrics.jsonl", "summary.json", ".lock"))
    left = MOST_FILES
    for name in ("eval", "rows"):
        yield run / name
        try:
            inside = sorted(entry.path for entry in os.scandir(run / name))
        except OSError:
            continue
        yield from map(Path, inside[-left:])
        left -= min(left, len(inside))


def _stamp(path: Path) -> tuple[float, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return (0.0, -1)
    return (status.st_mtime, status.st_size)


def _digest(what: object) -> str:
    return hashlib.blake2b(repr(what).encode(errors="surrogateescape"), digest_size=12).hexdigest()
