"""`opdkit watch`: a file that grows, is cut and is replaced; who is alive; what is shown, and that it is harmless."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hostile_run import DATASET, EVIL, decode
from rich.console import Console

from opdkit.errors import UserError
from opdkit.reporting import watch as module
from opdkit.reporting.files import MetricLines, writer_lives
from opdkit.reporting.follow import Follower, seconds_left
from opdkit.reporting.watch import sparkline, watch
from opdkit.run.console import Terminal


def line(step: int, **more: float) -> str:
    return json.dumps({"step": step, "time": 1000.0 + step, "train/loss": 1 / step, **more}) + "\n"


def lock(folder: Path, pid: int, host: str = socket.gethostname()) -> None:
    (folder / ".lock").write_text(f"process {pid} on {host} since 2026-01-01 00:00:00\n")


def dead_pid() -> int:
    """Of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def steps(lines: MetricLines) -> list[int]:
    lines.read()
    return [each["step"] for each in lines.lines]


def test_a_growing_file(tmp_path: Path) -> None:
    """Not there yet; half a line, then the rest of it; nothing new; a line that is no metrics line is counted."""
    path, half = tmp_path / "metrics.jsonl", line(2)
    lines = MetricLines(path)
    assert steps(lines) == []
    path.write_text(line(1) + half[:9])
    assert steps(lines) == [1]
    with path.open("a") as file:
        file.write(half[9:])
    assert steps(lines) == [1, 2] and lines.read() is False
    with path.open("a") as file:
        file.write("[]\nnonsense\n" + line(3))
    assert steps(lines) == [1, 2, 3] and lines.num_broken == 2


def test_a_resumed_and_a_replaced_run(tmp_path: Path) -> None:
    """--resume cuts the file and writes on, perhaps past the old length between two looks; --overwrite starts anew."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, (1, 2, 3))))
    lines = MetricLines(path)
    assert steps(lines) == [1, 2, 3]
    os.truncate(path, len(line(1)))
    assert steps(lines) == [1]
    path.write_text(line(1) + line(2, other=7.0) + line(3, other=7.0) + line(4))
    assert steps(lines) == [1, 2, 3, 4] and lines.lines[2]["other"] == 7.0
    path.unlink()
    assert steps(lines) == []
    path.write_text(line(1))
    assert steps(lines) == [1]


def test_who_lives(tmp_path: Path) -> None:
    """Ourselves; a process that has ended; nobody (a run empties the file at its end); another host while it writes."""
    assert not writer_lives(tmp_path)
    for pid, host, lives in ((os.getpid(), socket.gethostname(), True), (dead_pid(), socket.gethostname(), False),
                             (1, "another-host", True)):  # fmt: skip
        lock(tmp_path, pid, host)
        assert writer_lives(tmp_path) == lives
    os.utime(tmp_path / ".lock", (0, 0))
    assert not writer_lives(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert not writer_lives(tmp_path)


def test_time_left_by_hand() -> None:
    """Ten steps of 2 s, the last one just now, 5 to go: 10 s. Nothing is promised from one step, or without a plan."""
    now = time.time()
    lines = [{"step": step, "time": now - 2 * (10 - step)} for step in range(1, 11)]
    assert seconds_left(lines, 15) == pytest.approx(10, abs=0.5)
    assert seconds_left(lines[:1], 15) is None and seconds_left(lines, None) is None and seconds_left(lines, 10) == 0.0


def test_sparkline_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, None, 3]) == "▄ ▄" and sparkline([None]) == "" and sparkline([]) == ""
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert sparkline([0.0, 0.0, None, 0.0]) == "▁▁ ▁"  # a reward that nobody earns is no half of one


def shown(folder: Path) -> str:
    said = io.StringIO()
    watch(folder, Console(file=said, width=300), once=True)
    return said.getvalue()


def test_says_where_a_run_stands(run_folder: Path) -> None:
    """Step, curves, the last evaluation beside the first and the teacher, warnings, the last answer."""
    text = shown(run_folder)
    for words in ("30/30  finished, 7.2 s of training", "Loss", "0.06667", "█", "Overlap of likely tokens",
                  f"step 30  {DATASET}: avg@4 0.800 [0.780, 0.820], 0.200 at step 0, teacher 0.930",
                  "! 1 of 1,920 (< 0.1 %) training answers were cut",
                  "an answer of step 30: reward 0, cut at the limit", "question 2"):  # fmt: skip
        assert words in text


def test_words_of_a_model_cannot_command_a_terminal(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences in names and answers (clear the screen, set the title, C1 codes) are shown."""
    monkeypatch.setattr(module, "tokenizer_decode", lambda run: lambda ids: f"\x1b]0;title\x07{decode(ids)}")
    recipe = run_folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("</pre>", "\\u001b[2J\\u009b2J"))
    (run_folder / "summary.json").unlink()
    text = shown(run_folder)
    assert r"\x1b[2J\x9b2J" in text and r"\x1b]0;title\x07answer 5" in text and EVIL.split("\x00")[0] in text
    assert not {"\x1b", "\x9b", "\x00", "\u202e"} & set(text)


@pytest.mark.parametrize(("living", "summary", "said"), [
    (True, True, "30/30  a moment left"), (False, True, "finished, 7.2 s"),
    (False, False, "stopped at step 30; go on with: opdkit train"),
])  # fmt: skip
def test_running_finished_or_stopped(run_folder: Path, living: bool, summary: bool, said: str) -> None:
    """A living writer is believed before an old summary.json: the run was resumed."""
    lock(run_folder, os.getpid() if living else dead_pid())
    if not summary:
        (run_folder / "summary.json").unlink()
    assert said in shown(run_folder) and (Follower(run_folder).look().state == "running") == living


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What happens to the run, one act between two looks; a look too many fails."""

    def plan(*acts: Callable[[], object]) -> None:
        rest = list(acts)
        monkeypatch.setattr(module.time, "sleep", lambda _: rest.pop(0)())

    return plan


def test_follows_to_the_end(tmp_path: Path, acts: Callable[..., None]) -> None:
    """Waited for, begun, half a line, a whole one, ended: plain lines where nothing can be redrawn, each said once."""
    folder, said = tmp_path / "run", io.StringIO()

    def begin() -> None:
        folder.mkdir()
        (folder / "recipe.toml").write_text('name = "r"\n[train]\nsteps = 2\n')
        lock(folder, os.getpid())

    def write(text: str) -> Callable[[], object]:
        def writes() -> None:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(text)

        return writes

    def end() -> None:
        (folder / ".lock").write_text("")
        (folder / "summary.json").write_text(json.dumps({"name": "r", "seconds": 3.0, "warnings": []}))

    acts(begin, write(line(1) + line(2)[:5]), lambda: None, write(line(2)[5:]), end)
    watch(folder, Console(file=said, width=200), every_s=9.0)
    waiting, *rest = said.getvalue().splitlines()
    assert waiting == f"waiting for a run at {folder} (Ctrl-C to stop)"
    assert rest == ["r 1/2  loss 1", "r 2/2  a moment left  loss 0.5", "finished, 3.0 s of training"]


def test_a_step_is_said_once_while_its_time_left_runs_down(run_folder: Path, acts: Callable[..., None]) -> None:
    said = io.StringIO()
    (run_folder / "recipe.toml").write_text('name = "r"\n[train]\nsteps = 40\n')
    (run_folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "time": time.time() - 10 + step}) + "\n" for step in range(1, 11))
    )
    lock(run_folder, os.getpid())
    real = time.time
    with pytest.MonkeyPatch.context() as patch:
        acts(lambda: patch.setattr(time, "time", lambda: real() + 9), lambda: (run_folder / ".lock").write_text(""))
        watch(run_folder, Console(file=said, width=200))
    assert len([each for each in said.getvalue().splitlines() if " 10/40  " in each]) == 1


def test_looking_ends_when_nobody_reads_on(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`opdkit watch RUN | head -1` gives the prompt back, though the run goes on: it looks no further."""
    lock(run_folder, os.getpid())
    read, write = os.pipe()
    os.close(read)
    looks: list[float] = []
    monkeypatch.setattr(time, "sleep", looks.append)
    with suppress(OSError), os.fdopen(write, "w") as gone:
        watch(run_folder, Terminal(file=gone))
    assert len(looks) <= 1 and writer_lives(run_folder)


def test_redrawn_on_a_terminal(run_folder: Path, acts: Callable[..., None]) -> None:
    """In place while it runs; the last picture stays."""
    said = io.StringIO()
    lock(run_folder, os.getpid())
    acts(lambda: None, lambda: (run_folder / ".lock").write_text(""))
    watch(run_folder, Console(file=said, force_terminal=True, width=200, height=60, _environ={"TERM": "xterm"}))
    assert said.getvalue().count("Loss") == 4  # three looks, and once more when it leaves
    assert "\x1b[1A" in said.getvalue() and "finished" in said.getvalue()


def test_refusals(tmp_path: Path, run_folder: Path) -> None:
    """One sentence each: nothing there (with what is there instead), a file, a folder of something else."""
    with pytest.raises(UserError, match=r"there is no run at .*nope yet; runs there: run"):
        watch(run_folder.parent / "nope", Console(), once=True)
    with pytest.raises(UserError, match="is a file, not a run folder"):
        watch(run_folder / "recipe.toml", Console())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not a run folder: it holds no"):
        watch(tmp_path / "other", Console())


@pytest.mark.parametrize("piece", ["summary.json", "metrics.jsonl", "environment.json", "recipe.toml", "rows", "eval"])
def test_missing_and_damaged_pieces_do_not_end_it(run_folder: Path, piece: str) -> None:
    path = run_folder / piece
    if path.is_dir():
        for file in path.iterdir():
            file.write_bytes(b"\x00{")
        assert "run </pre>" in shown(run_folder)
        shutil.rmtree(path)
    else:
        path.write_bytes(b"\x00{")
        assert shown(run_folder)
        path.unlink()
    assert shown(run_folder)
