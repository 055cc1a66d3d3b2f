"""One function prints, and what it prints is text as it stands: paths, keys and model text are a stranger's."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opdkit.errors import UserError
from opdkit.printable import printable
from opdkit.run.console import Bar, Console, Line, Table, counting, redrawn, say, say_json

PACKAGE = Path(__file__).parent.parent / "opdkit"
PRINTS = "run/console.py"
# Files that may do what others may not, each with its reason.
EXCEPTIONS = {
    ("tasks/sandbox/child.py", "print"): "inside the sandbox: the judged program's own standard error",
    ("tasks/sandbox/child.py", "sys.stderr"): "inside the sandbox: the judged program's own standard error",
    ("tasks/sandbox/child.py", "sys.stdout"): "inside the sandbox: the judged program's own standard output",
    ("cli/__init__.py", "sys.stdout"): "how characters that the terminal's encoding lacks are written",
    ("cli/__init__.py", "sys.stderr"): "asked whether it is a terminal",
    ("ranks/join.py", "sys.stdout"): "written out before a rank ends",
    ("ranks/join.py", "sys.stderr"): "written out before a rank ends",
    ("tasks/sandbox/start.py", "warnings.warn"): "a fixed sentence, for who calls it from Python; the CLI hears it",
    ("metrics.py", "_log.warning"): "below the console; of printable words, and the CLI hears it",
}
EVIL = "a[red]b[/red] [/x] :smile: \x1b[31m\r\x07\x9b\u202e\u200b\ud800\U000e0041"
SHOWN = r"a[red]b[/red] [/x] :smile: \x1b[31m\r\x07\x9b\u202e\u200b\ud800\U000e0041"


def others_that_print(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a source that prints, or could: rich, print, click, standard streams, logs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] in ("rich", "click")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("rich", "click"):
            found.append((node.lineno, node.module or ""))
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "typer.echo", "typer.secho"):
                found.append((node.lineno, name))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, method = name.rpartition(".")
            is_console = owner.rpartition(".")[2].strip("_") in ("console", "errors")
            is_log = "log" in owner.lower() and method in ("debug", "info", "warning", "error", "exception", "critical")
            if name in ("print", "pprint", "warnings.warn") or method == "print" or is_console or is_log:
                found.append((node.lineno, name))
    return found


def test_nobody_else_prints() -> None:
    found = [
        (str(path.relative_to(PACKAGE)), line, what)
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in others_that_print(path.read_text())
        if path != PACKAGE / PRINTS
    ]
    others = [f"{name}:{line}: {what}" for name, line, what in found if (name, what) not in EXCEPTIONS]
    assert not others, "\n".join([*others, "use say() of opdkit.run.console"])
    needless = set(EXCEPTIONS) - {(name, what) for name, _, what in found}
    assert not needless, f"{needless}: nobody needs these exceptions any more"


@pytest.mark.parametrize(
    "source",
    [
        "from rich.text import Text",
        "import rich.console",
        "print(path)",
        "self._console.print(path)",
        "console.status(path)",
        "errors.log(path)",
        "typer.echo(path)",
        "import sys\nsys.stderr.write(path)",
        "warnings.warn(path)",
        "logging.getLogger(__name__).warning(path)",
        "_log.error(path)",
    ],
)
def test_what_prints_is_found(source: str) -> None:
    assert others_that_print(source)


def test_a_user_errors_sentences_are_separate_arguments() -> None:
    """A line break inside a sentence is a path's, and is shown as one."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "SandboxUnavailable"):
                broken = [c for c in ast.walk(node) if isinstance(c, ast.Constant) and "\n" in str(c.value)]
                assert not broken, f"{path}:{node.lineno}: give several sentences as several arguments"
    error = UserError("x\ny.toml: no such file", "\x1b: another")
    assert error.sentences == ("x\\ny.toml: no such file", "\\x1b: another")
    assert str(error) == "x\\ny.toml: no such file\n\\x1b: another"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 数 😀 \u202f1\u00a0000", "plain é 数 😀 \u202f1\u00a0000"),
        ("\x00\x1b\x7f\x85\x9b", r"\x00\x1b\x7f\x85\x9b"),
        ("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
         r"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"),
        ("\u200b\u2060\ufeff\u2028\u2029\xad", r"\u200b\u2060\ufeff\u2028\u2029\xad"),
        ("\udcff\U000e0041\ue000", r"\udcff\U000e0041\ue000"),
        ("a\tb\nc", r"a\tb\nc"),
        ("\\x1b", "\\x1b"),
    ],
)  # fmt: skip
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def screen(**options: object) -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, width=300, **options), said  # type: ignore[arg-type]


def test_lines_and_tables_as_they_stand() -> None:
    console, said = screen()
    table = Table("one", EVIL, title=EVIL)
    table.add_row(EVIL, Line((EVIL, "red")))
    table.add_row("two\nlines", None)
    say(console, EVIL, Line(EVIL, (EVIL, "bold")), table, mark="warning")
    say(console, f"{EVIL}\nerror forged", style="red")
    text = said.getvalue()
    lines = text.splitlines()
    assert lines[0] == f"warning {SHOWN}"
    assert lines[1] == SHOWN + SHOWN
    assert lines[-1] == f"{SHOWN}\\nerror forged"
    assert text.count(SHOWN) == 1 + 2 + 4 + 1
    assert printable(text, keep="\n") == text


def test_colours_are_ours_alone() -> None:
    """On a terminal the only commands are those of our styles; with NO_COLOR there is no colour."""
    console, said = screen(force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    say(console, EVIL, mark="error")
    assert said.getvalue() == f"\x1b[1;31merror\x1b[0m {SHOWN}\n"
    console, said = screen(force_terminal=True, _environ={"TERM": "xterm", "NO_COLOR": "1"})
    say(console, EVIL, mark="ok")
    assert said.getvalue() == f"ok {SHOWN}\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_counts_and_redrawn_lines(is_terminal: bool) -> None:
    console, said = screen(force_terminal=is_terminal, _environ={"TERM": "xterm"}, color_system=None)
    with Bar(console, EVIL, 1) as bar:
        bar.update(1, note=EVIL)
    assert said.getvalue().count(SHOWN) >= 2
    with counting(console, EVIL) as show:
        show(100)
    if is_terminal:
        with redrawn(console) as draw:
            draw([Line(EVIL)])
    for control in ("\x1b[31m", "\x07", "\x9b", "\u202e", "\u200b"):
        assert control not in said.getvalue()


def test_json_for_other_programs_reads_back() -> None:
    """Nothing in it commands a terminal either: JSON has its own escapes."""
    value = {EVIL.replace("\ud800", ""): ["\x7f\x1b\n\t", 0.5, None, "é"]}
    console, said = screen()
    say_json(console, value)
    assert json.loads(said.getvalue()) == value
    assert printable(said.getvalue(), keep="\n") == said.getvalue()


def test_logs_and_warnings_are_heard() -> None:
    code = (
        "import logging, warnings\n"
        "from opdkit.run.console import Terminal, hear_logs\n"
        "hear_logs(Terminal(stderr=True, width=300))\n"
        "logging.getLogger('any').warning('of %s', 'a\\x1b[31m\\u202e[x]')\n"
        "logging.getLogger('any').info('quiet')\n"
        "warnings.warn('[y]\\x9b')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second, *_ = done.stderr.splitlines()
    assert first == r"warning of a\x1b[31m\u202e[x]"
    assert second.startswith("warning ") and second.endswith(r"UserWarning: [y]\x9b")
    assert "quiet" not in done.stderr


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "opdkit.cli", *words], capture_output=True, cwd=cwd, env={**os.environ, **environment}
    )


RECIPE = 'name = "n"\n"{key}" = 1\n[method]\nname = "opd"\n[model]\npath = "x"\n[data]\ntrain = "{path}"\n'


def bad_recipe(folder: Path) -> list[str]:
    key = "k\\u202e\\u001b[31m[bold]"
    (folder / "bad.toml").write_text(RECIPE.format(key=key, path="d\\u001b.jsonl"))
    return ["check", "bad.toml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (lambda folder: ["train", "no\x1b[31m\u202e[x]:smile:.toml"], r"no\x1b[31m\u202e[x]:smile:.toml: no such"),
        (lambda folder: ["train", "one\ntwo.toml"], r"one\ntwo.toml: no such recipe file"),
        (lambda folder: ["check", "\udcff.toml"], r"\udcff.toml: no such recipe file"),
        (bad_recipe, r"k\u202e\x1b[31m[bold] is not a key"),
        (lambda folder: ["train", "x.toml", "--\x1b[31m\u202e\nno"], r"No such option: --\x1b[31m\u202e"),
        (lambda folder: ["\x1b[31m\u202e"], r"No such command '\x1b[31m\u202e'"),
        (lambda folder: ["train", "x.toml", "more\x1b\nthan one"], r"more\x1b"),
        (lambda folder: ["report", "gone\x1b\u202e"], r"gone\x1b\u202e"),
        (lambda folder: ["watch", "gone\x1b\u202e[x]", "--once"], r"gone\x1b\u202e[x]"),
        (lambda folder: ["compare", "\x1b\u202e", "[x]"], r"\x1b\u202e"),
        (lambda folder: ["data", "inspect", "gone\x1b\u202e.jsonl"], r"gone\x1b\u202e.jsonl"),
        (lambda folder: ["import-config", "gone\x1b\u202e.yaml"], r"gone\x1b\u202e.yaml"),
    ],
)  # fmt: skip
def test_bad_words_on_the_command_line(arguments: Callable[[Path], list[str]], says: str, tmp_path: Path) -> None:
    """What is wrong is named in one line with its strange characters shown, and never obeyed."""
    done = command(*arguments(tmp_path), cwd=tmp_path)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 2 and "Traceback" not in text
    assert any(says in line for line in text.splitlines()), text
    assert printable(text, keep="\n") == text


@pytest.mark.parametrize("name", ["[x]", ":smile:", "[/x]", "[bold red]", "a\x1b[31m\u202eb"])
def test_good_paths_are_printed_whole(name: str, tmp_path: Path) -> None:
    """A recipe in a folder whose name is markup: what was done, and where, is said with its name."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    text = (PACKAGE.parent / "recipes" / "quickstart.toml").read_text()
    (folder / "recipe.toml").write_text(text)
    done = command("check", f"{name}/recipe.toml", cwd=tmp_path)
    assert done.stdout.decode().splitlines()[0] == f"ok {printable(name)}/recipe.toml", done.stderr


def test_a_terminal_without_unicode_ends_nothing(tmp_path: Path) -> None:
    done = command("methods", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
