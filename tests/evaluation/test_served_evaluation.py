"""Commands that sample, with an engine beside this process, as they are typed; the server is a fake one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from opdkit.analysis.fit import FitOptions, fit
from opdkit.cli import app
from opdkit.recipe import Recipe

sys.path.append(str(Path(__file__).parent.parent / "engines" / "servers"))
from fake_server import FakeServer

DATA = ("--data", "arithmetic:merge-3:test", "--task", "arithmetic", "--limit", "2")
HOW = ("--max-answer-tokens", "8", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[FakeServer]:
    with FakeServer(models["student"]) as fake:
        yield fake


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output + str(done.exception or "")


def test_evaluate_asks_the_server_and_loads_no_weights(
    server: FakeServer, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another engine's answers are not mixed with them."""
    from opdkit.engines import model

    monkeypatch.setattr(model, "load_checkpoint", None)
    asked = ("evaluate", "--model", models["student"], *DATA, *HOW, "-n", "2", "--out", tmp_path / "e")
    code, said = run(*asked, "--engine", "server", "--url", server.url)
    assert code == 0, said
    assert len(server.asked("/inference/v1/generate")) == 4
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert result["eval"]["arithmetic:merge-3:test"]["samples"] == 2
    code, said = run(*asked)
    assert code != 0 and "engine" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "server"), "--engine server and --url go together"),
        (("--url", "http://h:1"), "--engine server and --url go together"),
        (("--engine", "llama"), "choose hf, vllm or server"),
    ],
)
def test_what_was_typed_wrong(models: dict[str, Path], tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, output = run("evaluate", "--model", models["student"], *DATA, "--out", tmp_path / "e", *words)
    assert code != 0 and said in output


def test_a_server_of_another_model_is_refused(server: FakeServer, models: dict[str, Path], tmp_path: Path) -> None:
    asked = ("evaluate", "--model", models["teacher"], *DATA, *HOW, "--out", tmp_path / "e")
    code, said = run(*asked, "--engine", "server", "--url", server.url)
    assert code != 0 and "name the model that is served" in said


def test_sample_asks_the_server(server: FakeServer, models: dict[str, Path], tmp_path: Path) -> None:
    asked = ("sample", "--model", models["student"], *DATA, *HOW, "--out", tmp_path / "s.jsonl", "--reject", "none")
    code, said = run(*asked, "--engine", "server", "--url", server.url)
    assert code == 0, said
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2 == len(server.asked("/inference/v1/generate"))


def test_analyse_signal_asks_the_server(server: FakeServer, models: dict[str, Path], tmp_path: Path) -> None:
    """The student's answers come from there; the teacher scores here."""
    who = ("--model", models["teacher"], "--student", models["student"])
    asked = ("analyse", "signal", tmp_path / "a", *who, *DATA, *HOW, "-n", "2", "--steps", "rollouts")
    code, said = run(*asked, "--engine", "server", "--url", server.url)
    assert code == 0, said
    assert len(server.asked("/inference/v1/generate")) == 4
    code, said = run("analyse", "signal", tmp_path / "b", *who, "--rollouts", tmp_path / "a", "--engine", "vllm")
    assert code != 0 and "samples answers to --data" in said


def test_fit_asks_the_server(
    server: FakeServer, recipe: Callable[..., Recipe], tmp_path: Path, console: Console
) -> None:
    """The student's answers come from it; the student's weights are sent there and proved first."""
    asked = recipe("opd", "sampling.engine=server", f"sampling.url={server.url}", "sampling.max_answer_tokens=8")
    fit(asked, FitOptions(problems=2, samples=2, teacher_answers=0, out=tmp_path / "fit"), console=console)
    assert server.asked("/collective_rpc") and (tmp_path / "fit" / "fit.json").exists()
