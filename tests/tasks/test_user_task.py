"""Tasks of the user's own: whatever one does, the trainer lives, loses one answer, and says which and why."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pool import descendants, wait_until_gone

from opdkit.errors import UserError
from opdkit.tasks.base import MAX_TEXT_CHARACTERS, Crash, Grade, GraderDown
from opdkit.tasks.guard import GuardedTask, make_task
from opdkit.tasks.options import resolve_task
from opdkit.tasks.user import imports
from opdkit.tasks.user import task as user_task
from opdkit.types import Problem

PROBLEM = Problem(id="p7", task="t", messages=({"role": "user", "content": "?"},), gold="g", meta={"tests": [1, "x"]})

# Does with an answer what the answer says.
OBEDIENT = """
import ctypes, os, sys, threading, time
from opdkit.tasks import Grade

def grade(problem, text):
    if text == "loop":
        while True: pass
    if text == "loop in C":
        any(iter(int, 1))
    if text == "sleep":
        time.sleep(100)
    if text == "os._exit":
        os._exit(0)
    if text == "sys.exit":
        sys.exit(0)
    if text == "crash":
        ctypes.string_at(8)
    if text == "kill":
        os.kill(os.getpid(), 9)
    if text == "raise":
        return [][0]
    if text == "raise half":
        raise ValueError("\\ud800")
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "print":
        print("printed" * 1000); sys.stdout.write("written"); os.write(1, b"raw")
    if text == "input":
        input()
    if text == "fork":
        os.fork()
    if text == "fork and live":
        if os.fork() == 0:
            time.sleep(100)
    if text == "threads":
        for _ in range(20):
            threading.Thread(target=time.sleep, args=(100,)).start()
    if text == "half":
        return Grade(score=0.0, verdict="wrong", parsed="a\\ud800", feedback="\\udfff")
    if text == "close the channel":
        os.closerange(3, 100); time.sleep(100)
    if text == "write to the channel":
        for fd in range(3, 20):
            try: os.write(fd, b"\\x00\\x00\\x00\\x02{}" * 9)
            except OSError: pass
        time.sleep(100)
    values = {
        "nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "list": [1.0], "complex": 1j,
        "huge": 10**400, "true": True, "int": 2,
        "no verdict": Grade(score=1.0, verdict="yes"), "ungraded zero": Grade(score=None, verdict="wrong"),
        "number as text": Grade(score=1.0, verdict="correct", parsed=5),
        "score as text": Grade(score="1", verdict="wrong"),
    }
    if text == "long":
        return Grade(score=1.0, verdict="correct", parsed="x" * 2_000_000)
    if text == "long feedback":
        return Grade(score=1.0, verdict="correct", feedback="x" * 200_000_000)
    if text == "numpy":
        import numpy
        return numpy.float32(0.5)
    return values.get(text, 1.0)

grade.time_limit_s = 4.0
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def obedient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedTask]:
    file = tmp_path_factory.mktemp("tasks") / "obedient.py"
    file.write_text(OBEDIENT)
    task = make_task(resolve_task(str(file)), [PROBLEM])
    yield task
    task.close()


def grade(task: GuardedTask, *texts: str) -> list[Grade]:
    return task.grade([(PROBLEM, text) for text in texts])


def task_of(folder: Path, source: str, name: str = "t.py", **options: Any) -> GuardedTask:
    (folder / name).write_text(textwrap.dedent(source))
    return make_task(resolve_task({"name": str(folder / name), **options}))


def fault(value: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        resolve_task(value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("loop", "there was no answer within 4 s, so its process was ended, and another started"),
        ("loop in C", "no answer within 4 s"),
        ("sleep", "if it needs longer, give what grades a time_limit_s"),
        ("close the channel", "its process was killed by SIGKILL"),
        ("os._exit", "its process ended with status 0, as by os._exit, and another started"),
        ("sys.exit", "SystemExit: 0 (obedient.py:"),
        ("crash", "its process was killed by SIGSEGV"),
        ("kill", "its process was killed by SIGKILL (out of memory?)"),
        ("raise", "IndexError: list index out of range (obedient.py:"),
        ("raise half", "ValueError: \\ud800 (obedient.py:"),
        ("interrupt", "KeyboardInterrupt:  (obedient.py:"),
        ("input", "EOFError: EOF when reading a line (obedient.py:"),
        ("nan", "ValueError: a score is nan"),
        ("inf", "ValueError: a score is inf"),
        ("text", "TypeError: grade returned str, neither a Grade nor a number"),
        ("none", "grade returned NoneType"),
        ("list", "grade returned list"),
        ("complex", "grade returned complex"),
        ("huge", "OverflowError: int too large to convert to float"),
        ("long", f"parsed or feedback has 2,000,000 characters, over {MAX_TEXT_CHARACTERS:,}"),
        ("long feedback", "parsed or feedback has 200,000,000 characters"),
        ("no verdict", 'ValueError: score 1.0 with verdict "yes"'),
        ("ungraded zero", 'score None with verdict "wrong"; None goes with "error" alone'),
        ("number as text", "TypeError: parsed or feedback is int, not text"),
        ("score as text", "TypeError: a score is str, not a number"),
        ("write to the channel", "its process sent something else than an answer, and was ended"),
    ],
)
def test_what_costs_one_answer(obedient: GuardedTask, text: str, why: str) -> None:
    """It stays ungraded, is counted and told once; those before and behind it are graded."""
    obedient.drain()
    obedient._told.clear()
    obedient._crashes.clear()
    before, lost, after = grade(obedient, "a", text, "b")
    assert (before.score, after.score) == (1.0, 1.0)
    assert isinstance(lost, Crash) and (lost.score, lost.verdict) == (None, "error")
    assert why in lost.why and lost.feedback == f"the grader failed: {lost.why}"
    assert {metric.name: metric.value for metric in obedient.drain()}["grading/num_crashes"] == 1
    told = list(obedient.new_crashes())
    assert all("failed on an answer, which stays ungraded: " in sentence and sentence.isascii() for sentence in told)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [("fork", 1.0), ("fork and live", 1.0), ("threads", 1.0), ("true", 1.0), ("int", 2.0), ("numpy", 0.5)],
)
def test_what_costs_nothing(obedient: GuardedTask, text: str, score: float) -> None:
    """A second process that comes back from the grader does not answer for it."""
    assert [one.score for one in grade(obedient, "a", text, "b", "c")] == [1.0, score, 1.0, 1.0]


def test_what_is_printed_is_no_answer(obedient: GuardedTask, capfd: pytest.CaptureFixture[str]) -> None:
    """It is seen, on standard error; the trainer's standard output may be read by a program."""
    task = make_task(obedient.options)
    assert [one.score for one in grade(task, "print", "b")] == [1.0, 1.0]
    task.close()
    said = capfd.readouterr()
    assert said.out == "" and all(word in said.err for word in ("printed", "written", "raw"))


def test_half_a_character_is_escaped(obedient: GuardedTask) -> None:
    (one,) = grade(obedient, "half")
    assert (one.parsed, one.feedback) == ("a\\ud800", "\\udfff")


def test_the_grader_gets_the_problem_and_gives_all_of_its_grade(here: Path) -> None:
    """Every field there; numbers and accuracy of a grade of its own kind back."""
    task = task_of(
        here,
        """
        from dataclasses import dataclass
        from opdkit.tasks import Grade

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Mine(Grade):
            share: float = 0.0

            @property
            def accuracy(self):
                return self.share / 2

            @property
            def numbers(self):
                return {"share": self.share}

        def grade(problem, text):
            said = [problem.id, problem.gold, problem.solution, problem.messages[0]["content"], problem.meta["tests"]]
            return Mine(score=0.25, verdict="wrong", parsed=repr(said), share=0.5)
        """,
    )
    (one,) = grade(task, "x")
    assert one.parsed == "['p7', 'g', None, '?', [1, 'x']]"
    assert (one.score, one.accuracy, dict(one.numbers)) == (0.25, 0.25, {"share": 0.5})


STATEFUL = """
import os, threading
from opdkit.tasks import Grade

class Task:
    needs_gold = True
    time_limit_s = 4.0

    def __init__(self, step: int = 1):
        self.num, self.step, self.stats = 0, step, {"num_seen": 0}

    def grade(self, items):
        if any(text == "loop" for _, text in items):
            while True: pass
        if any(text == "exit" for _, text in items):
            os._exit(3)
        self.stats["num_seen"] += len(items)
        grades = []
        for _, text in items:
            self.num += self.step
            grades.append(Grade(score=float(self.num), verdict="correct"))
        return grades[:-1] if any(text == "short" for _, text in items) else grades

    def describe(self):
        return {"step": self.step, "size": len(items) if False else 3}

    def close(self):
        open("closed", "w").write("yes")
"""


def test_a_class_keeps_its_state_until_its_process_is_lost(here: Path) -> None:
    """Over batches; a batch that fails is graded one by one. Counts go on where they were."""
    task = task_of(here, STATEFUL, step=2)
    assert [one.score for one in grade(task, "a", "b")] == [2.0, 4.0] and grade(task, "c")[0].score == 6.0
    assert [one.score for one in grade(task, "a", "exit", "b")] == [2.0, None, 2.0]
    assert [one.score for one in grade(task, "a", "short")] == [8.0, None]
    assert [one.score for one in (*grade(task, "a"), *grade(task, "loop"))] == [12.0, None]
    assert {metric.name: metric.value for metric in task.drain()}["grading/num_seen"] == 3 + 1 + 6
    assert task.describe()["runs"] == {"step": 2, "size": 3} and task.options.needs_gold
    task.close()
    task.close()
    assert (here / "closed").read_text() == "yes"


def test_one_that_grades_nothing_stops_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many times in a row: going on would cost hours. Once less does not, nor as often with a grade between."""
    assert user_task._MAX_LOST_IN_A_ROW == 10
    monkeypatch.setattr(user_task, "_MAX_LOST_IN_A_ROW", 3)
    task = task_of(
        here, "import os\ndef grade(problem, text):\n    os._exit(5) if text == 'exit' else None\n    return 1"
    )
    grade(task, "exit", "exit", "a", "exit", "exit", "a")
    with pytest.raises(GraderDown, match="graded nothing 3 times in a row; the last time its process ended with"):
        grade(task, "exit", "exit", "exit", "a")


@pytest.mark.parametrize("where", ["grade", "__init__", "import"])
@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("while True: pass", "no answer within 2 s"),
        ("import os; os._exit(0)", "ended with status 0"),
        ("1 / 0", "Zero"),
    ],
)
def test_it_is_refused_before_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str, does: str, why: str
) -> None:
    """One that always loops, exits or raises: one sentence that says when, and nothing is left running."""
    assert imports.START_LIMIT_S == 60.0
    if does.startswith("while") and where != "grade":
        monkeypatch.setattr(imports, "START_LIMIT_S", 3.0)
        why = "no answer within 3 s"
    before = descendants(os.getpid())
    source = f"""
        {does if where == "import" else ""}
        class Task:
            time_limit_s = 2
            def __init__(self):
                {does if where == "__init__" else "pass"}
            def grade(self, items):
                {does if where == "grade" else "pass"}
        """
    (here / "bad.py").write_text(textwrap.dedent(source))
    with pytest.raises(ValueError) as refusal:
        make_task(resolve_task("bad.py"), [PROBLEM])
    said = {
        "import": "bad.py cannot be imported: ",
        "__init__": "cannot be made: ",
        "grade": "fails on an empty answer",
    }
    assert said[where] in str(refusal.value) and why in str(refusal.value) and "\n" not in str(refusal.value)
    assert isinstance(refusal.value, UserError) or where == "import"
    assert not wait_until_gone(descendants(os.getpid()) - before)


def test_check_ends_with_a_sentence(here: Path) -> None:
    """`opdkit check` on a recipe whose task ends the process that imports it."""
    (here / "bad.py").write_text("import os\nos._exit(0)\n")
    (here / "r.toml").write_text(
        'name = "r"\n[model]\npath = "m"\n[data]\ntrain = "d.jsonl"\ntask = "bad.py"\n'
        '[method]\nname = "grpo"\n[train]\nsteps = 1\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "opdkit.cli", "check", "r.toml"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be imported: its process ended with status 0" in " ".join((done.stdout + done.stderr).split())


def test_neighbours_can_be_imported_and_belong_to_the_grader(here: Path) -> None:
    """By a file and by a module; their digests are the run's, and what is installed is not."""
    (here / "helper.py").write_text("SCORE = 0.5\n")
    task = task_of(here, "import numpy, helper\ndef grade(problem, text):\n    return helper.SCORE\n", name="main.py")
    assert grade(task, "a")[0].score == 0.5
    name = str(here / "main.py")
    first = task.options.user_files
    assert set(first) == {name, f"{name} imports helper.py"}
    (here / "helper.py").write_text("SCORE = 0.75\n")
    again = resolve_task(name)
    assert again.user_files[name] == first[name] and again.user_files != first
    assert grade(make_task(again), "a")[0].score == 0.75


def test_a_file_edited_during_a_run(here: Path) -> None:
    """The grader stays the one the run began with, also in a process that is started again; where a neighbour has
    changed, that cannot be had, and the run ends with a sentence."""
    (here / "helper.py").write_text("SCORE = 0.5\n")
    exits = "    os._exit(0) if text == 'exit' else None\n"
    task = task_of(here, f"import os, helper\ndef grade(problem, text):\n{exits}    return helper.SCORE")
    digests = task.options.user_files
    (here / "t.py").write_text("def grade(problem, text): return 0.0")
    assert [one.score for one in grade(task, "a", "exit", "b")] == [0.5, None, 0.5]
    assert task.options.user_files == digests != resolve_task(str(here / "t.py")).user_files
    (here / "helper.py").write_text("SCORE = 0.6\n")
    with pytest.raises(GraderDown, match=r"helper\.py has changed since it was first read"):
        grade(task, "a", "exit", "b")


def test_a_term_of_a_reward_may_be_one(here: Path) -> None:
    """What it fails on has no sum, and is counted as its failure."""
    (here / "t.py").write_text(OBEDIENT)
    terms = {"right": {"weight": 1.0, "task": "multiple_choice"}, "mine": {"weight": 2.0, "task": "t.py"}}
    task = make_task(resolve_task({"name": "weighted", "terms": terms}))
    asked = Problem(id="p", task="multiple_choice", messages=(), gold="A")
    good, bad, other = task.grade([(asked, text) for text in ("<answer>A</answer>", "os._exit", "raise")])
    assert (good.score, bad.score, other.score) == (3.0, None, None)
    assert bad.feedback is not None and "the term mine: its process ended with status 0" in bad.feedback
    assert task.num_crashes == 2
    task.close()


def test_options_keep_their_types(here: Path) -> None:
    """As annotated: limits, choices, tuples and nested tables reach the function as they were checked here."""
    source = """
        from typing import Annotated, Literal
        from pydantic import Field
        from opdkit.tasks import Option

        def grade(problem, text, *, pair: tuple[int, ...] = (1, 2), share: Annotated[float, Field(gt=0, le=1)] = 0.5,
                  kind: Literal["a", "b", 3] = "a", table: dict[str, list[int]] = {"x": [1]}, none: str | None = None,
                  num: Annotated[int, Option("how many", above=0)] = 1, anything=None):
            assert isinstance(pair, tuple) and all(isinstance(items, list) for items in table.values())
            raise ValueError(repr((pair, share, kind, table, none, num, anything)))
    """
    task = task_of(here, source, pair=[3], share=1, kind=3, table={"y": [2, 3]}, num=2, anything={"k": (1,)})
    (one,) = grade(task, "a")
    assert isinstance(one, Crash) and "((3,), 1.0, 3, {'y': [2, 3]}, None, 2, {'k': (1,)})" in one.why
    name = str(here / "t.py")
    assert "share = 0: input should be greater than 0" in fault({"name": name, "share": 0})
    assert "kind = 'c'" in fault({"name": name, "kind": "c"}) and "num = 0" in fault({"name": name, "num": 0})
    assert "table" in fault({"name": name, "table": {"y": ["z"]}})


@pytest.mark.parametrize("limit", ["0", "-1", "'x'", "float('nan')", "True"])
def test_a_limit_that_is_none_is_refused(here: Path, limit: str) -> None:
    (here / "t.py").write_text(f"def grade(problem, text): return 1\ngrade.time_limit_s = {limit}\n")
    assert "time_limit_s of grade is" in fault("t.py")


def test_close_ends_all_that_it_started(here: Path) -> None:
    """Processes that the grader forked or started, too."""
    before = descendants(os.getpid())
    source = "import subprocess\nchild = subprocess.Popen(['sleep', '100'])\ndef grade(problem, text): return 1\n"
    task = task_of(here, source)
    grade(task, "a")
    ours = descendants(os.getpid()) - before
    assert len(ours) == 2
    task.close()
    assert not wait_until_gone(ours)


@pytest.mark.parametrize("does", ["while True: pass", "import time; time.sleep(100)"])
def test_nothing_outlives_a_killed_trainer(here: Path, does: str) -> None:
    """kill -9 of the trainer in the middle of a grade."""
    (here / "t.py").write_text(f"def grade(problem, text):\n    print('grading', flush=True)\n    {does}\n")
    script = (
        "from opdkit.tasks.options import resolve_task\nfrom opdkit.types import Problem\n"
        "task = resolve_task('t.py').make()\ntask.grade([(Problem(id='p', task='t', messages=()), 'a')])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert trainer.stderr is not None
    with trainer.stderr:
        assert trainer.stderr.readline() == "grading\n"
        below = descendants(trainer.pid)
        assert below
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
        assert not wait_until_gone(below)


def test_an_interrupted_grade_does_not_answer_the_next_one(here: Path) -> None:
    """Ctrl-C while it grades: the exception passes, and the next answer gets its own grade."""
    task = task_of(
        here, "import time\ndef grade(problem, text):\n    time.sleep(float(text) * 0.5)\n    return float(text)\n"
    )
    inherited = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            grade(task, "2")
    finally:
        signal.signal(signal.SIGALRM, inherited)
    assert [one.score for one in grade(task, "0", "1")] == [0.0, 1.0]
    with contextlib.suppress(Exception):
        task.close()


def test_a_slow_import_is_waited_for(here: Path) -> None:
    """As long as START_LIMIT_S; the answer's own limit does not count it."""
    source = "import time\ntime.sleep(1.5)\ndef grade(problem, text): return 1\ngrade.time_limit_s = 0.5\n"
    started = time.monotonic()
    assert grade(task_of(here, source), "a")[0].score == 1.0
    assert time.monotonic() - started > 1.5
