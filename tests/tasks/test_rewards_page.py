"""What docs/guides/rewards.md and docs/guides/grading.md show runs as it is written there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from opdkit.recipe import parse_recipe
from opdkit.tasks.guard import make_task, task_named
from opdkit.tasks.options import resolve_task
from opdkit.types import Problem

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "guides" / "rewards.md").read_text(encoding="utf-8")


def blocks(marker: str) -> list[str]:
    """Indented blocks of the page that hold the marker, without their indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found if marker in block]


def test_the_file_of_ones_own_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten lines, saved as they stand, with and without their option, in a recipe's form and the command line's."""
    (source,) = re.findall(r"```python\n(# palindrome.py\n.*?)```", PAGE, re.DOTALL)
    assert len([line for line in source.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "palindrome.py").write_text(source)
    (recipe,) = blocks('task = "palindrome.py"')
    said = re.findall(r'task = ("palindrome\.py"|\{ name = "palindrome\.py"[^}]*\})', recipe)
    lines = [f"task = {value}" for value in sorted(said)]  # without its option first
    (command,) = re.findall(r'--task "(palindrome[^"]*)"', PAGE)
    problem = Problem(id="p", task="palindrome.py", messages=())
    wanted = [([1.0, 1.0, 0.0, 0.0]), ([0.0, 1.0, 0.0, 0.0])]
    options = [resolve_task(tomllib.loads(line)["task"]) for line in lines]
    for chosen, scores in [*zip(options, wanted, strict=True), (task_named(command), wanted[1])]:
        task = make_task(chosen, [problem])
        assert [g.score for g in task.grade([(problem, word) for word in ("Anna", "anna", "Bob's", "")])] == scores
        assert task.num_crashes == 0


def test_the_sum_of_terms_is_a_recipe(tmp_path: Path) -> None:
    """The recipe's section, and the reward it gives by hand: right, in form, half of the free length over."""
    (section,) = blocks('name = "weighted"')
    raw = {"name": "r", "model": {"path": "m"}, "method": {"name": "grpo"}, "train": {"steps": 1}}
    task = make_task(parse_recipe({**raw, **tomllib.loads(section)}).data.task)
    problem = Problem(id="p", task="multiple_choice", messages=(), gold="A")
    frame = "<reasoning></reasoning><answer>A</answer>"
    answer = frame.replace("><", ">" + "x" * (7500 - len(frame)) + "<", 1)
    assert task.grade([(problem, answer)])[0].score == pytest.approx(1.0 + 0.1 - 0.2 * 0.5)


def test_metrics_that_the_page_names_exist() -> None:
    """Verdicts and the numbers of every task."""
    task = make_task(resolve_task("multiple_choice"))
    task.grade([(Problem(id="p", task="multiple_choice", messages=(), gold="A"), "A")])
    names = {metric.name for metric in task.drain()}
    said = set(re.findall(r"`(?:grading/)?(num_\w+|accuracy|incorrect_format|time/grading_s)`", PAGE))
    assert {name if "/" in name else f"grading/{name}" for name in said} >= names
