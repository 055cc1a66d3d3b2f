"""The command line. Every command imports what it needs when it runs, so that `opdkit --help` is instant.

A command is a function in the file of its area.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from functools import cache
from typing import Annotated, Any

import typer
import typer.main

from opdkit import __version__
from opdkit.cli.base import app, console, errors
from opdkit.data.files.write import SHOWN
from opdkit.errors import PAUSED, Interrupted, Paused, UserError
from opdkit.printable import printable
from opdkit.ranks.base import LOST, RankLost
from opdkit.ranks.join import is_launched, is_rank, leave
from opdkit.run.console import hear_logs, say

# Each adds its commands to `app`; --help shows them in this order.
import opdkit.cli.training  # isort: skip
import opdkit.cli.plan  # isort: skip
import opdkit.cli.doctor  # isort: skip
import opdkit.cli.imports  # isort: skip
import opdkit.cli.answers  # isort: skip
import opdkit.cli.analysis  # isort: skip
import opdkit.cli.agreement  # isort: skip
import opdkit.cli.data  # isort: skip
import opdkit.cli.reports  # isort: skip
import opdkit.cli.export  # isort: skip
import opdkit.cli.catalog  # isort: skip  # noqa: F401

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main() -> None:
    """Run a command; a UserError becomes its sentences and status 2, Ctrl-C becomes status 130, a run that paused 3."""
    if not is_rank():
        sys.exit(_status())
    try:  # torch's threads may turn an ordinary exit into an abort
        status = _status()
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


@cache
def command() -> Any:
    """All commands as click has them; reading them off their signatures takes a tenth of a second."""
    return typer.main.get_command(app)


def _status() -> int:
    if not sys.stderr.isatty():  # the libraries' bars are redrawn lines; in a log file they are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hear_logs(errors)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal without UTF-8
    try:
        return command()(prog_name="opdkit", standalone_mode=False) or 0  # the status of a typer.Exit, or None
    except _UsageError as error:
        _print_usage_error(error)
        return 2
    except OSError as error:  # the user's, wherever it was met: a path (too long, a loop of links), or the disk
        if error.errno in DISK_ERRORS:
            where = f"{error.filename}: " if error.filename is not None else ""
            _print_error(
                f"{where}the disk failed ({error.strerror}); what was saved before is kept: mend that, and "
                "run the same command again (a run with --resume)"
            )
        elif error.filename is not None:
            _print_error(f"{error.filename}: {error.strerror}; choose another path")
        else:
            raise
        return 2
    except UserError as error:
        for sentence in error.sentences:
            _print_error(sentence)
        return 2
    except Paused as stop:
        say(errors, *f"Paused. {stop}".split("\n"))
        return PAUSED
    except (Interrupted, KeyboardInterrupt, typer.Abort) as stop:
        say(errors, *f"Stopped. {stop}".split("\n"))
        return 130
    except RankLost as error:
        if not is_launched() or os.environ["RANK"] != "0":  # the launcher says it, and knows which rank it was
            _print_error(f"another rank ended, or did not answer ({error}): see what it says; go on with --resume")
        return LOST


# Of an argument that cannot be read. Its class is click's own, or of the copy inside typer, as typer's version is.
_UsageError: Any = typer.BadParameter.__base__


def _print_usage_error(error: Any) -> None:
    """As typer does it, but for the argument that it quotes: that is `printable`."""
    is_help = error.ctx is not None and error.message == error.ctx.get_help()  # there was no argument at all
    said = io.StringIO()
    if not is_help:
        error.message = printable(error.message)
    error.show(file=said)
    say(errors, *said.getvalue().rstrip("\n").split("\n"))


_LONG_WORD = re.compile(rf"\S{{{2 * SHOWN},}}")  # a path, say, that is refused for its length


def _print_error(sentence: str) -> None:
    short = _LONG_WORD.sub(lambda word: f"{word[0][:SHOWN]}... ({len(word[0])} characters)", sentence)
    say(errors, short, mark="error")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        say(console, __version__)
        raise typer.Exit
