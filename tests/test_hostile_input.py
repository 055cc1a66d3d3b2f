"""Every command with every path that is none, and every number of a recipe with every value it cannot have.

Well answered is: status 2, one sentence (a line for each fault where there are several), no traceback, within seconds,
and nothing left behind. Does not try what a command does once its input is right.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit import cli, toml
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.recipe import load_recipe, parse_recipe
from opdkit.recipe.build import flat
from opdkit.recipe.check import check_file

SECONDS = 60  # of one call, on a machine that does other things too; what hangs, hangs for ever

PATHS = ("", ".", "a" * 5000, "a/" * 2500, "/dev/null", "fifo", "sock", "dangling", "loop", "folder", "text", "nope",
         "no/such", "text/x", "fifo.jsonl", "folder.jsonl", "device.jsonl", "binary.jsonl", "fifo.toml", "folder.toml",
         "binary.toml", "binary.parquet")  # fmt: skip
EVALUATE = ("evaluate", "--data", "d.jsonl", "--task", "math", "-n", "1", "--device", "cpu")
INPUTS: dict[str, tuple[str, ...]] = {
    "check": ("check", "@"),
    "train": ("train", "@"),
    "train: model": ("train", "r.toml", "--set", "model.path='@'"),
    "train: data": ("train", "r.toml", "--set", "data.train='@'"),
    "train: chat template": ("train", "r.toml", "--set", "model.chat_template='@'"),
    "fit": ("fit", "@"),
    "pipeline": ("pipeline", "@"),
    "import-config": ("import-config", "@"),
    "evaluate: model": (*EVALUATE, "--model", "@"),
    "evaluate: data": ("evaluate", "--model", "absent/model", "--data", "@", "--task", "math"),
    "evaluate: suite": ("evaluate", "--model", "absent/model", "--suite", "tools", "--data-dir", "@"),
    "evaluate: out": (*EVALUATE, "--model", "/absent/model", "--out", "@"),
    "sample: out": ("sample", *EVALUATE[1:], "--model", "/absent/model", "--out", "@"),
    "fit: out": ("fit", "r.toml", "--set", "teacher.kind=model", "--set", "teacher.path=/x", "--out", "@"),
    "compare": ("compare", "@", "@"),
    "regrade": ("regrade", "@"),
    "analyse signal": ("analyse", "signal", "@"),
    "analyse signal: rollouts": ("analyse", "signal", "new", "--model", "/absent/model", "--rollouts", "@"),
    "analyse overlap": ("analyse", "overlap", "@"),
    "analyse overlap: out": ("analyse", "overlap", "nope", "--out", "@"),
    "analyse position": ("analyse", "position", "@"),
    "analyse diversity": ("analyse", "diversity", "@"),
    "data inspect": ("data", "inspect", "@"),
    "data inspect: model": ("data", "inspect", "d.jsonl", "--model", "@"),
    "data dedup": ("data", "dedup", "@", "--against", "d.jsonl", "--dry-run"),
    "data dedup: against": ("data", "dedup", "d.jsonl", "--against", "@", "--dry-run"),
    "data prepare": ("data", "prepare", "math500", "--source", "@", "--out", "prepared"),
    "report": ("report", "@"),
    "report: serve": ("report", "--serve", "@"),
    "report: several": ("report", "@", "@"),
    "make-model: data": ("make-model", "new", "--data", "@", "--steps", "0"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with one of everything, and no hub."""
    from huggingface_hub import HfApi

    def nobody(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody answers")

    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(HfApi, name, nobody)
    monkeypatch.chdir(tmp_path)
    for name in ("fifo", "fifo.jsonl", "fifo.toml"):
        os.mkfifo(name)
    for name in ("folder", "folder.jsonl", "folder.toml"):
        Path(name).mkdir()
    for name in ("binary.jsonl", "binary.toml", "binary.parquet"):
        Path(name).write_bytes(b"PAR1\xff\xfe\x00\x01")
    Path("text").write_text("hello")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("device.jsonl").symlink_to("/dev/null")
    Path("d.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    Path("r.toml").write_text(toml.dumps(BASE | {"method": {"name": "opd"}, "model": {"path": "/absent/model"}}))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
        yield tmp_path


BASE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "/absent/model"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 100, "problems_per_step": 1},
}


def call(*words: str) -> int:
    """The status. Anything but SystemExit is the test's failure."""

    def hear(number: int, frame: Any) -> None:
        raise AssertionError(f"{' '.join(words)[:200]} takes longer than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, hear)
    signal.alarm(SECONDS)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["opdkit", *words])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return int(stopped.value.code or 0)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("command", INPUTS)
def test_paths(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, each in a few lines; the folder is as it was, and so is /dev/null."""
    before = everything(folder)
    for path in PATHS:
        words = [word.replace("@", path) for word in INPUTS[command]]
        status = call(*words)
        said = capsys.readouterr().err
        assert status == 2, (path[:40], status, said)
        assert said and len(said) < 2000 and "Traceback" not in said, (path[:40], said[:3000])
        assert everything(folder) == before, (path[:40], everything(folder) ^ before)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("out", ["folder", "text", "/dev/null", "device.jsonl", "loop", "fifo", "text/x", "a" * 5000])
@pytest.mark.parametrize(
    "command",
    [
        ("import-config", "c.yaml", "--out"),
        ("data", "dedup", "d.jsonl", "--against", "d.jsonl", "--overwrite", "--out"),
        ("data", "dedup", "d.jsonl", "--against", "d.jsonl", "--dry-run", "--overwrite", "--report"),
        ("report", "run", "--out"),
        ("quickstart", "--out"),
        ("make-model", "--data", "arithmetic:add-3:train", "--steps", "0"),
    ],
    ids=lambda words: " ".join(words[:2]) + words[-1],
)
def test_outputs(
    command: tuple[str, ...],
    out: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What can be no output, or is somebody else's file, is refused before any work and left as it is."""
    monkeypatch.setattr("opdkit.quickstart._make_models", None)
    Path("run").mkdir()
    Path("run/recipe.toml").write_text("name = 'run'\n")
    settings = {"algorithm": {"adv_estimator": "grpo"}, "data": {"train_files": "d.jsonl"}}
    Path("c.yaml").write_text(f"{settings}\n")
    extra = ("--set", "model.path=/m", "--set", "data.train=d.jsonl", "--set", "train.steps=2", "--task", "math")
    words = (*command, out) if command[0] != "make-model" else (command[0], out, *command[1:])
    if (command[0], out) == ("quickstart", "folder") or ("--overwrite" in command and out == "text"):
        pytest.skip("an empty folder may be filled, and --overwrite says that the file may go")
    before = everything(folder)
    status = call(*words, *(extra if command[0] == "import-config" else ()))
    said = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said, said
    assert everything(folder) == before and Path("text").read_text() == "hello"
    assert Path("/dev/null").is_char_device()


VALUES: tuple[Any, ...] = (-1, float("nan"), float("inf"), 1e300, 1e-320, 10**23, -(10**23), "x", [], {})


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_a_recipe(method: str) -> None:
    """Every number of a recipe with values no such number has: refused, but for a reward, a place or a view's weight
    of -1."""
    teacher = {"teacher": {"kind": "model", "path": "/t"}}
    weights = {"tokens": {"name": "entropy_sampling"}, "problems": {"name": "paced"}, "importance": {}, "prefix": {}}
    recipe = None
    for sections in ({**teacher, "weights": weights}, teacher, {}):
        try:
            recipe = parse_recipe(BASE | {"method": {"name": method}, "sampling": {"group_size": 8}} | sections)
            break
        except UserError:
            continue
    assert recipe is not None
    for key, old in flat(recipe.as_dict()).items():
        if isinstance(old, bool) or not isinstance(old, int | float):
            continue
        for value in VALUES:
            raw = copy.deepcopy(recipe.as_dict())
            *sections_, last = key.split(".")
            section = raw
            for name in sections_:
                section = section[name]
            section[last] = value
            try:
                parse_recipe(raw)
            except UserError as error:
                assert len(str(error)) < 4000
            else:
                assert value == -1 and key.endswith(("success_threshold", ".tau", "target.teacher")), (key, value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("train.steps=100000000000000000000000", "train.steps = 100000000000000000000000"),
        ("train.betas=[1.0, 1.0]", r"train\.betas\.0 = 1\.0"),
        ("sampling.temperature=1e-320", "give a temperature from 0.0001 to 10000"),
        ("train.lr=1\nseed=7", "goes on in a new line"),
        ("train.lr=" + "[" * 3000, "cannot be read"),
        ("a" + ".b" * 3000 + "=1", "nested more than"),
        ('runs_dir="a\\u0000b"', "NUL"),
        ("name=" + "a" * 5000, r"\(5002 characters\)"),
        ('model.path=""', "at least 1 character"),
        ("train.weight_decay=10.0", None),
        ("train.lr=1.0", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings(setting: str, sentence: str | None) -> None:
    raw = BASE | {"method": {"name": "grpo"}, "sampling": {"group_size": 8}}
    if sentence is None:
        parse_recipe(raw, [setting])
        return
    with pytest.raises(UserError, match=sentence):
        parse_recipe(raw, [setting])


def test_files_no_recipe_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Path("deep.toml")
    for text in ("a = " + "[" * 3000 + "]" * 3000, "[" + ".".join("a" * 3000) + "]\nb = 1\n"):
        deep.write_text(text)
        with pytest.raises(UserError, match=r"too deep|nested more than"):
            load_recipe(deep)
    Path("w.toml").write_text(toml.dumps(BASE | {"method": {"name": "sft"}, "log": {"sinks": ["wandb"]}}))
    monkeypatch.setattr("opdkit.recipe.rules.whole.is_installed", lambda sink: False)
    with pytest.raises(UserError, match=r"log\.sinks: wandb is not installed; pip install"):
        check_file(Path("w.toml"))
    assert tomllib.loads(Path("w.toml").read_text())["log"] == {"sinks": ["wandb"]}


def test_numbers_of_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that count or measure: not a number, infinite, 10**23."""
    for flag in ("--temperature", "--top-p", "-n", "--limit", "--max-answer-tokens", "--seed", "--top-k"):
        for value in ("nan", "inf", "-1", str(10**23), "x"):
            assert call(*EVALUATE, "--model", "/absent/model", flag, value) == 2, (flag, value)
    assert call("watch", "nope", "--every", "nan") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "warp", "", "cuda:9999", "x" * 5000])
def test_devices(device: str) -> None:
    from opdkit.engines.load import pick_device

    with pytest.raises(UserError, match="is not available here"):
        pick_device(device)


def test_templates(tiny_tokenizer: Callable[[], Any]) -> None:
    """A template is a program: it may raise anything, and say nothing."""
    from opdkit.contexts.render import Renderer

    for template, words in (
        ("{{ 1 / 0 }}", "refuses messages"),
        ("{{ messages[0].content + 1 }}", "refuses messages"),
        ("{{ messages[99].content.x }}", "refuses messages"),
        (" ", "renders messages to nothing"),
        ("{% if false %}x{% endif %}", "renders messages to nothing"),
    ):
        with pytest.raises(UserError, match=words):
            Renderer(tiny_tokenizer(), template).prompt_ids([{"role": "user", "content": "1+1="}])
