"""What is printed where nothing can be redrawn, and a run whose reader has gone away."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from opdkit.errors import Interrupted
from opdkit.metric_lines import of_steps, read_metrics
from opdkit.recipe import Recipe
from opdkit.run.console import Bar, Interrupt, Terminal
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


def reader_gone() -> Terminal:
    """A console on a pipe that nobody reads any more, as after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    return Terminal(file=os.fdopen(write, "w"), width=200)


def test_a_closed_console_is_quiet() -> None:
    console = reader_gone()
    console.print("one")
    assert console.closed
    console.print("two")
    console.file.flush()


def test_a_run_whose_reader_has_gone_stops_and_is_saved(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """It stops where nothing is half done, as after Ctrl-C; the same run goes on to its end with --resume."""
    steps = ("train.steps=4", "train.save_every=0", "train.problems_per_step=2", "data.limit=8")
    every_step = ('eval.data="arithmetic:merge-3:test"', "eval.every=1", "eval.limit=2")
    made = recipe("opd", *steps, *every_step, "eval.before=false", "eval.teacher=false")
    with pytest.raises(Interrupted):
        train(made, console=reader_gone())
    saved = checkpoint.latest(made.run_dir / "checkpoints")
    assert saved is not None and 0 < saved.step < 4
    train(made, console=Terminal(file=io.StringIO()), resume=True)
    assert [line["step"] for line in of_steps(read_metrics(made.run_dir / "metrics.jsonl"))] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
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
    console = Terminal(file=os.fdopen(side, "w"), force_terminal=True)
    os.close(main)
    console.print("one")
    assert console.closed
    console.print("two")
