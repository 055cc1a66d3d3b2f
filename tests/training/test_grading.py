"""Grading inside a run: a user's task, its crashes, its numbers; and no method takes an ungraded answer for a zero."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opdkit.contexts.peers import Peers
from opdkit.errors import UserError
from opdkit.metric_lines import of_steps
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train
from opdkit.types import Group, Problem, Rollout

# Grades arithmetic answers by their length, and fails on every answer whose characters add up to a multiple of three.
FRAGILE = """
from opdkit.tasks import Grade

def grade(problem, text, *, fails: bool = True):
    if fails and text and sum(map(ord, text)) % 3 == 0:
        raise IndexError("no such digit [yet]")
    right = len(text) % 2 == 0
    return Grade(score=float(right), verdict="correct" if right else "wrong", parsed=text[-1:])
"""
REWARD_ALONE = ("grpo", "verified_sft", "dpo", "simpo")
WEIGHTS = ("weights.problems.name=paced", "weights.problems.name=reward_softmax")
COMMON = ("sampling.group_size=4", "train.steps=2", "train.warmup_steps=0", "data.limit=10", "eval.before=false")


@pytest.fixture
def fragile(tmp_path: Path) -> Path:
    path = tmp_path / "fragile.py"
    path.write_text(FRAGILE)
    return path


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "keys"),
    [*((name, ()) for name in REWARD_ALONE), ("grpo_opd", ()), *(("opd", (weight,)) for weight in WEIGHTS)],
)
def test_a_crash_is_counted_and_teaches_nothing(
    recipe: Any, fragile: Path, console: Console, method: str, keys: tuple[str, ...]
) -> None:
    """A third of the answers crash the grader. The run goes on; they are counted, told, kept without a reward, and no
    term that reads their rewards counts a token of theirs (paced reads those of the whole problem). Not shown: that the
    others' coefficients are right."""
    more = ("context.kind=none", "method.loss_temperature=1.0") if method != "opd" else ()
    chosen = recipe(method, *COMMON, *keys, *more, f"data.task={fragile}")
    summary = train(chosen, console=console)
    counted = lines(chosen)
    assert sum(line["grading/num_crashes"] for line in counted) == summary["counts"]["grader_crashes"] > 0
    for line in counted:
        assert line["rollout/num_ungraded"] == line["grading/num_error"] == line["grading/num_crashes"]
    told = [warning for warning in summary["warnings"] if "IndexError: no such digit [yet] (fragile.py:6)" in warning]
    assert len(told) == 1 and any("the grader failed on" in warning for warning in summary["warnings"])
    rows = [row for step in (1, 2) for row in load_rows(chosen.run_dir / f"rows/step_{step:06d}.parquet")]
    ungraded = [row for row in rows if row.rollout.reward is None]
    assert len(ungraded) == summary["counts"]["ungraded_answers"] and 0 < len(ungraded) < len(rows)
    for row in ungraded:
        assert row.rollout.feedback is not None and "the grader failed: IndexError" in row.rollout.feedback
        if row.taught is not None and "weights.problems.name=paced" not in keys:
            terms = row.taught.terms
            read = row.taught.coef_ST[terms.index("grpo")] if "grpo" in terms else row.taught.coef_ST
            assert not np.any(read)


def test_the_run_says_who_graded(recipe: Any, fragile: Path, console: Console) -> None:
    """environment.json has every option and the digest of the file; a resumed run refuses another file."""
    chosen = recipe("grpo", *COMMON, f"data.task={{ name = '{fragile}', fails = false }}")
    train(chosen, console=console)
    task = json.loads((chosen.run_dir / "environment.json").read_text())["task"]
    assert task["name"] == str(fragile) and task["fails"] is False and len(task["files"][str(fragile)]) == 64
    assert lines(chosen)[0]["grading/accuracy"] == lines(chosen)[0]["rollout/reward"]
    fragile.write_text(FRAGILE + "\n# changed")
    with pytest.raises(UserError, match=r"task .*fragile.py is not what it was"):
        train(
            recipe("grpo", *COMMON, f"data.task={{ name = '{fragile}', fails = false }}"), console=console, resume=True
        )


def test_a_task_that_cannot_take_an_empty_answer_is_refused_first(
    recipe: Any, tmp_path: Path, console: Console
) -> None:
    """Before the run folder exists."""
    (tmp_path / "last.py").write_text("def grade(problem, text):\n    return float(text.split()[-1])\n")
    chosen = recipe("grpo", *COMMON, f"data.task={tmp_path / 'last.py'}")
    with pytest.raises(UserError, match=r"fails on an empty answer to problem .*IndexError.*\(last.py:2\)"):
        train(chosen, console=console)
    assert not chosen.run_dir.exists()


def test_a_task_that_exits_or_loops_costs_answers_not_the_run(recipe: Any, tmp_path: Path, console: Console) -> None:
    """As os._exit(0) and an endless loop: the run does both its steps, and counts, tells and leaves ungraded what was
    lost. One that does so on every answer ends the run with a sentence, not with status 0."""
    source = """
        import os
        def grade(problem, text):
            if text and sum(map(ord, text)) % 5 == {rest}:
                os._exit(0)
            while text and sum(map(ord, text)) % 40 == 1:
                pass
            return float(len(text) % 2)
        grade.time_limit_s = 1.0
    """
    (tmp_path / "exits.py").write_text(textwrap.dedent(source.format(rest=0)))
    chosen = recipe("grpo", *COMMON, f"data.task={tmp_path / 'exits.py'}")
    summary = train(chosen, console=console)
    lost = sum(line["grading/num_crashes"] for line in lines(chosen))
    assert 0 < lost == summary["counts"]["ungraded_answers"] and len(lines(chosen)) == 2
    assert any("its process ended with status 0, as by os._exit" in warning for warning in summary["warnings"])
    (tmp_path / "always.py").write_text(
        "import os\ndef grade(problem, text):\n    os._exit(0) if text else None\n    return 0"
    )
    with pytest.raises(UserError, match="graded nothing 10 times in a row"):
        train(recipe("grpo", *COMMON, "name=always", f"data.task={tmp_path / 'always.py'}"), console=console)


def test_a_sum_is_trained_on_and_its_first_term_is_evaluated(recipe: Any, console: Console) -> None:
    """Rewards hold the length term, the evaluation does not; every term has a metric, and nothing asks for a gold
    that the first term does not need."""
    length = "{ weight = 0.5, task = { name = 'length', free_characters = 0, max_characters = 1 } }"
    terms = f"{{ right = {{ weight = 1, task = 'arithmetic' }}, short = {length} }}"
    evaluated = ("eval.before=true", "eval.data=arithmetic:merge-3:test", "eval.limit=5", "eval.samples=2")
    chosen = recipe("grpo", *COMMON, *evaluated, f"data.task={{ name = 'weighted', terms = {terms} }}")
    summary = train(chosen, console=console)
    for line in of_steps(lines(chosen)):
        right, short = line["grading/terms/right"], line["grading/terms/short"]
        assert line["rollout/reward"] == pytest.approx(right + 0.5 * short) and short < 0
        assert line["grading/accuracy"] == right
    assert summary["eval"]["student_before"]["arithmetic:merge-3:test"]["avg_at_n"]["value"] >= 0


def test_what_the_grader_said_of_itself_is_not_shown_to_the_teacher() -> None:
    """Feedback of an ungraded answer names an exception, not a fault of the answer."""
    problem = Problem(id="p", task="t", messages=({"role": "user", "content": "?"},))

    class Reader:
        def answer_text(self, ids: Any) -> str:
            return "text"

        def cut(self, text: str, budget: int) -> tuple[str, int]:
            return text, 0

    def rollout(sample_id: int, reward: float | None) -> Rollout:
        return Rollout(
            problem_id="p",
            sample_id=sample_id,
            policy_version=0,
            prompt_ids=(1,),
            answer_ids=(2,),
            answer_logprobs=None,
            answer_mask=np.ones(1, dtype=np.bool_),
            finish="stop",
            reward=reward,
            feedback="the grader failed" if reward is None else "wrong",
        )

    group = Group(problem=problem, rollouts=(rollout(0, None), rollout(1, 0.0)))
    readings = Peers(slots=("success",)).read_groups([group], Reader(), ("test",))  # type: ignore[arg-type]
    assert readings[0] is None and readings[1] is not None
