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
from opdkit.errors import Interrupted, UserError
from opdkit.evaluation import evaluate as module
from opdkit.evaluation.answering import answering
from opdkit.evaluation.eval_sets import EvalSet
from opdkit.evaluation.evaluate import evaluate_model
from opdkit.evaluation.options import EvaluateOptions
from opdkit.run.answer_sets import read_answers
from opdkit.run.console import Interrupt
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import Store, StoredAnswer


@pytest.fixture
def options(models: dict[str, Path]) -> EvaluateOptions:
    return EvaluateOptions(
        model=str(models["student"]),
        data=("arithmetic:merge-2:test",),
        task="arithmetic",
        num_samples=4,
        limit=10,
        max_answer_tokens=8,
        dtype="float32",
        device="cpu",
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


def test_ctrl_c_between_two_tokens_keeps_what_has_ended(
    options: EvaluateOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heard after the sixth token of a batch of all 40 answers, hours before its end at real sizes."""
    whole = evaluate_model(options, out=tmp_path / "whole", console=console)
    heard: list[int] = []

    def check(self: Interrupt) -> None:
        heard.append(1)
        if len(heard) == 6:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Interrupt, "check", check)
        with pytest.raises(Interrupted):
            evaluate_model(options, out=tmp_path / "a", console=console)
    assert len(heard) == 6
    (kept,) = (tmp_path / "a").glob("arithmetic*test.jsonl")
    assert 1 < len(kept.read_text().splitlines()) < 41
    assert evaluate_model(options, out=tmp_path / "a", console=console) == whole


def test_several_data_sets_in_one_run(options: EvaluateOptions, tmp_path: Path, console: Console) -> None:
    """Each under its own name, with the unweighted mean of their avg@n; nothing is sampled when one of them is broken,
    and each broken one has its sentence."""
    sets = [
        EvalSet(name="two", source="arithmetic:merge-2:test", task="arithmetic"),
        EvalSet(name="add", source="arithmetic:add-1:test", task="arithmetic"),
    ]
    broken = [
        *sets,
        EvalSet(name="gone", source=str(tmp_path / "gone.jsonl"), task="math"),
        EvalSet(name="a/b", source="arithmetic:merge-2:test", task="arithmetic"),
        EvalSet(name="a_b", source="arithmetic:merge-2:test", task="arithmetic"),
    ]
    with pytest.raises(UserError) as refused:
        evaluate_model(options, sets=broken, out=tmp_path / "out", console=console)
    sentences = str(refused.value).splitlines()
    assert len(sentences) == 3
    assert all(word in line for word, line in zip(("gone.jsonl", "a/b", "a_b"), sentences, strict=True))
    assert not list(tmp_path.rglob("*.jsonl")), "nothing was sampled"
    found = evaluate_model(options, sets=sets, missing={"x": "why"}, out=tmp_path / "out", console=console)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(found) == ["two", "add"] and written["missing"] == {"x": "why"}
    values = [one["avg_at_n"]["value"] for one in found.values()]
    assert written["mean_over_sets"]["value"] == pytest.approx(sum(values) / 2)
    assert read_answers(tmp_path / "out").keys() == found.keys()


def test_two_processes_do_not_write_one_result(options: EvaluateOptions, tmp_path: Path, console: Console) -> None:
    """The second is refused while the first works, and not afterwards."""
    lock = Lock(tmp_path / ".lock")
    with pytest.raises(UserError, match="is being written by process"):
        evaluate_model(options, out=tmp_path, console=console)
    lock.release()
    evaluate_model(options, out=tmp_path, console=console)


def test_the_seeds_of_two_evaluations_never_meet(
    options: EvaluateOptions, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(seed, problem, sample) -> engine seed: all different, also for --seed 1 beside --seed 0 with more samples."""
    drawn: list[int] = []
    sample = HFEngine.sample
    monkeypatch.setattr(
        HFEngine, "sample", lambda self, prompts, seeds, *a: drawn.extend(seeds) or sample(self, prompts, seeds, *a)
    )
    for seed in (0, 1):
        evaluate_model(replace(options, seed=seed), out=tmp_path / str(seed), console=console)
    assert len(drawn) == len(set(drawn)) == 80


def test_published_estimators_stand_beside_ours(options: EvaluateOptions, tmp_path: Path, console: Console) -> None:
    evaluate_model(options, out=tmp_path, console=console, with_published=True)
    written = json.loads((tmp_path / "result.json").read_text())
    published = written["published"]["arithmetic:merge-2:test"]
    assert list(published["best_at_k"]) == ["1", "2", "4"]
    assert list(written["eval"]["arithmetic:merge-2:test"]["pass_at_k"]) == ["1", "2", "3", "4"]


def test_thinking_is_closed_as_in_training(options: EvaluateOptions, console: Console, tmp_path: Path) -> None:
    """The prompt that `model.close_thinking` trains on; other answers' identity knows the difference."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    for closed, ending in ((True, "<think></think>\n\n"), (False, "<think>")):
        with answering(replace(options, close_thinking=closed), console, tmp_path) as reading:
            renderer = reading.renderer
        asked = replace(renderer, chat_template=template).prompt_text([{"role": "user", "content": "1"}])
        assert asked == "1" + ending


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed = 0"),
        ({"temperature": 0.5}, "temperature = 1.0"),
        ({"close_thinking": True}, "close_thinking = False"),
    ],
)
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


def _stored(problem_id: str) -> StoredAnswer:
    return StoredAnswer(
        problem_id=problem_id, sample_id=0, reward=1.0, parsed=None, finish="stop", num_tokens=3, text="7"
    )


def test_where_and_how_fast_is_no_part_of_the_question(tmp_path: Path) -> None:
    """Files from before it left the identity of answers go on, too."""
    played = {"task": "arithmetic", "episode": {"environment": "calculator"}}
    old = {"device": "cuda", "url": "http://x", "max_tokens_per_batch": 9, "engine": "hf", "clock": "then"}
    began = Store(tmp_path / "set.jsonl", old | played | {"episode": {"environment": "calculator", "workers": 2}})
    began.append([_stored("p")])
    Store(tmp_path / "set.jsonl", played).append([_stored("q")])
    assert len(Store(tmp_path / "set.jsonl", {**played, "device": "cpu"}).answers) == 2
    with pytest.raises(UserError, match="another question: episode"):
        Store(tmp_path / "set.jsonl", {**played, "episode": {"environment": "game", "workers": 2}})


def test_a_refused_evaluation_leaves_nothing_in_the_way(
    options: EvaluateOptions, tmp_path: Path, console: Console
) -> None:
    """Too many answer tokens for the model: refused; with fewer the same folder is used."""
    with pytest.raises(UserError, match="positions"):
        evaluate_model(replace(options, max_answer_tokens=5000), out=tmp_path / "new", console=console)
    assert not (tmp_path / "new").exists()
    evaluate_model(options, out=tmp_path, console=console)
