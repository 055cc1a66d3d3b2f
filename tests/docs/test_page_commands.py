"""Every command, recipe and path that docs/ and the README print is there. Nothing is run: see test_page_runs.py."""

from __future__ import annotations

import ast
import re
import shutil
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, Block, blocks, inline

from opdkit.cli import command as all_commands
from opdkit.errors import UserError
from opdkit.recipe import key_values, load_recipe, parse_recipe
from opdkit.recipe.load import merge
from opdkit.recipe.pipeline import is_pipeline, load_pipeline
from opdkit.tasks.guard import task_named

BLOCKS = [block for page in PAGES for block in blocks(page)]
# Bases for parts of recipes: a part is right if it fits one of them.
BASES: list[dict[str, Any]] = [
    {
        "name": "n", "model": {"path": "m"}, "data": {"train": "d", "task": "math"}, "train": {"steps": 10},
        "eval": {"data": "e"}, "method": {"name": method}, **more,
    }
    for method, more in {
        "opd": {"teacher": {"kind": "model", "path": "t"}},
        "sdpo": {}, "mopd": {}, "opsd": {}, "sft": {}, "grpo": {"data": {"train": "d", "task": "tool_use"}},
    }.items()
]  # fmt: skip
OVERRIDES = ("train", "fit", "check", "replay", "import-config")
PLACES = ("opdkit", "tests", "recipes", "docs", "benchmarks", "examples")


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.kind == kind]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(command, its parameters) as the real application reads them. Raises its usage errors."""
    name, rest, command = "opdkit", words, all_commands()
    while hasattr(command, "commands"):
        name, rest = rest[0], rest[1:]
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    return name, command.make_context(name, list(rest)).params


def faults_of(part: dict[str, Any], settings: list[str], base: dict[str, Any]) -> tuple[str, ...]:
    try:
        parse_recipe(merge(base, part), settings)
    except UserError as error:
        return error.sentences
    return ()


def check_part(part: dict[str, Any], settings: list[str], where: str) -> None:
    tried = [faults_of(part, settings, base) for base in BASES]
    # A page may name a file that its reader writes.
    tried = [[fault for fault in faults if "there is no file" not in fault] for faults in tried]
    assert not min(tried, key=len), f"{where}: {min(tried, key=len)}"


def check_settings(command: str, given: dict[str, Any], where: str) -> None:
    """The keys and values of --set, and of options that are read by the same rules."""
    settings = given.get("set_") or []
    file = given.get("recipe") or given.get("file") or next(iter(given.get("recipes") or []), None)
    if command == "pipeline" or (command == "check" and file is not None and is_file_of_pipeline(ROOT / file)):
        load_pipeline(ROOT / file, settings)
    elif command in OVERRIDES and file is not None and str(file).startswith("recipes/"):
        load_recipe(ROOT / file, settings)
    elif command in OVERRIDES and settings:
        check_part({}, settings, where)
    for option in ("template", "context", "threshold"):
        key_values(given.get(option) or [], flag=f"--{option}")
    if (task := given.get("task")) and not task.split()[0].endswith(".py"):
        task_named(task, may_be_none=True)


def is_file_of_pipeline(path: Path) -> bool:
    return path.exists() and is_pipeline(tomllib.loads(path.read_text()))


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_command(words: list[str], where: str) -> None:
    program, *rest = words
    if program == "opdkit":
        command, given = parsed(rest)
        check_settings(command, given, where)
    elif program == "make":
        assert rest and set(rest) <= make_targets(), f"{where}: no such target: {rest}"
    elif program == "python":
        script, *arguments = rest
        tree = ast.parse((ROOT / script).read_text())
        known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert {word for word in arguments if word.startswith("--")} <= known, f"{where}: {arguments}"
    else:
        pytest.fail(f"{where}: {program} is not a program that a page may run; say it in words")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the Python files that pages show; what they name in the repository is found from anywhere."""
    for block in BLOCKS:
        if block.kind == "python" and block.file_name:
            (tmp_path / block.file_name).write_text(block.text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", of_kind("commands"))
def test_commands(block: Block) -> None:
    found = block.commands()
    assert found
    for words in found:
        check_command(words, block.where)


@pytest.mark.parametrize("block", of_kind("toml"))
def test_recipes(block: Block, tmp_path: Path) -> None:
    """A whole recipe, a part of one, or a pipeline: every key is there and takes its value."""
    content = tomllib.loads(block.text)
    if is_pipeline(content):
        shutil.copytree(ROOT / "recipes", tmp_path / "recipes")  # its stages name some
        path = tmp_path / "recipes" / "pipelines" / "mine.toml"
        path.write_text(block.text)
        load_pipeline(path)
    elif "model" in content and "method" in content:
        parse_recipe(content)
    else:
        check_part(content, [], block.where)


@pytest.mark.parametrize("block", of_kind("python"))
def test_python(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    """Between its words: commands and their options, make targets, files of the repository, links to other pages."""
    for where, text in inline(page):
        words = text.split()
        if words[0] == "opdkit" and len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]):
            check_mention(words[1:], where)
        elif words[0] == "make" and len(words) > 1:
            assert set(words[1:]) <= make_targets(), f"{where}: {text}"
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"{where}: {text}"
        elif re.fullmatch(rf"(?:{'|'.join(PLACES)})/[\w./*-]*", text):
            is_the_readers = Path(text).stem == "mine"
            assert is_the_readers or list(ROOT.glob(text.rstrip("/"))), f"{where}: {text} is not in the repository"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: the link to {target} leads nowhere"


def check_mention(words: list[str], where: str) -> None:
    """A command in a sentence need not be whole: its name and its options are there."""
    command = all_commands()
    for word in words:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands or not re.fullmatch(r"[a-z][a-z-]*", word), f"{where}: no command {word}"
        command = command.commands.get(word, command)
    options = {option for parameter in command.params for option in parameter.opts}
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert named <= options, f"{where}: {named - options}"


def test_a_wrong_page_is_found() -> None:
    """What these tests are for."""
    for line in (
        "opdkit train r.toml --sett a=1",
        "opdkit train r.toml --set train.stepz=3",
        "opdkit trian r.toml",
        "opdkit evaluate --model M --data d -n eight",
        "opdkit evaluate --model M --data d --task 'math styl=1'",
        "make everything",
        "python benchmarks/methods.py --onyl x",
        "curl x",
    ):
        block = Block(ROOT / "README.md", 1, "", line)
        with pytest.raises(BaseException):  # noqa: B017
            for words in block.commands():
                check_command(words, "here")
