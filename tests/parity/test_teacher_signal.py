"""The teacher-signal metrics give the published numbers, and null where the careful reading has null."""

from typing import Any

import numpy as np
import pytest
from vectors import read

from opdkit.measure.ranking import METRICS, problem_metrics
from opdkit.measure.signal import ScoredAnswer, difficulty, signal_metrics

CASES = {case["id"]: case for case in read("metrics")["cases"] if ".teacher_signal" in case["id"]}
SINGLE = [name for name in CASES if not name.endswith("_mean")]
CLOSE = {"abs": 1e-12, "rel": 1e-12}


def test_no_case_is_missed() -> None:
    """Seven single problems and their mean, each with all eight metrics."""
    assert len(SINGLE) == 7 and len(CASES) == 8
    assert all(set(case["outputs"]["careful"]) == set(METRICS) for case in CASES.values())


@pytest.mark.parametrize("reading", ["careful", "published"])
@pytest.mark.parametrize("name", SINGLE)
def test_one_problem(name: str, reading: Any) -> None:
    """Both definitions, all metrics, ties and constants included. Padding beside the answers changes nothing."""
    case = CASES[name]
    given = [case["inputs"][key] for key in ("teacher_scores", "rewards", "success")]
    expected = case["outputs"]["as_published" if reading == "published" else "careful"]
    padded = [[[*values, 99.0, -99.0]] for values in given]
    known = [[True] * len(given[0]) + [False, False]]
    for found in (
        problem_metrics(*([values] for values in given), definitions=reading),
        problem_metrics(*padded, known, definitions=reading),
    ):
        values = [None if np.isnan(value) else value for value in found[0]]
        for metric, value in zip(METRICS, values, strict=True):
            wanted = expected[metric]
            assert value == (wanted if wanted is None else pytest.approx(wanted, **CLOSE)), metric
    undefined = {metric for metric in METRICS if case["outputs"]["careful"][metric] is None}
    assert undefined == set(case["outputs"]["undefined"])


@pytest.mark.parametrize("reading", ["careful", "published"])
def test_mean_over_problems(reading: Any) -> None:
    """The mean, and over how many problems: undefined ones leave the careful mean and are zeros in the published."""
    outputs = CASES["pub.metrics.teacher_signal_mean"]["outputs"]
    prompts = CASES["pub.metrics.teacher_signal_mean"]["inputs"]["prompts"]
    rows = [
        ScoredAnswer(
            condition="base",
            problem_id=f"p{number}",
            sample_id=sample,
            score=score,
            reward=reward,
            success=bool(success),
            bucket=difficulty(sum(prompt["success"]), len(prompt["success"]), reading),
            effective=True,
            num_context_tokens=1,
            num_truncated_tokens=0,
            copy=None,
        )
        for number, prompt in enumerate(prompts)
        for sample, (score, reward, success) in enumerate(
            zip(prompt["teacher_scores"], prompt["rewards"], prompt["success"], strict=True)
        )
    ]
    found = signal_metrics(rows, definitions=reading)["all_samples"]["conditions"]["base"]["metrics"]
    expected = outputs["as_published" if reading == "published" else "careful"]
    for metric in METRICS:
        assert found[metric]["value"] == pytest.approx(expected[metric], **CLOSE), metric
        counted = outputs["prompts_counted_careful"][metric] if reading == "careful" else len(prompts)
        assert (found[metric]["problems"], found[metric]["undefined"]) == (counted, len(prompts) - counted)
