"""Sets of eval.data: each has its grader and, under [route], its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.errors import UserError
from opdkit.evaluation.compare_runs import compare_runs
from opdkit.metric_lines import of_steps
from opdkit.recipe import Recipe, parse_recipe, warnings
from opdkit.training.loop import train

MERGE, ADD = "arithmetic:merge-3:test", "arithmetic:add-3:test"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Problems of a file, in the letters that the tiny models know."""
    path = tmp_path / "sums.jsonl"
    rows = [{"id": f"s{n}", "problem": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def routed(models: dict[str, Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A run of one step with a teacher for each of two domains; the second is the student itself."""

    def make(data: Any, **eval_keys: Any) -> Recipe:
        paths = {"a": models["teacher"], "b": models["student"]}
        return parse_recipe(
            {
                "name": "run",
                "runs_dir": str(tmp_path / "runs"),
                "model": {"path": str(models["student"]), "dtype": "float32", "device": "cpu"},
                "route": {"column": "domain", "views": {"a": "one", "b": "two"}},
                "views": {
                    view: {"teacher": {"kind": "model", "path": str(paths[domain])}}
                    for domain, view in (("a", "one"), ("b", "two"))
                },
                "data": {
                    "train": [
                        {"path": "arithmetic:merge-3:train", "share": 0.5, "domain": "a", "limit": 8},
                        {"path": "arithmetic:add-3:train", "share": 0.5, "domain": "b", "limit": 8},
                    ],
                    "task": "arithmetic",
                    "instruction": "none",
                },
                "sampling": {"max_answer_tokens": 8, "group_size": 2},
                "method": {"name": "opd"},
                "train": {"steps": 1, "problems_per_step": 4, "lr": 1e-3, "warmup_steps": 0},
                "eval": {"data": data, "limit": 3, "samples": 2, **eval_keys},
                "diagnostics": {"every": 0},
            }
        )

    return make


def test_each_set_has_its_grader_and_its_teacher(
    routed: Callable[..., Recipe], sums: Path, tmp_path: Path, console: Console
) -> None:
    """Three sets: one of each domain, and one that no domain is named for, with a grader of its own. The teacher of b
    is the student before training, so on b both have the same answers; on the third set no teacher is measured."""
    source = str(sums)
    sets = [
        {"path": MERGE, "domain": "a"},
        {"path": ADD, "domain": "b"},
        {"path": source, "task": "math"},
    ]
    recipe = routed(sets)
    assert [said for said in warnings(recipe) if "names no domain" in said and source in said]
    summary = train(recipe, console=console)["eval"]
    assert {*summary["student_before"]} == {*summary["student_after"]} == {MERGE, ADD, source}
    assert {*summary["teacher"]} == {MERGE, ADD}
    assert summary["teacher"][ADD] == summary["student_before"][ADD]
    compared = compare_runs(f"{recipe.run_dir}@teacher", f"{recipe.run_dir}@before")
    assert {*compared["sets"]} == {MERGE, ADD} and compared["notes"] == [f"{source} is only in B"]
    lines = (recipe.run_dir / "eval" / "step_000000.jsonl").read_text().splitlines()
    asked = json.loads(lines[0])
    graders = {name: one["task"] for name, one in _sets(asked).items()}
    assert graders == {MERGE: "arithmetic", ADD: "arithmetic", source: "math"}


def _sets(asked: Any) -> dict[str, Any]:
    return asked["sets"] if "sets" in asked else _sets(next(v for v in asked.values() if isinstance(v, dict)))


def test_a_grader_for_one_set_leaves_the_run_as_it_was(
    recipe: Callable[..., Recipe], sums: Path, console: Console
) -> None:
    """One training set, two of evaluation: rewards and answers of the steps do not know of the second grader."""
    keys = ("train.steps=1", "train.warmup_steps=0", "data.limit=8", "data.instruction=none", "eval.limit=3")
    sets = f'[{{ path = "{sums}", task = "math" }}, "{MERGE}"]'
    both = recipe("opd", *keys, "eval.samples=1", f"eval.data={sets}", "name=both")
    one = recipe("opd", *keys, "eval.samples=1", f"eval.data={MERGE}", "name=one")
    found = [train(chosen, console=console)["eval"]["student_after"][MERGE] for chosen in (both, one)]
    assert found[0] == found[1]
    with_two, alone = (_metrics(chosen.run_dir) for chosen in (both, one))
    assert with_two == alone and alone["train/grad_norm"] > 0


def _metrics(folder: Path) -> dict[str, Any]:
    """Of the one step, but for times and memory."""
    (line,) = of_steps(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    return {key: value for key, value in line.items() if key.split("/")[0] not in ("time", "grading", "memory")}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([{"path": MERGE, "domain": "c"}], 'eval.data.0.domain = "c" is of no set of data.train'),
        ([{"path": MERGE, "domian": "a"}], "0.domian is not a key of a set"),
        ([{"domain": "a"}], "0.path is missing"),
        ([MERGE, {"path": MERGE, "domain": "a"}], f"{MERGE} is there twice"),
        ([{"path": MERGE, "task": "arithmetics"}], 'did you mean "arithmetic"'),
        ([{"path": MERGE, "task": "none"}], "names no grader"),
        ([{"path": MERGE, "task": {"name": "math", "formta": "boxed"}}, 3], "1"),
        ([], "a list of paths and of sets"),
    ],
)
def test_sets_that_cannot_be_are_refused(routed: Callable[..., Recipe], data: Any, sentence: str) -> None:
    with pytest.raises(UserError, match="eval") as refused:
        routed(data)
    assert sentence in str(refused.value)


def test_one_grader_with_two_options_is_refused(recipe: Callable[..., Recipe]) -> None:
    """An answer would have two verdicts."""
    strict = f'[{{ path = "{MERGE}", task = {{ name = "multiple_choice", strict = true }} }}]'
    with pytest.raises(UserError, match="graded by multiple_choice with other options"):
        recipe("grpo", "data.task=multiple_choice", f"eval.data={strict}")
