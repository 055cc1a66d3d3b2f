"""Disks that are full, have no room for another file, or may not be written: a sentence, nothing half-written, and the
command goes on to the same bits once there is room."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Done, Warm, differences, numbers

pytestmark = pytest.mark.faults
SIZES_KIB = (4, 12, 24, 40, 64, 88, 112, 136)
FILES = (2, 4, 6, 9, 12, 16, 20, 24)
ROOM = "size=64m,nr_inodes=10000"


def is_a_sentence(done: Done) -> bool:
    """Refused, without a traceback, in a few lines."""
    return done.status not in (0, 99) and "Traceback" not in done.said and "error" in done.said.lower()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes and remakes a file system of its own with those options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.fixture(scope="module")
def whole(warm: Warm, write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    assert warm("train", "recipe.toml", cwd=folder).status == 0
    return numbers(folder / "runs/run")


def go_on(warm: Warm, cwd: Path) -> Done:
    done = warm("train", "recipe.toml", "--resume", cwd=cwd)
    return warm("train", "recipe.toml", cwd=cwd) if "nothing to resume" in done.said else done


@pytest.mark.parametrize(
    "options", [f"size={size}k" for size in SIZES_KIB] + [f"size=64m,nr_inodes={n}" for n in FILES]
)
def test_a_small_disk(
    options: str, disk: Callable[[str], Path], warm: Warm, write_recipe: Callable[..., Path], whole: dict[str, object],
    tmp_path: Path
) -> None:  # fmt: skip
    """A real one, of so many bytes or files. The largest of them hold most of a run."""
    place = disk(options)
    (tmp_path / "runs").symlink_to(place)
    write_recipe(tmp_path)
    done = warm("train", "recipe.toml", cwd=tmp_path)
    assert is_a_sentence(done), (done.status, done.said)
    unfinished = [path for path in place.rglob("*") if "unfinished" in path.name]
    assert not unfinished, unfinished
    remount(place, ROOM)
    done = go_on(warm, tmp_path)
    assert done.status == 0, done.said
    assert differences(numbers(place / "run"), whole) == []


def test_a_disk_that_fills_up_at_any_event(
    warm: Warm, write_recipe: Callable[..., Path], whole: dict[str, object], tmp_path: Path
) -> None:
    """From some event on, nothing is written any more (ENOSPC of the system calls): every sixth event of a run. And one
    that becomes read-only, and one that is broken, in between."""
    place = tmp_path / "place"
    place.mkdir()
    write_recipe(place)
    events = warm.events("train", "recipe.toml", cwd=place, below=place / "runs/run")
    faults = []
    for nth in range(1, len(events), 6):
        number = (errno.ENOSPC, errno.ENOSPC, errno.EROFS, errno.EIO)[nth // 6 % 4]
        shutil.rmtree(place / "runs")
        done = warm(
            "train", "recipe.toml", cwd=place, below=str(place / "runs/run"), nth=nth, error=number, stays=1
        )  # fmt: skip
        again = go_on(warm, place)
        differ = differences(numbers(place / "runs/run"), whole) if again.status == 0 else []
        if not is_a_sentence(done) or again.status or differ:
            said = (done.said[-1500:] if not is_a_sentence(done) else "", again.said[-600:] if again.status else "")
            faults.append((nth, events[nth - 1], errno.errorcode[number], done.status, again.status, *said, differ))
    assert not faults, "\n".join(map(str, faults))


def test_a_folder_that_may_not_be_written(
    disk: Callable[[str], Path], warm: Warm, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Commands that write refuse before they work; those that read, read."""
    place = disk(ROOM)
    (tmp_path / "runs").symlink_to(place)
    write_recipe(tmp_path)
    assert warm("train", "recipe.toml", cwd=tmp_path).status == 0
    before = numbers(place / "run")
    remount(place, "ro")
    evaluate = ("evaluate", "--model", "runs/run/checkpoints/step_000002/model", "--data", "arithmetic:merge-3:test")
    for refused in (
        ("train", "recipe.toml", "--resume"),
        ("train", "recipe.toml", "--set", "name=other"),
        ("report", "runs/run"),
        (*evaluate, "--task", "arithmetic", "--out", "runs/e"),
        ("export", "runs/run", "--out", "runs/exported"),
    ):
        done = warm(*refused, cwd=tmp_path)
        assert is_a_sentence(done) and "ead-only" in done.said, (refused, done.status, done.said)
    for read in (("report", "runs/run", "--out", str(tmp_path / "page.html")), ("watch", "runs/run", "--once")):
        done = warm(*read, cwd=tmp_path)
        assert done.status == 0, (read, done.said)
    assert numbers(place / "run") == before


def test_a_clock_that_is_set_back(
    warm: Warm, write_recipe: Callable[..., Path], whole: dict[str, object], tmp_path: Path
) -> None:
    """By a year, at the start, in the middle, and between a run and its resumption: the same numbers, and no time that
    is below zero. The clock of a chat template stays what it was (tests/run)."""
    write_recipe(tmp_path)
    for looks in (0, 30, 200):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        done = warm("train", "recipe.toml", cwd=tmp_path, clock_back=365 * 86400, looks=looks)
        assert done.status == 0, done.said
        assert differences(numbers(tmp_path / "runs/run"), whole) == []
        assert "-" not in str([line for line in done.said.splitlines() if " s left" in line]).replace("e-", "")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    events = warm.events("train", "recipe.toml", cwd=tmp_path, below=tmp_path / "runs/run")
    shutil.rmtree(tmp_path / "runs")
    below = str(tmp_path / "runs/run")
    assert warm("train", "recipe.toml", cwd=tmp_path, below=below, nth=len(events) // 2).status == -9
    done = warm("train", "recipe.toml", "--resume", cwd=tmp_path, clock_back=365 * 86400, looks=0)
    assert done.status == 0, done.said
    assert differences(numbers(tmp_path / "runs/run"), whole) == []
