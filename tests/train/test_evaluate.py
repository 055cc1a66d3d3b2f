"""`opdkit evaluate`: what is written is not sampled again, and never mixed with answers to another question."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdkit.engines.hf import HFEngine
from opdkit.errors import UserError
from opdkit.train import evaluate as module
from opdkit.train.evaluate import EvaluateOptions, evaluate_model


@pytest.fixture
def options(models: dict[str, Path]) -> EvaluateOptions:
    return EvaluateOptions(
        model=str(models["student"]),
        data=("arithmetic:merge-2:test",),
        task="arithmetic",
        num_samples=4,
        limit=10,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_answer_tokens=8,
        seed=0,
        dtype="float32",
        device="cpu",
        chat_template=None,
        template_kwargs={},
        instruction="auto",
        trust_remote_code=False,
    )


def test_resume_after_a_crash_gives_the_same_numbers(
    options: EvaluateOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the middle of a line: the whole answers are kept, the rest is sampled, the result is that of one run."""
    whole = evaluate_model(options, out=tmp_path / "whole", console=console)
    cut = tmp_path / "cut"
    evaluate_model(options, out=cut, console=console)
    answers = next(cut.glob("*.jsonl"))
    text = answers.read_text()
    answers.write_text(text[: len(text) * 2 // 3])
    asked = []
    sample = HFEngine.sample
    monkeypatch.setattr(
        HFEngine, "sample", lambda self, prompts, *a, **k: asked.extend(prompts) or sample(self, prompts, *a, **k)
    )
    assert evaluate_model(options, out=cut, console=console) == whole
    assert 0 < len(asked) < 40
    assert sorted(answers.read_text().splitlines()) == sorted(text.splitlines())


def test_more_samples_add_to_what_is_there(
    options: EvaluateOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n = 2 and then n = 4 is n = 4: sample ids have their own seeds, and only the 20 new answers are sampled."""
    evaluate_model(replace(options, num_samples=2), out=tmp_path / "a", console=console)
    asked: list[Any] = []
    sample = HFEngine.sample
    monkeypatch.setattr(
        HFEngine, "sample", lambda self, prompts, *a, **k: asked.extend(prompts) or sample(self, prompts, *a, **k)
    )
    grown = evaluate_model(options, out=tmp_path / "a", console=console)
    assert len(asked) == 20
    assert grown == evaluate_model(options, out=tmp_path / "b", console=console)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["eval"] == grown


def test_batches_do_not_matter(
    options: EvaluateOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_model(options, out=tmp_path / "a", console=console)
    monkeypatch.setattr(module, "ANSWERS_PER_BATCH", 4)
    assert evaluate_model(options, out=tmp_path / "b", console=console) == whole


@pytest.mark.parametrize(("change", "word"), [({"seed": 1}, "seed = 0"), ({"temperature": 0.5}, "temperature = 1.0")])
def test_other_answers_are_refused(
    change: dict[str, float], word: str, options: EvaluateOptions, tmp_path: Path, console: Console
) -> None:
    evaluate_model(options, out=tmp_path, console=console)
    with pytest.raises(UserError, match=f"another question: {word}.*another --out"):
        evaluate_model(replace(options, **change), out=tmp_path, console=console)


def test_a_retrained_model_at_the_same_path_is_told_apart(
    options: EvaluateOptions, tmp_path: Path, console: Console, models: dict[str, Path]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(models["student"], folder)
    options = replace(options, model=str(folder))
    evaluate_model(options, out=tmp_path / "out", console=console)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v + torch.full_like(v, 1e-3) for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="another question: model_files"):
        evaluate_model(options, out=tmp_path / "out", console=console)


def test_another_chat_template_at_the_same_path_is_told_apart(
    options: EvaluateOptions, tmp_path: Path, console: Console, models: dict[str, Path]
) -> None:
    """The answers would be to another prompt."""
    folder = tmp_path / "model"
    shutil.copytree(models["student"], folder)
    evaluate_model(replace(options, model=str(folder)), out=tmp_path / "out", console=console)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="another question: model_files"):
        evaluate_model(replace(options, model=str(folder), num_samples=8), out=tmp_path / "out", console=console)


def test_a_refused_evaluation_leaves_nothing_in_the_way(
    options: EvaluateOptions, tmp_path: Path, console: Console
) -> None:
    """Too many answer tokens for the model: refused; with fewer the same folder is used."""
    with pytest.raises(UserError, match="positions"):
        evaluate_model(replace(options, max_answer_tokens=5000), out=tmp_path, console=console)
    evaluate_model(options, out=tmp_path, console=console)
