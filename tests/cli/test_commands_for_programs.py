"""What other programs read of the command line: lists, --json, and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.recipe import parse_recipe
from opdkit.tasks import TASKS
from opdkit.toml import dumps


def run(*words: str, status: int = 0) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == status, (done.output, done.exception)
    return done


def test_a_method_a_line_in_80_columns() -> None:
    lines = run("methods").stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [*METHODS]
    assert max(map(len, lines)) <= 80 and all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_one_method_in_full(name: str) -> None:
    """Formula and paper of its file, keys with their defaults, and a recipe that is one."""
    import tomllib

    page = run("methods", name).stdout
    said = json.loads(run("methods", name, "--json").stdout)[name]
    assert said["text"] in page and said["recipe"].splitlines()[0] in page
    assert "arXiv" in page or name in ("sft", "verified_sft")
    keys = {key for key in METHODS[name].model_fields if key != "name"}
    assert {*said["keys"]} == keys and all(f"  {key} = " in page for key in keys)
    for section, default in METHODS[name].defaults.items():
        assert all(f"  {section}.{key} = " in page for key in default)
    recipe = parse_recipe(tomllib.loads(said["recipe"]))
    assert recipe.method.name == name


def test_all_methods_and_tasks_as_json() -> None:
    assert {*json.loads(run("methods", "--json").stdout)} == {*METHODS}
    tasks = json.loads(run("tasks", "--json").stdout)
    assert {*tasks} == {*TASKS} and tasks["code"]["options"]["time_limit_s"]["default"] == 6.0


def test_no_such_method() -> None:
    done = CliRunner().invoke(app, ["methods", "mopt"])
    assert isinstance(done.exception, UserError) and "did you mean" in str(done.exception)


def test_check_as_json(recipe: Any, tmp_path: Path) -> None:
    """A row a file; status 2 if one has a fault, as without --json."""
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(dumps(recipe("opd").as_dict()))
    bad.write_text("name = 3")
    found = json.loads(run("check", str(good), "--json").stdout)
    assert found[0]["path"] == str(good) and found[0]["faults"] == [] and found[0]["notes"]
    found = json.loads(run("check", str(good), str(bad), "--json", status=2).stdout)
    assert not found[0]["faults"] and len(found[1]["faults"]) > 1


def test_evaluate_and_compare_for_ci(models: dict[str, Path], tmp_path: Path) -> None:
    """Random models: avg 0. Numbers on standard output alone; status 1 below a bound, or where B is worse."""
    words = ["--data", "arithmetic:merge-3:test", "--task", "arithmetic", "--limit", "12", "-n", "1"]
    words += ["--max-answer-tokens", "8", "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "e")]
    words = ["evaluate", "--model", str(models["student"]), *words]
    done = run(*words, "--json", "--at-least", "0")
    assert json.loads(done.stdout)["eval"]["arithmetic:merge-3:test"]["avg_at_n"]["value"] == 0.0
    done = run(*words, "--at-least", "0.6", status=1)
    assert "avg@1 0.0000 is below --at-least 0.6" in done.stderr
    run(*words, "--at-least", "nan", status=2)
    better = tmp_path / "better"
    better.mkdir()
    for path in (tmp_path / "e").iterdir():
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            content = content.replace(b'"reward": 0.0', b'"reward": 1.0')
        (better / path.name).write_bytes(content)
    pair = [str(better), str(tmp_path / "e")]
    run("compare", *pair)
    assert "B is worse than A: arithmetic:merge-3:test" in run("compare", *pair, "--fail-if", "worse", status=1).stderr
    run("compare", *reversed(pair), "--fail-if", "worse")
    run("compare", pair[0], pair[0], "--fail-if", "worse")
    json.loads(run("compare", *pair, "--fail-if", "worse", "--json", status=1).stdout)
    run("compare", *pair, "--fail-if", "better", status=2)


def test_python_m_opdkit_and_completion() -> None:
    def opdkit(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        import os

        environment = {**os.environ, **more}
        return subprocess.run([sys.executable, "-m", "opdkit", *words], capture_output=True, text=True, env=environment)

    assert opdkit("--version").stdout.strip() == opdkit_version()
    assert "Usage: opdkit" in opdkit("--help").stdout
    script = opdkit("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 0 and "_OPDKIT_COMPLETE" in script.stdout
    said = opdkit(_OPDKIT_COMPLETE="complete_bash", COMP_WORDS="opdkit met", COMP_CWORD="1")
    assert said.stdout.strip() == "methods"


def opdkit_version() -> str:
    import opdkit

    return opdkit.__version__
