"""The run folder as a public contract: names, atomic files, one writer, and refusals that leave everything in place."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.run import environment
from opdkit.run import folder as run_folder
from opdkit.run.folder import RunFolder, atomic_path, atomic_write

HOLDER = """
import os, sys, time
from opdkit.run.folder import RunFolder
run = RunFolder.open(sys.argv[1])
run.write_recipe({"name": "held"})
if sys.argv[2] == "forks":
    if os.fork() == 0:
        print(f"child {os.getpid()}", flush=True)
        time.sleep(60)
        os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at versions and git takes a second; one test does it for real."""
    monkeypatch.setattr(run_folder, "describe_environment", lambda devices: {"versions": {"python": "3"}})


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def a_run(path: Path) -> RunFolder:
    """A finished, unlocked run."""
    with RunFolder.open(path) as run:
        run.write_recipe({"name": "a"})
        run.metrics.write_text('{"step": 1}\n')
        run.rows(1).write_text("rows")
        (run.checkpoints / "step_000001").mkdir()
        (run.checkpoints / "step_000001" / "weights").write_text("weights")
    return RunFolder(path)


def test_contract(tmp_path: Path) -> None:
    """Every file is where design section 8 says, and reads back equal through the reader."""
    recipe = {"name": "a", "seed": 42, "model": {"path": "m", "lora": {"r": 64}}, "slots": [{"k": 1.5}]}
    summary = {"name": "a", "steps": 12, "eval": {"teacher": None}, "text": "Größe <b>"}
    with RunFolder.open(tmp_path / "runs" / "a") as run:
        run.write_recipe(recipe)
        run.write_environment({"data/train.jsonl": "ab12"})
        run.write_evaluation(run.evaluation(100), {"data/aime24.parquet": {"problems": 30}})
        run.write_evaluation(run.evaluation("teacher"), {})
        run.write_summary(summary)
        atomic_write(run.report, "<html>")
        for step in (12, 3):
            run.rows(step).write_bytes(b"")
    names = set(tree(tmp_path / "runs" / "a")) - {".lock"}
    assert names == {
        "recipe.toml",
        "environment.json",
        "eval/step_000100.json",
        "eval/teacher.json",
        "sums.txt",
        "summary.json",
        "report.html",
        "rows/step_000012.parquet",
        "rows/step_000003.parquet",
    }
    read = RunFolder(tmp_path / "runs" / "a")
    assert read.read_recipe() == recipe and read.read_summary() == summary
    assert read.row_steps() == [3, 12] and read.checkpoints.is_dir()
    assert read.read_environment()["data"] == {"data/train.jsonl": "ab12"}


def test_json_is_strict(tmp_path: Path) -> None:
    """NaN would make a file other tools cannot read: refused, and the old file stays."""
    with RunFolder.open(tmp_path / "a") as run:
        run.write_summary({"seconds": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_summary({"seconds": float("nan")})
        assert run.read_summary() == {"seconds": 1}


def test_existing_run(tmp_path: Path) -> None:
    """Refused with the three ways out, nothing touched; resume keeps everything; overwrite empties it."""
    run = a_run(tmp_path / "a")
    before = tree(run.path)
    with pytest.raises(UserError, match=r"--resume.*--overwrite.*another name"):
        RunFolder.open(run.path)
    with pytest.raises(UserError, match="choose one"):
        RunFolder.open(run.path, resume=True, overwrite=True)
    assert tree(run.path) == before
    RunFolder.open(run.path, resume=True).close()
    assert tree(run.path) == before
    RunFolder.open(run.path, overwrite=True).close()
    assert set(tree(run.path)) == {".lock"}
    assert {entry.name for entry in run.path.iterdir()} == {".lock", "rows", "checkpoints", "eval"}


def test_overwrite_deletes_only_runs(tmp_path: Path) -> None:
    """--overwrite on a folder that is no run deletes nothing; beside a run, files that are not ours survive."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for existing in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"something else \(it holds thesis\.tex\)"):
            RunFolder.open(home, **existing)
    assert tree(home) == {"thesis.tex": b"years of work"}
    run = a_run(tmp_path / "a")
    (run.path / "notes.md").write_text("mine")
    (run.path / "eval").rmdir()
    elsewhere = tmp_path / "big_disk"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (run.path / "eval").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        RunFolder.open(run.path, overwrite=True)
    (run.path / "eval").unlink()
    RunFolder.open(run.path, overwrite=True).close()
    assert (run.path / "notes.md").exists() and (elsewhere / "kept").exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    """Resuming what is not there, a file in the folder's place, and reading what was not written."""
    with pytest.raises(UserError, match="nothing to resume"):
        RunFolder.open(tmp_path / "a", resume=True)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunFolder.open(tmp_path / "file")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder(tmp_path / "nowhere").read_summary()
    with pytest.raises(UserError, match="the run has not written it"):
        a_run(tmp_path / "b").read_summary()


def test_a_run_that_died_before_its_recipe_can_start_again(tmp_path: Path) -> None:
    """Only folders and a lock: neither a run to resume nor foreign; the same command starts it."""
    RunFolder.open(tmp_path / "a").close()
    RunFolder.open(tmp_path / "a").close()


@pytest.mark.parametrize("manner", ["plain", "forks"])
def test_one_writer_and_no_stale_lock(tmp_path: Path, manner: str) -> None:
    """A second process is refused by name of the first; after kill -9 the lock is free at once, even if a forked child
    of the dead process (a grader, say) lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a"), manner], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    said = [holder.stdout.readline() for _ in range(1 if manner == "plain" else 2)]
    children = [int(line.split()[1]) for line in said if line.startswith("child")]
    try:
        with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on .* since "):
            RunFolder.open(tmp_path / "a", resume=True)
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)  # still there
        RunFolder.open(tmp_path / "a", resume=True).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_two_in_one_process(tmp_path: Path) -> None:
    """The lock also holds inside one process, and is free after close."""
    run = RunFolder.open(tmp_path / "a")
    run.write_recipe({})
    with pytest.raises(UserError, match="is being written by"):
        RunFolder.open(tmp_path / "a", resume=True)
    run.close()
    run.close()
    RunFolder.open(tmp_path / "a", resume=True).close()


def test_atomic_write(tmp_path: Path) -> None:
    """A block that fails half way leaves the old content and no temporary file; so does a folder that is missing."""
    path = tmp_path / "f.json"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == {"f.json": b"old"}
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no" / "f", "x")


def test_killed_while_writing(tmp_path: Path) -> None:
    """kill -9 between writing and renaming: the old file is whole, and opening the run again removes the rest."""
    code = (
        "import os, sys; from opdkit.run.folder import RunFolder, atomic_path\n"
        "run = RunFolder.open(sys.argv[1]); run.write_recipe({'n': 1})\n"
        "with atomic_path(run.recipe) as p: p.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")]).returncode == -signal.SIGKILL
    assert RunFolder(tmp_path / "a").read_recipe() == {"n": 1}
    assert any(name.endswith(".unfinished") for name in tree(tmp_path / "a"))
    with RunFolder.open(tmp_path / "a", resume=True) as run:
        assert not any(name.endswith(".unfinished") for name in tree(run.path))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space: a sentence with the file and what is safe, the old file whole, no rest. Another OSError stays itself.

    The error is injected at fsync; a really full file system was tried by hand (Parquet rows included).
    """
    path = tmp_path / "f.json"
    atomic_write(path, "old")

    def refuse(code: int) -> Any:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    for code in (errno.ENOSPC, errno.EDQUOT):
        monkeypatch.setattr(os, "fsync", refuse(code))
        with pytest.raises(UserError, match=r"the disk is full: .*f\.json was not written.*safe.*--resume"):
            atomic_write(path, "new")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(path, "new")
    assert tree(tmp_path) == {"f.json": b"old"}


def test_environment_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record stays and what a resume runs on is appended; changed data is refused by name."""
    with RunFolder.open(tmp_path / "a") as run:
        run.write_environment({"train.jsonl": "ab", "test.jsonl": "cd"})
        monkeypatch.setattr(run_folder, "describe_environment", lambda devices: {"versions": {"python": "4"}})
        run.write_environment({"train.jsonl": "ab", "more.jsonl": "ef"})
        found = run.read_environment()
        assert found["versions"] == {"python": "3"} and found["resumed"] == [{"versions": {"python": "4"}}]
        assert found["data"] == {"train.jsonl": "ab", "test.jsonl": "cd", "more.jsonl": "ef"}
        with pytest.raises(UserError, match=r"test\.jsonl is not what it was"):
            run.write_environment({"test.jsonl": "other"})


def test_environment_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real description: versions, hardware, commit; nothing of the environment variables, the user or the host."""
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_value")
    found = environment.describe_environment()
    said = json.dumps(found, allow_nan=False)
    assert found["versions"]["torch"] and found["hardware"]["cpus"] >= 1
    assert found["commit"] is None or len(found["commit"]["id"]) == 40
    assert "hf_very_secret_value" not in said and os.path.expanduser("~/") not in said


def test_commit_is_ours_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy installed inside somebody's repository does not take that repository's commit for its own."""
    package = tmp_path / "venv" / "opdkit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    monkeypatch.setattr(environment.opdkit, "__file__", str(package / "__init__.py"))
    assert environment._commit() is None
