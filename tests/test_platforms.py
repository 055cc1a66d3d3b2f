"""What docs/reference/platforms.md says: Python versions, devices, images."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from opdkit.data.files.unusable import Unusable
from opdkit.data.schemas.conversations import chat_turns
from opdkit.data.schemas.media import MEDIA
from opdkit.data.schemas.schema import Schema
from opdkit.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "opdkit").rglob("*.py"))
# Of the standard library, gone in 3.12 (distutils, imp, ...), in 3.13 (PEP 594) and in 3.14.
GONE = {
    "asynchat", "asyncore", "distutils", "imp", "smtpd", "aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr",
    "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu",
    "xdrlib", "lib2to3",
}  # fmt: skip


def test_the_package_asks_for_the_python_it_was_run_on() -> None:
    """The oldest one is what the tests run on; classifiers name no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    named = {text.rpartition(" ")[2] for text in project["classifiers"] if text.startswith("Programming Language")}
    assert {name for name in named if "." in name} == {"3.11"}


def test_nothing_that_newer_pythons_dropped_is_used() -> None:
    """Modules, and escapes in strings that 3.12 warns of. Not what only running would show."""
    for path in FILES:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(path.read_text(), str(path))
            compile(tree, str(path), "exec")
        modules = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not {name.partition(".")[0] for name in modules} & GONE, path


def test_an_older_python_is_told() -> None:
    """The first lines of the package, with an older version pretended."""
    code = "import sys; sys.version_info = (3, 10, 4); import opdkit"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "opdkit needs Python 3.11 or newer, and this is 3.10" in done.stderr


@pytest.mark.parametrize(("device", "why"), [("mps", "no float64"), ("xpu:0", "Intel"), ("hpu", "never run on that")])
def test_devices_that_are_refused(device: str, why: str) -> None:
    """By name, wherever it is asked: the machine need not have one."""
    from opdkit.engines.load import pick_device

    with pytest.raises(UserError, match=rf"{why}.*use .auto. or .cpu."):
        pick_device(device)


def test_doubts_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm under the name of CUDA; a GPU that is there and is not used. Without either, nothing is said."""
    import torch

    from opdkit.engines.devices import doubts_of

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doubts_of(cpu, is_chosen=True) == doubts_of(cuda, is_chosen=True) == []
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert "ROCm, on which opdkit was never run" in doubts_of(cuda, is_chosen=False)[0]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "this machine has mps" in doubts_of(cpu, is_chosen=True)[0] and not doubts_of(cpu, is_chosen=False)


@pytest.mark.parametrize("column", MEDIA)
def test_rows_with_images_are_dropped(column: str) -> None:
    schema = Schema(task="math")
    row = {"problem": "What is in it?", "answer": "2"}
    with pytest.raises(Unusable, match=rf'column "{column}" holds what is no text'):
        schema.problem({**row, column: ["a.png"]})
    for empty in (None, [], ""):
        assert schema.problem({**row, column: empty}).gold == "2"
    assert column in schema.keep(["problem", "answer", column])  # or it would not be seen


def test_parts_of_a_turn() -> None:
    """Text in parts is text; a part of another type drops the row."""
    text = [{"type": "text", "text": "What is"}, {"type": "text", "text": "1+1?"}]
    assert chat_turns([{"role": "user", "content": text}]) == ({"role": "user", "content": "What is\n1+1?"},)
    with pytest.raises(Unusable, match=r"a part of type 'image_url', and opdkit reads text alone"):
        chat_turns([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}, *text]}])
