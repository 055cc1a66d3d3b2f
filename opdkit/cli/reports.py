"""Commands that show a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from opdkit.cli.base import AsJson, app, console, finite
from opdkit.errors import UserError
from opdkit.run.console import say, say_json


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run folder; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write.  [default: RUN/report.html; comparison.html for several]")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Write nothing: show a folder of runs in the browser, and follow them.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0: any that is free.")] = 0,
) -> None:
    """Write the page of a run, or one page that compares several.

    One self-contained HTML file from what the run folders hold; needs no model. The first run is what the others are
    compared with. With --serve, the pages of all runs of a folder, on this machine alone, until Ctrl-C.
    """
    if serve:
        from opdkit.reporting.serve.server import serve as serve_runs

        if len(runs) != 1 or out is not None:
            raise UserError("--serve takes one folder, that of the runs or of one run, and writes no page (no --out)")
        with contextlib.suppress(KeyboardInterrupt):
            serve_runs(runs[0], port, lambda words: say(console, words))
        return
    from opdkit.reporting import write_comparison, write_report

    path = write_report(runs[0], out=out) if len(runs) == 1 else write_comparison(runs, out or Path("comparison.html"))
    say(console, f"wrote {path}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder; one that is not there yet is waited for.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    every: Annotated[
        float, typer.Option(min=0.1, max=86400.0, callback=finite, help="Seconds between two looks.")
    ] = 1.0,
) -> None:
    """A running or finished run in the terminal.

    Steps, time left, curves, the last evaluation, warnings and the last answer, until the run ends.
    """
    from opdkit.reporting.watch import watch

    with contextlib.suppress(KeyboardInterrupt):  # only the looking ends
        watch(run, console, once=once, every_s=every)


@app.command()
def episodes(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="Of its saved steps.  [default: the last]")] = None,
    problem: Annotated[str | None, typer.Option(help="The id of a problem.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Which of its answers.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many are shown.")] = 1,
    json: AsJson = False,
) -> None:
    """Episodes of a run, turn by turn: what the model wrote, what the environment said.

    Out of the rows that the run saved; needs no model.
    """
    from opdkit.reporting.episodes import as_json, decode_of, read_episodes, shown

    chosen, found = read_episodes(run, step=step, problem=problem, sample=sample, count=count)
    decode = decode_of(run)
    if json:
        say_json(console, [as_json(chosen, rows, decode) for rows in found])
        return
    for rows in found:
        say(console, *shown(chosen, rows, decode))
