"""What is printed where nothing can be redrawn, and a run whose reader has gone away."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from opdkit.errors import Interrupted
from opdkit.metric_lines import of_steps, read_metrics
from opdkit.recipe import Recipe
from opdkit.run.console import Bar, Interrupt, Terminal, counting, told_while_waiting
from opdkit.training.loop import train
from opdkit.training.saved import checkpoint


@pytest.mark.parametrize(
    ("is_terminal", "environment", "live"),
    [
        (True, {"TERM": "xterm-256color"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        (False, {"TERM": "xterm-256color"}, False),
    ],
)
def test_a_bar_only_where_lines_can_be_redrawn(is_terminal: bool, environment: dict[str, str], live: bool) -> None:
    """Elsewhere plain lines, at least one for the end: no cursor is moved and nothing is coloured."""
    said = io.StringIO()
    console = Console(file=said, force_terminal=is_terminal, _environ=environment, width=120)
    with Bar(console, "work", 3) as bar:
        for done in (1, 2, 3):
            bar.activity(done, 9)
            bar.update(done, note="loss 0.5")
    assert ("\x1b[" in said.getvalue()) == live
    if not live:
        assert said.getvalue().splitlines() == ["work 3/3  loss 0.5  0 s left"]


def drawn(text: str, width: int) -> list[str]:
    """What a terminal shows after each redrawing, by the few codes that rich sends: line up, clear line."""
    frames: list[str] = []
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])", re.sub(r"\x1b\[[0-9;]*m", "", text)):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r" and not part.startswith("\x1b"):
            assert len(part) <= width
            lines[row] = part
            frames.append("\n".join(line.rstrip() for line in lines if line.strip()))
    return frames


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_terminal_has_one_line_however_narrow(width: int) -> None:
    """A phase within another takes its line and gives it back; what is counted is never cut."""
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, _environ={"TERM": "xterm-256color"}, width=width)
    with Bar(console, "a-run-of-a-rather-long-name", 400, done=17) as outer:
        outer.update(18, note="loss 0.7304  reward 0.000  383 tok/s")
        with Bar(console, "student after 18 steps: a/path/to/some/data.jsonl", 32) as inner:
            inner.update(5)
            inner._progress.refresh()
        outer.activity(64, 64)
        outer._progress.refresh()
    frames = drawn(said.getvalue(), width)
    assert len(frames) > 3 and all("\n" not in frame for frame in frames)
    assert all(re.search(r" \d+/(400|32)( |$)", frame) for frame in frames), frames
    assert any("5/32" in frame for frame in frames) and "18/400" in frames[-1]
    assert Bar._open == []


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}])
def test_waiting_and_counting_redraw_nothing_where_nothing_can_be(environment: dict[str, str]) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, _environ=environment, width=80)
    with counting(console, "rows read") as count, told_while_waiting(console, "starting") as wait:
        count(100)
        wait(20.0)
    assert said.getvalue() == "starting: 20 s\n"


@pytest.fixture
def reader_gone() -> Iterator[Terminal]:
    """A console on a pipe that nobody reads any more, as after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    with suppress(OSError), os.fdopen(write, "w") as gone:
        yield Terminal(file=gone, width=200)


def test_a_closed_console_is_quiet(reader_gone: Terminal) -> None:
    console = reader_gone
    console.print("one")
    assert console.closed
    console.print("two")
    console.file.flush()


def test_a_run_whose_reader_has_gone_stops_and_is_saved(
    recipe: Callable[..., Recipe], tmp_path: Path, reader_gone: Terminal
) -> None:
    """It stops where nothing is half done, as after Ctrl-C; the same run goes on to its end with --resume."""
    steps = ("train.steps=4", "train.save_every=0", "train.problems_per_step=2", "data.limit=8")
    every_step = ('eval.data="arithmetic:merge-3:test"', "eval.every=1", "eval.limit=2")
    made = recipe("opd", *steps, *every_step, "eval.before=false", "eval.teacher=false")
    with pytest.raises(Interrupted):
        train(made, console=reader_gone)
    saved = checkpoint.latest(made.run_dir / "checkpoints")
    assert saved is not None and 0 < saved.step < 4
    train(made, console=Terminal(file=io.StringIO()), resume=True)
    assert [line["step"] for line in of_steps(read_metrics(made.run_dir / "metrics.jsonl"))] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_closed_terminal_asks_as_ctrl_c_does(number: signal.Signals) -> None:
    """The step ends first; the second one does not wait. Under `nohup` SIGHUP stays unheard."""
    interrupt = Interrupt(Terminal(file=io.StringIO()))
    found = signal.signal(number, signal.SIG_DFL)  # these tests may run under `nohup`
    before = signal.getsignal(number)
    with interrupt.listening():
        signal.raise_signal(number)
        with pytest.raises(Interrupted):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    signal.signal(number, found)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_console_whose_terminal_is_gone_is_quiet() -> None:
    """Writing to a closed terminal gives EIO, which must end no step."""
    main, side = os.openpty()
    with suppress(OSError), os.fdopen(side, "w") as gone:
        console = Terminal(file=gone, force_terminal=True)
        os.close(main)
        console.print("one")
        assert console.closed
        console.print("two")
