"""Files that the ranks of a run write into one folder, each its own, and that the first one completes: at once, or
while the run goes on. A failure of any rank is one of all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from opdkit.ranks.base import Ranks

POLL_S = 0.05


def on_all(ranks: Ranks, do: Callable[[], None] | None) -> None:
    """Raises what `do` raised of the system's errors, on all ranks; None: this rank has nothing to do."""
    failed: list[Exception] = []

    def done() -> list[str]:
        try:
            if do is not None:
                do()
        except (OSError, SafetensorError) as error:
            failed.append(error)
        return [str(error) for error in failed]

    told = ranks.from_all(done)
    if failed:
        raise failed[0]
    if told:
        raise OSError(told[0])


class Behind:
    """The same in a thread. It asks no rank anything, which would come between what the run asks: that a rank's files
    are there, the first one sees in the folder."""

    def __init__(self, ranks: Ranks, folder: Path, write: Callable[[], None], finish: Callable[[], None]) -> None:
        """finish: by the first rank, when all have written."""
        self._ranks, self._folder, self._write, self._finish = ranks, folder, write, finish
        self._failed: BaseException | None = None
        self._wrote, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is there. Called by all ranks; raises as `on_all`."""
        self._wrote.wait()
        try:
            on_all(self._ranks, self._raise)
        except BaseException:
            self._given_up.set()
            self._thread.join()
            raise
        self._thread.join()
        on_all(self._ranks, self._raise)

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            self._write()
            self._mark(self._ranks.rank).touch()
        except BaseException as error:  # it is raised where somebody hears it
            self._failed = error
        finally:
            self._wrote.set()
        if self._failed is None and self._ranks.is_first:
            try:
                self._complete()
            except BaseException as error:
                self._failed = error

    def _complete(self) -> None:
        marks = [self._mark(rank) for rank in range(self._ranks.size)]
        while not all(mark.exists() for mark in marks):
            if self._given_up.wait(POLL_S):
                return
        for mark in marks:
            mark.unlink()
        self._finish()

    def _mark(self, rank: int) -> Path:
        return self._folder / f".written-by-{rank}"
