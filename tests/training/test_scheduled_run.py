"""Runs whose recipe changes while they train: what a step is taken with, what is said of it, what a resume knows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.errors import UserError
from opdkit.recipe import Recipe, load_recipe
from opdkit.training.loop import train

Make = Callable[..., Recipe]
TWO_STAGES = (
    "schedule.divergence=forward_then_reverse",
    "schedule.answers=teacher_then_student",
    "schedule.weights.tokens=[[0.5, {name = 'soft_or', keep = 0.5}]]",
    "sampling.temperature=1.2",
    "schedule.sampling.temperature={points = [[0.0, 1.2], [1.0, 0.8]], shape = 'linear'}",
)


def bits(run_dir: Path, step: int) -> dict[str, Any]:
    """The last checkpoint's tensors and counters, and the metrics without clocks."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    tensors = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    return {"tensors": tensors, "metrics": [without_clocks(line) for line in lines(run_dir)]}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(("time", "memory"))}


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th step dies in its backward pass."""
    from opdkit.training import step

    original, calls = step.backward, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    monkeypatch.setattr(step, "backward", dying)


def test_a_run_crosses_its_stages_and_says_so(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Forward KL on the teacher's answers, then reverse KL on half of the student's own tokens: losses, weights, stage
    numbers and temperatures of every step, and the console, say so. The first half equals a run that knows of no
    second one, to the last bit of its metrics."""
    chosen = recipe("opd", *TWO_STAGES)
    train(chosen, console=Console(width=200))
    said = capsys.readouterr().out
    assert 'stage 1 of 2, from step 1 on: method.divergence = "forward_kl", method.answers = "teacher"' in said
    assert "stage 2 of 2, from step 4 on:" in said and said.count("stage ") == 2
    seen = lines(chosen.run_dir)
    assert [line["schedule/stage"] for line in seen] == [1, 1, 1, 2, 2, 2]
    assert [round(line["schedule/sampling.temperature"], 4) for line in seen] == [
        1.2,
        1.1333,
        1.0667,
        1.0,
        0.9333,
        0.8667,
    ]
    for line, early in zip(seen, [True] * 3 + [False] * 3, strict=True):
        assert ("loss/forward_kl" in line) == early and ("loss/reverse_kl" in line) != early
        assert ("weights/share_of_tokens_counted" in line) != early
    fixed = ("method.divergence=forward_kl", "method.answers=teacher", *TWO_STAGES[-2:], "name=first")
    first = recipe("opd", *fixed)
    train(first, console=Console(quiet=True))
    for a, b in zip(lines(first.run_dir)[:3], seen[:3], strict=True):
        assert without_clocks(a) | {"schedule/stage": 1} == without_clocks(b) | {"schedule/stage": 1}
    assert load_recipe(chosen.run_dir / "recipe.toml") == chosen.on_device("cpu"), "recipe.toml is the whole schedule"


def test_a_resume_across_a_stage_gives_the_same_bits(
    recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in the first step of the second stage, with the last checkpoint in the first, and then one in the last
    step. The fixed pass rates that the second stage keeps come back too."""
    keys = (*TWO_STAGES, "schedule.weights.problems=[[0.5, {name = 'paced', floor = 0.1}]]")
    whole, cut = recipe("opd", *keys, "name=whole"), recipe("opd", *keys, "name=cut")
    train(whole, console=console)
    for call, resume in ((4, False), (4, True)):  # steps 4 and 6
        with monkeypatch.context() as patch:
            crash_at(call, patch)
            with pytest.raises(RuntimeError, match="power cut"):
                train(cut, console=console, resume=resume)
    train(cut, console=console, resume=True)
    assert bits(cut.run_dir, 6) == bits(whole.run_dir, 6)


def test_another_schedule_is_not_resumed(recipe: Make, console: Console) -> None:
    train(recipe("opd", "schedule.divergence=forward_then_reverse", "train.steps=2"), console=console)
    later = "schedule.divergence={name = 'forward_then_reverse', at = 0.3}"
    with pytest.raises(UserError, match=r"schedule\.method\.divergence was"):
        train(recipe("opd", later, "train.steps=2"), console=console, resume=True)


PACED = (
    "weights.problems={name = 'paced', pass_rate = 'measured', samples = 4, floor = 0.01}",
    "sampling.group_size=1",
)


def test_pass_rates_are_measured_before_the_first_step(
    recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PACED as its paper has it: every problem's rate is the share of right ones among 4 answers of the untrained
    student, whoever's answers are trained on; interrupted and resumed, the same bits. These students solve next to
    nothing, so one answer in three is called right here, by a digest of its text."""
    from opdkit.tasks import arithmetic
    from opdkit.tasks.base import Grade
    from opdkit.training.saved import checkpoint
    from opdkit.types import seed_from

    def grade(self: Any, items: Any) -> list[Grade]:
        right = [float(seed_from(text) % 3 == 0) for _, text in items]
        return [Grade(score=score, verdict="correct" if score else "wrong", parsed="x") for score in right]

    monkeypatch.setattr(arithmetic.ArithmeticTask, "grade", grade)
    whole = recipe("opd", *TWO_STAGES[:2], *PACED, "name=whole")
    train(whole, console=console)
    answers = [json.loads(line) for line in (whole.run_dir / "eval" / "pass_rates.jsonl").read_text().splitlines()[1:]]
    assert len(answers) == 40 * 4
    saved = checkpoint.latest(whole.run_dir / "checkpoints")
    assert saved is not None and len(saved.pass_rates) == 40 and len(set(saved.pass_rates.values())) > 2
    for problem, rate in saved.pass_rates.items():
        assert rate == sum(a["reward"] for a in answers if a["problem_id"] == problem) / 4
    cut = recipe("opd", *TWO_STAGES[:2], *PACED, "name=cut")
    with monkeypatch.context() as patch:
        crash_at(1, patch)  # after measuring, before the first checkpoint
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut, console=console)
    train(cut, console=console, resume=True)
    assert bits(cut.run_dir, 6) == bits(whole.run_dir, 6)


def test_answers_may_come_from_the_data_or_the_teacher(recipe: Make, console: Console) -> None:
    """Forward KL on the data set's solutions and on the teacher's answers: their tokens are what is scored."""
    from opdkit.run.rows import load_rows
    from opdkit.tasks.arithmetic import problems

    for source in ("dataset", "teacher"):
        chosen = recipe("opd", f"method.answers={source}", "method.divergence=forward_kl", f"name={source}")
        train(chosen, console=console)
        rows = load_rows(chosen.run_dir / "rows" / "step_000001.parquet")
        assert len(rows) == (5 if source == "dataset" else 10)
        if source == "dataset":
            solutions = {p.id: p.solution for p in problems("merge-3", "train", 40, 3)}
            assert all(len(row.rollout.answer_ids) == len(solutions[row.problem.id]) + 1 for row in rows)  # type: ignore


def test_a_privileged_teacher_answers_with_what_it_reads_when_it_scores(
    recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A self-teacher that reads the solution: what it samples behind and what it scores behind are the same ids, of
    every problem; the student learns the answers behind the bare question."""
    from opdkit.engines.hf import HFEngine
    from opdkit.run.rows import load_rows

    sampled: list[tuple[int, ...]] = []
    sample = HFEngine.sample

    def heard(self: HFEngine, prompts: Any, *args: Any, **keys: Any) -> Any:
        sampled.extend(map(tuple, prompts))
        return sample(self, prompts, *args, **keys)

    monkeypatch.setattr(HFEngine, "sample", heard)
    keys = (
        "teacher.kind=self",
        "teacher.weights=initial",
        "context.kind=reference_solution",
        "context.template=prefix",
    )
    chosen = recipe("opsd", "method.name=opd", "method.divergence=forward_kl", "method.answers=teacher", *keys,
                    "train.steps=1", "sampling.max_answer_tokens=8")  # fmt: skip
    train(chosen, console=console)
    rows = load_rows(chosen.run_dir / "rows" / "step_000001.parquet")
    assert len(rows) == 10 and all(row.view is not None for row in rows)
    assert sampled == [tuple(row.view.context_ids) for row in rows if row.view is not None]
    assert not {tuple(row.rollout.prompt_ids) for row in rows} & set(sampled)
