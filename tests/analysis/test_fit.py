"""`opdkit fit` from recipe to advice, on models with random weights: what it asks, keeps, refuses and says.

The rules have their own tests (tests/measure/test_fit_rules.py). Does not show that the advice is right:
docs/guides/fit.md has the cases that were tried with trained models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.analysis import fit_answers
from opdkit.analysis.fit import FitOptions, fit
from opdkit.engines.hf import HFEngine
from opdkit.errors import Interrupted, UserError
from opdkit.recipe import Recipe

Make = Callable[..., Recipe]
SAMPLES = 2


@pytest.fixture
def run(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(fit_answers, "PROBLEMS_PER_PART", 2)

    def measure(recipe: Recipe, **options: Any) -> dict[str, Any]:
        out = options.pop("out", tmp_path / "fit")
        fit(recipe, FitOptions(problems=5, samples=SAMPLES, out=out, **options), console=console)
        return dict(json.loads((out / "fit.json").read_text()))

    return measure


def test_everything_is_measured(recipe: Make, run: Callable[..., dict[str, Any]]) -> None:
    """Another model: all facts are there, and shares are shares."""
    found = run(recipe("opd"))
    facts = found["facts"]
    assert found["verdict"] in ("go", "cold_start", "align", "no_gain", "unclear")
    assert facts["overlap"]["num_tokens"] > 0 and 0 <= facts["overlap"]["ratio"] <= 1
    assert len(facts["pass_rates"]) == 5 and facts["gain"]["problems"] == 5
    assert facts["continuations"][0]["prefix_tokens"] == 0
    assert facts["pattern"]["same_prompts"] and facts["pattern"]["student_opening"] == "<a>"
    assert {finding["topic"] for finding in found["findings"]} >= {"overlap", "teacher", "pattern", "direction", "k"}
    assert all({"value", "source"} == entry.keys() for entry in found["thresholds"].values())
    assert found["by_bucket"][0]["from"] == 0


def test_the_student_as_its_own_teacher_has_nothing_to_teach(
    recipe: Make, run: Callable[..., dict[str, Any]], models: dict[str, Path]
) -> None:
    found = run(recipe("opd", f"teacher.path={models['student']}"))
    assert found["verdict"] == "no_gain" and found["facts"]["overlap"]["ratio"] == 1
    assert found["facts"]["overlap"]["reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_another_chat_template_is_shown(
    recipe: Make, run: Callable[..., dict[str, Any]], models: dict[str, Path], tmp_path: Path
) -> None:
    """The same weights behind another opening: found, quoted, and the prompts are no longer the same."""
    other = tmp_path / "other"
    shutil.copytree(models["student"], other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ '<a>' }}", "{{ '<s>;<a>' }}"))
    found = run(recipe("opd", f"teacher.path={other}"))
    assert found["facts"]["pattern"]["teacher_opening"] == "<s>;<a>" and not found["facts"]["pattern"]["same_prompts"]
    assert found["facts"]["overlap"]["reverse_kl"] > 0.001  # the teacher really reads another prompt


def test_a_second_call_samples_nothing(
    recipe: Make, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(recipe("opd"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr(HFEngine, "sample", refuse)
    assert run(recipe("opd")) == first


def test_a_stopped_call_goes_on_to_the_same_numbers(
    recipe: Make, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped after the first part of the student's answers, then after the first of the teacher's."""
    whole = run(recipe("opd"), out=tmp_path / "whole")
    sample = HFEngine.sample
    calls: list[int] = []

    def stop_after(num: int) -> None:
        def counted(self: HFEngine, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > num:
                raise Interrupted
            return sample(self, *args, **kwargs)

        calls.clear()
        monkeypatch.setattr(HFEngine, "sample", counted)

    for num in (1, 3):
        stop_after(num)
        with pytest.raises(Interrupted):
            run(recipe("opd"))
    monkeypatch.setattr(HFEngine, "sample", sample)
    found = run(recipe("opd"))
    assert found["facts"] == whole["facts"]


def test_privileged_context_and_a_teacher_that_cannot_answer(recipe: Make, run: Callable[..., dict[str, Any]]) -> None:
    """OPSD's teacher reads the solution, and answers with it; a mixture of logits scores but cannot answer."""
    opsd = run(recipe("opsd"))
    assert opsd["facts"]["context"] == "reference_solution" and opsd["facts"]["gain"] is not None


def test_a_trust_region_teacher_is_not_asked_to_answer(recipe: Make, run: Callable[..., dict[str, Any]]) -> None:
    found = run(recipe("opsd", "teacher.weights=trust_region", "teacher.student_share=0.1"))
    assert found["facts"]["gain"] is None and found["facts"]["continuations"] == []
    assert found["facts"]["pattern"]["teacher_think"] is None


def test_answers_to_another_question_are_refused(recipe: Make, run: Callable[..., dict[str, Any]]) -> None:
    run(recipe("opd"), teacher_answers=0)
    with pytest.raises(UserError, match=r"holds answers to another question: sampling = .*choose another --out"):
        run(recipe("opd", "sampling.temperature=0.5"), teacher_answers=0)


def test_another_draw_of_problems_is_refused(recipe: Make, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Where longer prompts are let in, other problems are drawn: the answers that are kept are not theirs."""
    data = tmp_path / "problems.jsonl"
    questions = [f"{n:03d}=" for n in range(8)] + [f"{n:05d}=" for n in range(8)]
    lines = [json.dumps({"prompt": [{"role": "user", "content": q}], "answer": "0"}) for q in questions]
    data.write_text("\n".join(lines))
    settings = (f"data.train={data}", "data.task=math", "data.instruction=none")
    run(recipe("opd", *settings, "data.max_prompt_tokens=6"), teacher_answers=0)
    with pytest.raises(UserError, match=r"another question: max_prompt_tokens = 6 \(now 60\)"):
        run(recipe("opd", *settings, "data.max_prompt_tokens=60"), teacher_answers=0)


def test_a_folder_without_answers_has_nothing_to_mix_up(
    recipe: Make, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first part and called again with other sampling: there is nothing to refuse."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(HFEngine, "sample", stop)
        run(recipe("opd"))
    assert run(recipe("opd", "sampling.temperature=0.5"), teacher_answers=0)["verdict"]


def test_long_prompts_are_a_share_of_all_problems(
    recipe: Make, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Two of ten problems have prompts of 7 tokens where 6 are allowed: a fifth, however few problems are asked."""
    data = tmp_path / "problems.jsonl"
    questions = [f"{n:03d}=" for n in range(8)] + ["00010=", "00011="]
    lines = [json.dumps({"prompt": [{"role": "user", "content": q}], "answer": "0"}) for q in questions]
    data.write_text("\n".join(lines))
    found = run(
        recipe("opd", f"data.train={data}", "data.max_prompt_tokens=6", "data.task=math", "data.instruction=none"),
        teacher_answers=0,
    )
    assert found["facts"]["share_long_prompts"] == 0.2 and found["facts"]["max_prompt_tokens"] == 6
    assert len(found["facts"]["pass_rates"]) == 5


def test_what_cannot_be_measured_is_refused(recipe: Make, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'teacher\.kind = "none"; name one'):
        run(recipe("grpo"))
    with pytest.raises(UserError, match=r"measures answers of one turn, and this recipe has \[episode\]"):
        run(recipe("opd", "episode.environment='calculator'", "episode.calls='hermes'"))
    with pytest.raises(UserError, match=r"-k 99: the models know \d+ tokens"):
        run(recipe("opd"), k=99)
    with pytest.raises(UserError, match=r"--threshold overlap_lo is not a threshold"):
        run(recipe("opd"), thresholds={"overlap_lo": 0.3})
    with pytest.raises(UserError, match=r"every prompt is longer than 2 tokens"):
        run(recipe("opd", "data.max_prompt_tokens=2"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is not a folder of opdkit fit; choose another --out"):
        run(recipe("opd"), out=tmp_path / "mine")
