"""The command line. Every command imports what it needs when it runs, so that `opdkit --help` is instant.

A command is a function in the file of its area.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated

import typer
from rich.markup import escape

from opdkit import __version__
from opdkit.cli.base import app, console, errors
from opdkit.data.files.write import SHOWN
from opdkit.errors import Interrupted, UserError

# Each adds its commands to `app`; --help shows them in this order.
import opdkit.cli.training  # isort: skip
import opdkit.cli.imports  # isort: skip
import opdkit.cli.answers  # isort: skip
import opdkit.cli.analysis  # isort: skip
import opdkit.cli.agreement  # isort: skip
import opdkit.cli.data  # isort: skip
import opdkit.cli.reports  # isort: skip
import opdkit.cli.catalog  # isort: skip  # noqa: F401


def main() -> None:
    """Run a command; a UserError becomes its sentences and status 2, Ctrl-C becomes status 130."""
    if not sys.stderr.isatty():  # the libraries' bars are redrawn lines; in a log file they are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(prog_name="opdkit")  # also of python -m opdkit
    except OSError as error:  # of a named file: the user's, wherever it was met (too long a name, a loop of links)
        if error.filename is None:
            raise
        _print_error(f"{error.filename}: {error.strerror}; choose another path")
        sys.exit(2)
    except UserError as error:
        for sentence in str(error).splitlines():
            _print_error(sentence)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        errors.print(f"Stopped. {stop}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(130)


_LONG_WORD = re.compile(rf"\S{{{2 * SHOWN},}}")  # a path, say, that is refused for its length


def _print_error(sentence: str) -> None:
    short = _LONG_WORD.sub(lambda word: f"{word[0][:SHOWN]}... ({len(word[0])} characters)", sentence)
    errors.print(f"[bold red]error[/bold red] {escape(short)}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        console.print(__version__, highlight=False, soft_wrap=True)
        raise typer.Exit
