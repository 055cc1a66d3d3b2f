"""One page over several runs: what differs is said, what is the same is said once, nothing is mixed up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hostile_run import DATASET, EVIL, make_summary, result, write_answers, write_run
from test_page import ALLOWED, Page

from opdkit.errors import UserError
from opdkit.reporting import write_comparison
from opdkit.reporting.html.markup import escape


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A run of opd and one of grpo from the same student, which ended lower, with another learning rate."""
    for name in ("a", "b"):
        write_run(tmp_path / name)
    summary = make_summary(name="other", method="grpo", arms={})
    summary["eval"]["student_after"] = {DATASET: result(0.5, 0.48, 0.52)}
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary))
    for name, lr in (("a", "0.001"), ("b", "0.002")):
        recipe = tmp_path / name / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("steps = 30", f"steps = 30\nlr = {lr}"))
    return [tmp_path / "a", tmp_path / "b"]


def read(folders: list[Path], path: Path) -> Page:
    assert write_comparison(folders, path) == path
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags <= ALLOWED and not {name for name in page.attributes if name.startswith("on") or name == "style"}
    return page


def test_says_what_differs(two: list[Path], tmp_path: Path) -> None:
    """Both ends, the shared beginning and teacher once, the one key in which the recipes differ, and the warnings."""
    text = read(two, tmp_path / "page.html").text
    assert text.count("Student before0.229") == 2  # in the figure and in the table
    assert "other0.500" in text and text.count("Teacher0.930[0.918, 0.941]") == 1
    recipes = text[text.index("Recipes") :]
    assert "train.lr0.0010.002" in recipes and "train.steps" not in recipes and "What they do not share" in recipes
    assert "Same" not in text and "other: 1 of 1,920 (< 0.1 %) training answers were cut" in text
    assert "holds no evaluation with its answers" in text


def test_curves_lie_over_each_other(two: list[Path], tmp_path: Path) -> None:
    """One panel for each quantity, with a line of each run's colour; the held-out curve too."""
    read(two, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    (panel,) = re.findall(r"<figure><figcaption>Loss</figcaption>.*?</figure>", html)
    assert re.findall(
        r'<g class="(s\d)" data-x="1 2 3 [^"]*" data-y="2;1;[^"]*" data-n="([^"]*)"><polyline', panel
    ) == [
        ("s0", escape(f"run {EVIL}")),
        ("s1", "other"),
    ]
    (held_out,) = re.findall(rf"<figure><figcaption>Held-out: {DATASET}</figcaption>.*?</figure>", html)
    assert held_out.count('class="band"') == 2 and "0.2 [0.18, 0.22];0.4 [0.38, 0.42];0.8 [0.78, 0.82]" in held_out


def test_paired_differences(two: list[Path], tmp_path: Path) -> None:
    """Every problem 0.5 worse: the mean difference is -0.5 with an interval below 0, though the two intervals of the
    means overlap."""
    write_answers(two[0], 30, [1.0, 0.5] * 8)
    write_answers(two[1], 30, [0.5, 0.0] * 8)
    text = read(two, tmp_path / "page.html").text
    assert f"other, {DATASET}avg0.7500.250-0.500[-0.572, -0.235]worse" in text
    assert f"other, {DATASET}maj@2" in text


def test_runs_of_one_name_keep_apart(two: list[Path], tmp_path: Path) -> None:
    (two[1] / "summary.json").write_text((two[0] / "summary.json").read_text())
    text = read(two, tmp_path / "page.html").text
    assert f"({two[0]})" in text and f"({two[1]})" in text


def test_refusals(two: list[Path], tmp_path: Path) -> None:
    """The same run twice, a folder that is none, more runs than colours."""
    for folders, words in (([two[0], two[0]], "is given twice"), ([two[0], tmp_path / "nope"], "is not a run folder"),
                           ([two[0]] * 7, "more than the 6 colours")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            write_comparison(folders, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("problems", "verdict"), [(9, "too few to tell"), (10, "worse")])
def test_few_problems_settle_nothing(two: list[Path], tmp_path: Path, problems: int, verdict: str) -> None:
    """Every problem lost: 10 of 10 is worse, 9 of 9 is too few to tell, on the page as in `opdkit compare`."""
    from opdkit.cli.tables import _verdict
    from opdkit.evaluation.compare_runs import compare_runs

    write_answers(two[0], 30, [1.0] * problems)
    write_answers(two[1], 30, [0.0] * problems)
    assert verdict in read(two, tmp_path / "page.html").text
    (found,) = compare_runs(str(two[0]), str(two[1]))["sets"].values()
    assert ("too few" in _verdict("avg", found["metrics"]["avg"])) == (problems == 9)
