"""Options of tasks: what a recipe may say, what it becomes, and which sentences refuse the rest."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit import toml
from opdkit.tasks import TASKS
from opdkit.tasks.arguments import option_arguments
from opdkit.tasks.code.task import CodeTask
from opdkit.tasks.math.task import MathTask
from opdkit.tasks.multiple_choice import MultipleChoiceTask
from opdkit.tasks.options import TaskOptions, resolve_task
from opdkit.tasks.weighted import WeightedTask

WEIGHTED = {
    "name": "weighted",
    "terms": {
        "right": {"weight": 1.0, "task": {"name": "tool_use", "feedback": "reveal"}},
        "short": {"weight": 0.5, "task": {"name": "length", "free_characters": 10, "max_characters": 20}},
    },
}


def fault(value: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        resolve_task(value)
    return str(refusal.value)


def test_a_name_is_the_task_with_its_defaults() -> None:
    """What the constructor's defaults are, the options are; nothing is said twice."""
    options = resolve_task("code")
    assert options.options == {
        "time_limit_s": 6.0,
        "memory_limit_mb": 1024,
        "float_tolerance": None,
        "max_slow_tests": 2,
        "feedback": "outcome",
    }
    assert options == resolve_task({"name": "code"}) == resolve_task(options)
    task = resolve_task({"name": "multiple_choice", "strict": True}).make()
    assert isinstance(task, MultipleChoiceTask) and task._strict


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("mth", 'does not exist; did you mean "math"?'),
        ("tool-use", 'did you mean "tool_use"?'),
        ("sudoku", "is not a task; known are arithmetic, code"),
        (3, "give the name of a task"),
        ({"feedback": "reveal"}, "give the name of a task"),
        ({"name": "tool_use", "feedbak": "reveal"}, 'feedbak is not an option of this task; did you mean "feedback"?'),
        ({"name": "arithmetic", "strict": True}, "strict is not an option of this task (options: none)"),
        ({"name": "tool_use", "feedback": "all"}, "feedback = 'all': input should be 'outcome' or 'reveal'"),
        ({"name": "code", "time_limit_s": 0}, "time_limit_s = 0: input should be greater than 0"),
        ({"name": "code", "memory_limit_mb": "1"}, "memory_limit_mb = '1': input should be a valid integer"),
        ({"name": "code", "float_tolerance": float("nan")}, "finite number"),
        ("", "give the name of a task"),
        ("{ name = 3", "is not a TOML table on one line"),
        ("math num_workers=-1", "num_workers = -1: input should be greater than 0"),
        ("code time_limit_s=fast", "time_limit_s = 'fast': input should be a valid number"),
        ({"name": "code", "sandbox": None}, "sandbox is not an option"),
        ({"name": "format"}, "pieces is missing; add it"),
        ({"name": "format", "pieces": ["a", ""]}, "none that is empty"),
        ({"name": "length", "free_characters": 5, "max_characters": 5}, "must be smaller than max_characters = 5"),
        ({"name": "weighted", "terms": {}}, "at least 1 item"),
        ({"name": "weighted", "terms": {"a": {"task": "math"}}}, "terms.a.weight is missing"),
        ({"name": "weighted", "terms": {"a/b": {"weight": 1, "task": "math"}}}, "should match pattern"),
        (
            {"name": "weighted", "terms": {"a": {"weight": 1, "task": "mth"}}},
            "terms.a.task = 'mth': does not exist; did",
        ),
        ({"name": "weighted", "terms": {"a": {"weight": 1, "tsk": "math"}}}, "terms.a.tsk"),
    ],
)
def test_refusals(value: Any, sentence: str) -> None:
    """Name, option, value and way out, before anything is started. Does not prove that every slip is caught."""
    assert sentence in fault(value)


def test_options_survive_a_recipe() -> None:
    """Written as TOML and read again they are the same object: a resumed run compares them."""
    for value in (
        "math",
        {"name": "tool_use", "feedback": "reveal"},
        WEIGHTED,
        {"name": "format", "pieces": ["a", "b"]},
    ):
        options = resolve_task(value)
        assert resolve_task(options.text) == options
        written = toml.dumps({"task": options.model_dump(mode="json", exclude_none=True)})
        assert resolve_task(tomllib.loads(written)["task"]) == options


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("math", "math"),
        ("code feedback=outcome", "code"),
        ("tool_use feedback=reveal ordered=true", '{ name = "tool_use", ordered = true, feedback = "reveal" }'),
        ('{ name = "code", time_limit_s = 2 }', '{ name = "code", time_limit_s = 2.0 }'),
        (
            "code float_tolerance=1e-6 memory_limit_mb=64",
            '{ name = "code", memory_limit_mb = 64, float_tolerance = 1e-06 }',
        ),
        ('format pieces=["a","b"]', '{ name = "format", pieces = ["a", "b"] }'),
    ],
)
def test_one_line_says_it_all(line: str, text: str) -> None:
    """For command lines, and for what identifies saved answers: only what differs from the defaults."""
    assert resolve_task(line).text == text
    assert resolve_task(text) == resolve_task(line)


def test_the_first_term_is_the_main_one() -> None:
    """Its problems are read, and its accuracy counts."""
    options = resolve_task(WEIGHTED)
    assert options.main.name == "tool_use" and options.needs_gold
    assert resolve_task("code").main.name == "code" and not resolve_task("code").needs_gold
    task = options.make()
    assert isinstance(task, WeightedTask) and task.main.name == "tool_use"


def test_leaks_are_warned_about() -> None:
    """reveal, also inside a term; nothing is known of defaults."""
    assert "gives the answer away" in resolve_task({"name": "tool_use", "feedback": "reveal"}).warnings("t")[0]
    assert "hidden tests" in resolve_task({"name": "code", "feedback": "reveal"}).warnings("t")[0]
    assert resolve_task(WEIGHTED).warnings("t")[0].startswith('t.terms.right.task: feedback = "reveal" prints the gold')
    assert not any(resolve_task(name).warnings("t") for name in ("math", "code", "tool_use", "multiple_choice"))


def test_bounds_of_a_reward_by_hand() -> None:
    """Right but too long: 1 - 0.5. Wrong and in form: 0 + 0.2; a punishment of 0.3 is never earned by the wrong one."""
    assert resolve_task("math").bounds == (1.0, 0.0)
    assert resolve_task(WEIGHTED).bounds == (0.5, 0.0)
    form = {"name": "format", "pieces": ["a"]}
    for weight, bounds in ((0.2, (1.0, 0.2)), (-0.3, (0.7, 0.0))):
        terms = {"right": {"weight": 1, "task": "math"}, "form": {"weight": weight, "task": form}}
        assert resolve_task({"name": "weighted", "terms": terms}).bounds == pytest.approx(bounds)


@pytest.mark.parametrize("name", TASKS)
def test_every_option_is_explained(name: str) -> None:
    """`opdkit tasks` has a sentence for each."""
    for argument in option_arguments(TASKS[name]):
        assert argument.help


def test_python_callers_keep_what_a_recipe_cannot_say() -> None:
    assert "sandbox" not in {argument.name for argument in option_arguments(CodeTask)}
    assert [argument.name for argument in option_arguments(MathTask)] == ["num_workers", "cpu_s"]


# ---- tasks of the user's own ---------------------------------------------------------------------------------------

FILE = '''
"""Mine."""
from opdkit.tasks import Grade

def grade(problem, text, *, wanted: str, limit=5, kind: "Literal['a', 'b']" = "a"):
    return 1.0 if wanted in text[:limit] else 0.0

def other(problem, text):
    return Grade(score=0.5, verdict="wrong", parsed="x")

class Task:
    needs_gold = True
    def __init__(self, scale: float = 2.0):
        self.scale = scale
    def grade(self, items):
        return [Grade(score=self.scale, verdict="correct") for _ in items]

class NoTask:
    pass

number = 3
from typing import Literal
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's with a file and a package, and the import system as it was afterwards."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "mine.py").write_text(FILE)
    package = tmp_path / "their_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from their_pkg.inner import grade as top\n")
    (package / "inner.py").write_text(FILE)
    (package / "broken.py").write_text("import no_such_library\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def made(value: Any) -> tuple[TaskOptions, list[float | None]]:
    from opdkit.types import Problem

    options = resolve_task(value)
    problem = Problem(id="p", task="t", messages=())
    return options, [grade.score for grade in options.make().grade([(problem, "abc"), (problem, "xyzabc")])]


@pytest.mark.parametrize(
    "name", ["mine.py", "mine.py:grade", "their_pkg.inner", "their_pkg.inner:grade", "their_pkg.top"]
)
def test_a_function_of_ones_own(here: Path, name: str) -> None:
    """By file and by module, with options read off its arguments."""
    options, scores = made({"name": name, "wanted": "abc"})
    assert scores == [1.0, 0.0]
    assert options.options == {"wanted": "abc", "limit": 5, "kind": "a"} and not options.needs_gold
    assert options == resolve_task({"name": name, "wanted": "abc"})
    assert 'did you mean "limit"?' in fault({"name": name, "wanted": "a", "limits": 3})
    assert "kind = 'c': input should be 'a' or 'b'" in fault({"name": name, "wanted": "a", "kind": "c"})
    assert fault(name) == "wanted is missing; add it"


def test_a_class_of_ones_own(here: Path) -> None:
    """Made with its options; it may ask for golds."""
    options, scores = made({"name": "mine.py:Task", "scale": 3.0})
    assert scores == [3.0, 3.0] and options.needs_gold
    assert made("mine.py:other")[1] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nine.py", "there is no file nine.py"),
        ("mine.py:grad", "mine.py has no grad; it defines grade, other, Task, NoTask"),
        ("mine.py:NoTask", "the class NoTask has no method grade(self, items)"),
        ("mine.py:number", "number is neither a function of (problem, text) nor a class"),
        ("their_pkg.nothing", "their_pkg has no nothing"),
        (
            "their_pkg.broken",
            "their_pkg.broken cannot be imported: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("odd.py:a", "its option make has a name that every task has; rename it"),
        ("odd.py:b", "its argument path has no default and a type that a recipe cannot say"),
        ("no_pkg.task", "there is no module no_pkg"),
        ("bad.py", "bad.py cannot be imported: NameError: name 'nope' is not defined (bad.py:2)"),
        ("syntax.py", "syntax.py cannot be imported: SyntaxError"),
        ("exits.py", "exits.py cannot be imported: SystemExit: 0 (exits.py:2)"),
    ],
)
def test_what_of_ones_own_is_refused(here: Path, name: str, sentence: str) -> None:
    """One sentence that says where; no traceback."""
    (here / "bad.py").write_text("x = 1\nnope\n")
    (here / "odd.py").write_text(
        "import pathlib\ndef a(problem, text, make=1): return 1\ndef b(problem, text, path: pathlib.Path): return 1\n"
    )
    (here / "syntax.py").write_text("def (:\n")
    (here / "exits.py").write_text("import sys\nsys.exit(0)\n")
    assert sentence in fault(name)


def test_arguments_that_a_recipe_cannot_say_keep_their_defaults(here: Path) -> None:
    """A function as a default is no option; a bare default says its type."""
    (here / "t.py").write_text("def grade(problem, text, key=len, share=0.5, tags=()):\n    return share * key(text)\n")
    assert made({"name": "t.py", "share": 2.0})[0].options == {"share": 2.0, "tags": ()}
    assert made({"name": "t.py", "tags": ["a"]})[0].options["tags"] == ("a",)
    assert made("t.py")[1] == [1.5, 3.0]
    assert "share = 'x': input should be a valid number" in fault({"name": "t.py", "share": "x"})


def test_a_changed_file_is_read_again(here: Path) -> None:
    """Not a stale module; and an unchanged one is not run twice."""
    (here / "t.py").write_text("def grade(problem, text):\n    return 0.25\n")
    assert made("t.py")[1] == [0.25, 0.25]
    (here / "t.py").write_text("def grade(problem, text):\n    return 0.75\n")
    assert made("t.py")[1] == [0.75, 0.75]
