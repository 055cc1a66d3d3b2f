"""Every file of a run folder cut, emptied, with a flipped bit, or replaced by another step's: named, or a sentence, or
the checkpoint before it; never other numbers without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Warm, numbers

from opdkit.run.sums import SUMS

pytestmark = pytest.mark.faults
MORE = ("train", "recipe.toml", "--resume", "--set", "train.steps=3")


def cut(path: Path, kept: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, kept: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, kept: Path) -> None:
    """One bit in the middle, that turns a digit into another where there is one."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    digits = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    at = min(digits, key=lambda at: abs(at - middle)) if path.suffix != ".safetensors" and digits else middle
    content[at] ^= 1
    path.write_bytes(content)


def swap(path: Path, kept: Path) -> None:
    """With the same file of an earlier step, or of a run with another seed."""
    path.write_bytes(kept.read_bytes())


def other_of(path: Path, run: Path, other: Path) -> Path | None:
    """The file to put in its place."""
    name = path.relative_to(run).as_posix()
    earlier = name.replace("step_000002", "step_000001")
    found = run / earlier if earlier != name else other / name
    return found if found.is_file() and found.read_bytes() != path.read_bytes() else None


@pytest.mark.parametrize("damage", [cut, empty, flip, swap])
def test_every_file(
    damage: Callable[[Path, Path], None], warm: Warm, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The run goes on for a step, and its report is written. What nobody reads while doing so (older checkpoints, rows
    of earlier steps) is compared when it is read: tests/training/test_damage.py."""
    write_recipe(tmp_path, train={"schedule": "constant", "keep_checkpoints": 2}, schedule=None)
    text = (tmp_path / "recipe.toml").read_text().replace("temperature = 1.2", "temperature = 1.0")
    (tmp_path / "recipe.toml").write_text(text)
    assert warm("train", "recipe.toml", cwd=tmp_path).status == 0
    run, kept = tmp_path / "runs/run", tmp_path / "kept"
    assert warm("report", "runs/run", cwd=tmp_path).status == 0
    run.rename(kept)
    other = tmp_path / "other"
    assert warm("train", "recipe.toml", "--set", "seed=4", cwd=tmp_path).status == 0
    run.rename(other)
    shutil.copytree(kept, run)
    assert warm(*MORE, cwd=tmp_path).status == 0
    whole = numbers(run)
    faults = []
    newest = "checkpoints/step_000002"
    for path in sorted(path for path in kept.rglob("*") if path.is_file() and path.name != ".lock"):
        name = path.relative_to(kept).as_posix()
        unread = name.startswith("checkpoints/") and not name.startswith(newest)
        replacement = other_of(path, kept, other)
        if unread or name == "report.html" or (damage is swap and replacement is None):
            continue
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        damage(run / name, replacement or path)
        report = warm("report", "runs/run", cwd=tmp_path)
        page = run / "report.html"
        told = report.said + (page.read_text() if report.status == 0 else "")
        done = warm(*MORE, cwd=tmp_path)
        said = done.said
        if report.status == 99 or done.status == 99 or "Traceback" in said + report.said:
            faults.append((name, report.status, done.status, "traceback", report.said[-1500:], said[-1500:]))
            continue
        part = "step_000002" if name.startswith("checkpoints") else path.name
        is_named = part in said.replace("going on from", "").split("step 3")[0] or any(
            path.name in line and ("not what" in line or "damaged" in line or "cut" in line or "cannot" in line
                                   or "line" in line or "shorter" in line or "is not" in line)
            for line in told.splitlines()
        )  # fmt: skip
        same = done.status == 0 and _same(numbers(run), whole, name)
        if not is_named or not (same or done.status == 2):
            faults.append((name, report.status, done.status, is_named, same, said[-700:]))
    assert not faults, "\n".join(map(str, faults))


def _same(found: dict[str, object], whole: dict[str, object], damaged: str) -> bool:
    """But for the damaged file itself, and a folder that was set aside for it."""
    drop = (damaged, SUMS, "summary.json", "metrics.jsonl" if damaged == "metrics.jsonl" else damaged)
    kept = {n: v for n, v in found.items() if n not in drop and ".damaged" not in n and "step_000002/" not in n}
    return kept == {n: v for n, v in whole.items() if n not in drop and "step_000002/" not in n}
