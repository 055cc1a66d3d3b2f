"""examples/one_file.py is the library, written flat."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import TrainingRun
from opdkit.training.models.optimizer import StepResult
from opdkit.training.parts import Parts
from opdkit.training.problems.data import training_data
from opdkit.training.step import train_step

FILE = Path(__file__).parent.parent.parent / "examples" / "one_file.py"


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_file", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_file")
    for name, width, seed in (("student", 32, 0), ("teacher", 48, 1)):
        tokenizer = char_tokenizer(arithmetic.ALPHABET)
        make_model(folder / name, tokenizer=tokenizer, hidden_size=width, num_layers=2, seed=seed, max_positions=64)
    return folder


def test_its_gradient_is_the_librarys(one_file: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library samples and takes a step in three micro-batches; the file's gradient on the same rows is the same to
    1e-5 (fp32). Says nothing about speed or memory."""
    recipe = parse_recipe(
        {
            "name": "r",
            "runs_dir": str(folder / "runs"),
            "model": {"path": str(folder / "student"), "dtype": "float32", "device": "cpu"},
            "teacher": {"kind": "model", "path": str(folder / "teacher")},
            "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 8},
            "sampling": {"max_answer_tokens": 16, "group_size": 1},
            "method": {"name": "opd"},
            "train": {"steps": 1, "problems_per_step": 8, "max_tokens_per_micro_batch": 64},
        }
    )
    run = TrainingRun(recipe, Parts(recipe, None), training_data(recipe, None), {}, Console(quiet=True))
    ours: dict[str, torch.Tensor] = {}

    def catch(step: int) -> StepResult:
        ours.update({name: p.grad.clone() for name, p in run.parts.optimizer.weights.items() if p.grad is not None})
        return StepResult(0.0, skipped=False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    examples, metrics = train_step(run.state, run.problems)
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    rows = [(list(e.rollout.prompt_ids), list(e.rollout.answer_ids)) for e in examples]
    value = one_file.loss(student, teacher, rows)
    value.backward()
    assert {m.name: m.value for m in metrics}["train/loss"] == pytest.approx(value.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in student.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_it_runs_and_the_divergence_falls(folder: Path) -> None:
    """The command in its first lines works, and leaves a model that loads."""
    problems = folder / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"problem": f"{n:03d}="}) for n in range(32)))
    out = folder / "trained"
    command = [sys.executable, str(FILE), str(folder / "student"), str(folder / "teacher"), str(problems)]
    options = ["--out", str(out), "--steps", "8", "--batch", "8", "--lr", "1e-2", "--max-answer-tokens", "8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = [float(line.split()[5]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(values) == 8 and values[-1] < 0.7 * values[0], done.stdout
    assert AutoTokenizer.from_pretrained(out).get_vocab()
