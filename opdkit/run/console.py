"""What the person at the keyboard sees while a run works, how Ctrl-C is heard, and a reader who has gone away."""

from __future__ import annotations

import errno
import html
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opdkit.errors import Interrupted

LINE_EVERY_S = 5.0  # where there is no terminal to redraw a bar on
REDRAW_S = 0.2  # of a notebook's bar: every redrawing is a message to a browser


class Terminal(Console):
    """A console that stays quiet once nobody reads it any more (`opdkit train ... | head -1`), instead of ending the
    process wherever it happens to be: a run hears of it from `Interrupt`, where nothing is half done."""

    closed = False

    def on_broken_pipe(self) -> None:
        self.closed = self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # or Python's own flush at exit would complain
        os.close(nowhere)

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # what a terminal gives that was closed, as after SIGHUP
                raise
            self._buffer.clear()
            self.on_broken_pipe()


def is_live(console: Console) -> bool:
    """Whether lines may be redrawn: on a terminal that can, for a person who did not ask for plain text (NO_COLOR)."""
    return console.is_interactive and not console.no_color


class Interrupt:
    """The first Ctrl-C (SIGTERM, or SIGHUP of a closed terminal) asks; the second one does not wait. A console that
    was closed asks too."""

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console

    @contextmanager
    def listening(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            self._console.print("[yellow]Stopping after this step. Press Ctrl-C again to stop at once.[/yellow]")

        try:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asked for work that outlives its shell
                numbers.append(signal.SIGHUP)
            old = {s: signal.signal(s, hear) for s in numbers}
        except ValueError:  # not the main thread (a notebook's, a test's): signals belong to somebody else
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def check(self) -> None:
        if self.asked or (isinstance(self._console, Terminal) and self._console.closed):
            raise Interrupted


class Cell:
    """A bar below a notebook's cell, redrawn in place. IPython is there: a notebook runs in it."""

    def __init__(self, label: str, total: int) -> None:
        from IPython.display import HTML, display

        self._html, self._label, self._total, self._drawn = HTML, label, total, 0.0
        self._handle = display(HTML(""), display_id=True)

    def draw(self, done: int, words: str) -> None:
        now = time.monotonic()
        if done < self._total and now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        bar = f'<progress value="{done}" max="{self._total}"></progress>'
        said = html.escape(f"{done}/{self._total}  {words}")
        self._handle.update(self._html(f"{html.escape(self._label)} {bar} {said}"))


class Bar:
    """A progress bar on a terminal and in a notebook, a line every few seconds elsewhere (see `is_live`)."""

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        self._console, self._label, self._total, self._done = console, label, total, done
        self._live = is_live(console)
        self._cell = Cell(label, total) if console.is_jupyter and not console.quiet else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, note="")
        self._last = time.monotonic()
        self._start, self._first = time.monotonic(), done

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.stop()

    def activity(self, done: int, total: int) -> None:
        """What a long step is doing right now, where a bar is drawn."""
        self._progress.update(self._task, note=f"sampling {done}/{total}")
        if self._cell is not None:
            self._cell.draw(self._done, f"sampling {done}/{total}")

    def update(self, done: int, note: str = "") -> None:
        self._done = done
        self._progress.update(self._task, completed=done, note=note)
        if self._cell is not None:
            self._cell.draw(done, note)
            return
        now = time.monotonic()
        if not self._live and (now - self._last >= LINE_EVERY_S or done == self._total):
            self._last = now
            pace = (now - self._start) / max(1, done - self._first)
            left = f"{pace * (self._total - done):.0f} s left"
            self._console.print(f"{self._label} {done}/{self._total}  {note}  {left}", highlight=False, soft_wrap=True)


class Bars:
    """One bar after another, for work that tells (label, done, total) as it goes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label: str | None = None
        self._open = ExitStack()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.close()

    def update(self, label: str, done: int, total: int) -> None:
        if label != self._label:
            self._open.close()  # a terminal has room for one
            self._label, self._bar = label, self._open.enter_context(Bar(self._console, label, total))
        self._bar.update(done)
