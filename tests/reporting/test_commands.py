"""`opdkit report` and `opdkit watch` as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_run import write_run
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.errors import UserError


def run(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_report_and_a_comparison(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the run, elsewhere, and by default beside where one stands for several."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "other")
    assert run("report", run_folder) == f"wrote {run_folder}/report.html\n"
    assert run("report", run_folder, "--out", "page.html") == "wrote page.html\n"
    assert run("report", run_folder, "other") == "wrote comparison.html\n"
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("page.html", "comparison.html"))


def test_watch_once(run_folder: Path) -> None:
    assert "30/30  finished, 7.2 s of training" in run("watch", run_folder, "--once")


@pytest.mark.parametrize(("name", "why"), [("nope", "there is nothing at this path"), ("file", "it is a file"),
                                           ("folder", r"it holds no recipe\.toml")])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{name} is not a run folder: {why}"):
        run("report", tmp_path / name)
