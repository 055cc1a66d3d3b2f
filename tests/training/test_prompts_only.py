"""Rows without a gold answer: they train where no reward is needed, their rewards are unknown, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe
from opdkit.reporting import write_report
from opdkit.run.rows import load_rows
from opdkit.training.loop import train

COMMON = ("train.steps=2", "train.warmup_steps=0", "train.problems_per_step=2", "eval.before=false", "data.limit=10")
LAYOUTS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "1+1"},
    "chat prompt": {"prompt": [{"role": "user", "content": "1+1"}]},
    "messages": {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
    "Alpaca": {"instruction": "1+1", "input": "", "output": "2"},
}


def prompts(path: Path, row: dict[str, Any], *, gold: str | None = None) -> str:
    """Ten rows like `row`; the first three with the gold, if one is given."""
    text = json.dumps(row)
    rows = [json.loads(text.replace("1+1", f"1+{n}")) for n in range(10)]
    if gold is not None:
        rows[:3] = [entry | {"answer": gold} for entry in rows[:3]]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return str(path)


def without_task(chosen: Recipe) -> Recipe:
    raw = chosen.as_dict()
    del raw["data"]["task"]
    return parse_recipe(raw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["opd", "topk_opd"])
def test_a_prompt_is_enough(recipe: Any, console: Console, tmp_path: Path, layout: str, method: str) -> None:
    """No task, no gold: it trains, every reward is unknown (never 0), and console, summary, metrics and report say so.
    The grader is nobody, so nothing of it is counted."""
    source = prompts(tmp_path / "p.jsonl", LAYOUTS[layout])
    chosen = without_task(recipe(method, *COMMON, f"data.train={source}"))
    assert chosen.data.task.is_none
    with console.capture() as captured:
        summary = train(chosen, console=console)
    lines = [json.loads(line) for line in (chosen.run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert "rollout/reward" not in line and line["rollout/num_ungraded"] == line["rollout/num_rows"] == 4
        assert not any(name.startswith("grading/") for name in line)
    said = "the rewards of 10 of 10 problems are unknown: data.task names no grader"
    assert said in captured.get() and any(said in warning for warning in summary["warnings"])
    assert "reward unknown" in captured.get()
    rows = load_rows(chosen.run_dir / "rows/step_000002.parquet")
    assert all(row.rollout.reward is None and row.taught is not None for row in rows)
    assert "reward <bdi>unknown</bdi>" in Path(write_report(chosen.run_dir)).read_text()


@pytest.mark.parametrize("task", ["math", "code", "multiple_choice", "tool_use"])
def test_a_task_grades_what_it_can(recipe: Any, console: Console, tmp_path: Path, task: str) -> None:
    """Whoever grades is not asked of rows without gold; code needs no sandbox for them."""
    source = prompts(tmp_path / "p.jsonl", LAYOUTS["prompt"])
    chosen = recipe("opd", *COMMON, f"data.train={source}", f"data.task={task}", "data.instruction=none")
    summary = train(chosen, console=console)
    assert summary["counts"]["ungraded_answers"] == summary["counts"]["answers"] == 8
    assert any("unknown: they have no gold answer" in warning for warning in summary["warnings"])


def test_some_rows_have_a_gold(recipe: Any, console: Console, tmp_path: Path) -> None:
    """They are graded; the others are unknown, and are in no mean."""
    source = prompts(tmp_path / "p.jsonl", LAYOUTS["prompt"], gold="7")
    chosen = recipe(
        "opd", *COMMON, "train.problems_per_step=10", f"data.train={source}", "data.task=math", "data.instruction=none"
    )
    summary = train(chosen, console=console)
    (line, _) = [json.loads(line) for line in (chosen.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["rollout/num_ungraded"] == 14 and line["grading/num_error"] == 0.0
    assert line["grading/num_correct"] + line["grading/num_wrong"] + line["grading/num_no_answer"] == 6
    assert any("the rewards of 7 of 10 problems are unknown" in warning for warning in summary["warnings"])


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("grpo", (), 'method.name = "grpo" needs rewards'),
        ("grpo_opd", (), 'method.name = "grpo_opd" needs rewards'),
        ("verified_sft", (), 'method.name = "verified_sft" needs rewards'),
        ("opd", ("weights.problems.name=paced",), "[weights] needs rewards"),
        ("opd", ("context.kind=peers",), 'context.kind = "peers" needs rewards'),
        ("opd", ("eval.data=arithmetic:merge-3:test",), "is graded by data.task, which names no grader"),
    ],
)
def test_who_needs_rewards_needs_a_task(recipe: Any, method: str, keys: tuple[str, ...], said: str) -> None:
    """Refused when the recipe is read, in a sentence with the way out."""
    raw = recipe(method, *keys).as_dict()
    del raw["data"]["task"]
    with pytest.raises(UserError) as caught:
        parse_recipe(raw)
    assert said in str(caught.value) and "set it, e.g. data.task" in str(caught.value)


def test_who_needs_rewards_needs_golds(recipe: Any, console: Console, tmp_path: Path) -> None:
    """A file of prompts is refused before a model is loaded."""
    source = prompts(tmp_path / "p.jsonl", LAYOUTS["prompt"])
    keys = (f"data.train={source}", "data.task=math", "model.path=/no/such")
    with pytest.raises(UserError, match="none of its 10 rows can be used: no answer column"):
        train(recipe("grpo", *keys), console=console)
    with pytest.raises(UserError, match="none of its 10 rows can be used: no answer column"):
        train(recipe("opd", *keys, f"eval.data={source}"), console=console)


def test_columns_by_other_names(recipe: Any, console: Console, tmp_path: Path) -> None:
    """data.columns names them; a role that is none is refused with the recipe."""
    source = prompts(tmp_path / "p.jsonl", {"frage": {"text": "1+1"}, "key": "k 1+1"})
    keys = (f"data.train={source}", "data.columns.prompt=frage.text", "data.columns.id=key", "data.task=none")
    chosen = recipe("opd", *COMMON, *keys)
    train(chosen, console=console)
    rows = load_rows(chosen.run_dir / "rows/step_000002.parquet")
    assert all(row.problem.id == f"k {row.problem.messages[0]['content']}" for row in rows)
    with pytest.raises(UserError, match=r"data\.columns"):
        recipe("opd", "data.columns.promt=q")
