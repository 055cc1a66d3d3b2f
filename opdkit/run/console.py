"""Everything that is printed, how Ctrl-C is heard, and a reader who has gone away.

`say` prints, and nothing else does (tests/test_printing.py): paths, column names, recipe keys and model text are a
stranger's, so what is printed is text as it stands. It is no markup (`[x]`, `:name:` are themselves), and what a
terminal would obey is shown instead (`printable`).
"""

from __future__ import annotations

import errno
import html
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any, ClassVar, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console as Console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from opdkit.errors import Interrupted
from opdkit.printable import printable
from opdkit.ranks.base import ALONE, Ranks

LINE_EVERY_S = 5.0  # where there is no terminal to redraw a bar on
REDRAW_S = 0.2  # of a notebook's bar: every redrawing is a message to a browser

Mark = Literal["ok", "note", "warning", "dropped", "left out", "error"]
_COLOUR: dict[Mark, str] = {
    "ok": "green", "note": "cyan", "warning": "yellow", "dropped": "yellow", "left out": "yellow", "error": "bold red",
}  # fmt: skip


class Line(Text):
    """One line, of parts that may have a style: `Line("loss ", ("nan", "red"))`."""

    def __init__(self, *parts: str | tuple[str, str], style: str = "") -> None:
        super().__init__(style=style)
        for part in parts:
            text, own = (part, None) if isinstance(part, str) else part
            self.append(printable(text, keep="\t"), own)


class Table(RichTable):
    """A table whose headers, title and cells are text as it stands; a cell may have several lines. Colour: a `Line`."""

    def __init__(self, *headers: str, title: str | None = None, is_plain: bool = False, **options: Any) -> None:
        """is_plain: no borders, for columns beside each other."""
        if is_plain:
            options |= {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
        super().__init__(*headers, title=None if title is None else _cell(title, "table.title"), **options)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **options: Any) -> None:
        super().add_column(_cell(header), _cell(footer), **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(None if cell is None else _cell(cell) for cell in cells), **options)


def _cell(cell: RenderableType, style: str = "") -> Any:
    return Text(printable(cell, keep="\t\n"), style) if isinstance(cell, str) else cell


def say(console: Console, *what: str | Line | Table, mark: Mark | None = None, style: str = "") -> None:
    """Print lines and tables, a `str` being one line of the given style; the mark stands in front of the first."""
    for one in what:
        if isinstance(one, str):
            one = Line((one, style)) if mark is None else Line((mark, _COLOUR[mark]), " ", (one, style))
            mark = None
        console.print(one, markup=False, emoji=False, highlight=False, soft_wrap=isinstance(one, Line))


def say_json(console: Console, value: Any) -> None:
    """For other programs, and still nothing that a terminal obeys: JSON may write any character as an escape."""
    say(console, *json.dumps(value, indent=1).replace("\x7f", "\\u007f").split("\n"))


class _Heard(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, *record.getMessage().rstrip("\n").split("\n"), mark="warning")


def hear_logs(console: Console) -> None:
    """From here on what this process logs, and what Python's `warnings` say, is said on `console`."""
    logging.basicConfig(handlers=[_Heard(console)], level=logging.WARNING)
    logging.captureWarnings(True)


def progress_bar(done: float, total: float, width: int) -> RenderableType:
    """A bar for a cell of a table that is redrawn."""
    return ProgressBar(total=total, completed=done, width=width)


@contextmanager
def redrawn(console: Console) -> Iterator[Callable[[list[Line | Table]], None]]:
    """Gives what shows lines and tables in the place of those before. Only for a console that `is_live`."""
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        yield lambda what: live.update(Group(*what), refresh=True)


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
    """The first Ctrl-C (SIGTERM, SIGUSR1, or SIGHUP of a closed terminal) asks; the second one does not wait. A console
    that was closed asks too."""

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console

    @contextmanager
    def listening(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say(self._console, "Stopping after this step. Press Ctrl-C again to stop at once.", style="yellow")

        try:
            numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # the last: a queue's, before a time limit
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

    def check(self, ranks: Ranks = ALONE) -> None:
        """Raises Interrupted where it was asked for; on all ranks where on any of these."""
        if ranks.any(self.asked or (isinstance(self._console, Terminal) and self._console.closed)):
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


class _Short(TextColumn):
    """Text that gives way where a line is too narrow: it is cut, and what is counted beside it stays."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Bar:
    """A progress bar on a terminal and in a notebook, a line every few seconds elsewhere (see `is_live`). One that is
    opened within another takes its line until it is closed."""

    _open: ClassVar[list[Bar]] = []

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        self._console, self._label, self._total, self._done = console, printable(label), total, done
        self._live = is_live(console)
        self._cell = Cell(label, total) if console.is_jupyter and not console.quiet else None
        self._progress = Progress(
            _Short("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            _Short("{task.fields[note]}"),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task(self._label, total=total, completed=done, note="")
        self._last = time.monotonic()
        self._start, self._first = time.monotonic(), done

    def __enter__(self) -> Bar:
        if outer := self._around():
            outer._progress.stop()
        self._open.append(self)
        self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.stop()
        self._open.remove(self)
        if outer := self._around():
            outer._progress.start()

    def _around(self) -> Bar | None:
        """The bar that is open on the same console."""
        return next((bar for bar in reversed(self._open) if bar._console is self._console), None)

    def activity(self, done: int, total: int) -> None:
        """What a long step is doing right now, where a bar is drawn."""
        doing = f"sampling {done}/{total}" if done < total else "scoring, learning"
        self._progress.update(self._task, note=doing)
        if self._cell is not None:
            self._cell.draw(self._done, doing)

    def update(self, done: int, note: str = "") -> None:
        self._done = done
        self._progress.update(self._task, completed=done, note=printable(note))
        if self._cell is not None:
            self._cell.draw(done, note)
            return
        now = time.monotonic()
        if not self._live and (now - self._last >= LINE_EVERY_S or done == self._total):
            self._last = now
            pace = (now - self._start) / max(1, done - self._first)
            left = f"{pace * (self._total - done):.0f} s left"
            say(self._console, f"{self._label} {done}/{self._total}  {note}  {left}")


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


def _status(console: Console) -> AbstractContextManager[Status | None]:
    return console.status("") if is_live(console) else nullcontext()


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """A running count of what has no known end: redrawn on a terminal, a line every few seconds elsewhere."""
    last = time.monotonic()
    with _status(console) as status:

        def show(count: int) -> None:
            nonlocal last
            if status is not None and count % 100 == 0:
                status.update(Line(f"{count:,} {what}"))
            elif count % 100 == 0 and time.monotonic() - last > LINE_EVERY_S:
                last = time.monotonic()
                say(console, f"{count:,} {what}")

        yield show


@contextmanager
def told_while_waiting(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    """Seconds of what says nothing until it is there: redrawn on a terminal, a line now and then elsewhere."""
    told = 0.0
    with _status(console) as status:

        def show(seconds: float) -> None:
            nonlocal told
            if status is not None:
                status.update(Line(f"{what}: {seconds:.0f} s"))
            elif seconds - told > 2 * LINE_EVERY_S:
                told = seconds
                say(console, f"{what}: {seconds:.0f} s")

        yield show
