"""Who scores: the weights a self-teacher reads, and which other models are refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from opdkit.engines.model import LanguageModel
from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.errors import UserError
from opdkit.recipe import Recipe, TrainSection
from opdkit.training.models.gathered import GatheredOptimizer
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.student import load_student
from opdkit.training.models.teacher import EMATeacher, InitialTeacher
from opdkit.training.models.viewers import make_viewers
from opdkit.training.saved.checkpoint import Saved
from opdkit.types import Asked

Make = Callable[..., Recipe]
CONTEXT, ANSWER = [[5, 9, 10]], [[11, 12, 13]]


def parts(recipe: Recipe) -> tuple[LanguageModel, Optimizer, Any]:
    student = load_student(recipe)
    optimizer = Optimizer(student.module, recipe.train, compute_dtype=getattr(torch, recipe.model.dtype))
    return student, optimizer, make_viewers(recipe, student, optimizer)["teacher"].teacher


def logprobs(teacher: Any) -> torch.Tensor:
    (signal,) = teacher.score(CONTEXT, ANSWER, Asked("sampled"), temperature=1.0)
    return torch.from_numpy(signal.sampled_logprob_T)


def move(optimizer: Optimizer) -> None:
    with torch.no_grad():
        for p in optimizer.weights.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))


def test_initial_stays_and_live_follows(recipe: Make) -> None:
    """After the student has moved, the initial teacher says what it said, the live one what the student says now."""
    for weights, follows in (("initial", False), ("live", True)):
        _, optimizer, teacher = parts(recipe("opsd", f"teacher.weights={weights}"))
        before = logprobs(teacher)
        move(optimizer)
        assert torch.equal(before, logprobs(teacher)) != follows


def test_ema_moves_towards_the_student_by_the_rate(recipe: Make) -> None:
    """By hand: average 1, student 3, rate 0.25 -> 1.5, then 1.875. Towards the student, never the other way round."""
    _, optimizer, teacher = parts(recipe("opsd", "teacher.weights=ema", "teacher.ema_rate=0.25"))
    name = next(iter(optimizer.weights))
    teacher.average[name].fill_(1.0)
    with torch.no_grad():
        optimizer.weights[name].fill_(3.0)
    for expected in (1.5, 1.875):
        teacher.after_step()
        assert torch.equal(teacher.average[name], torch.full_like(teacher.average[name], expected))


def test_ema_is_float32_when_the_computation_is_bfloat16(recipe: Make) -> None:
    """rate 0.001 of a step of 0.01 is far below what bfloat16 can add to 1: the average must still move."""
    _, optimizer, teacher = parts(
        recipe("opsd", "teacher.weights=ema", "teacher.ema_rate=0.001", "model.dtype=bfloat16")
    )
    assert isinstance(teacher, EMATeacher)
    name = next(iter(optimizer.weights))
    teacher.average[name].fill_(1.0)
    with torch.no_grad():
        optimizer.weights[name].fill_(1.01)
    teacher.after_step()
    assert (teacher.average[name] > 1).all() and teacher.average[name].dtype == torch.float32
    assert next(iter(teacher.engine().weights.values())).dtype == torch.bfloat16


@pytest.mark.parametrize("weights", ["initial", "ema"])
def test_teacher_state_survives_a_checkpoint(weights: str, recipe: Make) -> None:
    rate = ("teacher.ema_rate=0.5",) if weights == "ema" else ()
    chosen = recipe("opsd", f"teacher.weights={weights}", *rate)
    _, optimizer, teacher = parts(chosen)
    move(optimizer)
    teacher.after_step()
    _, _, fresh = parts(chosen)
    assert weights == "initial" or not torch.equal(logprobs(teacher), logprobs(fresh))
    fresh.load_state(teacher.state())
    assert torch.equal(logprobs(teacher), logprobs(fresh))


def test_adapter_off_is_the_base_model(recipe: Make, models: dict[str, Path]) -> None:
    """With a moved adapter, the teacher still equals the checkpoint the adapter sits on."""
    _, optimizer, teacher = parts(recipe("opsd", "model.lora.r=4", "teacher.weights=adapter_off"))
    move(optimizer)
    base = LanguageModel.load(models["student"], dtype=torch.float32, device="cpu")
    _, _, plain = parts(recipe("opsd"))
    assert base.num_tokens == plain.model.num_tokens
    torch.testing.assert_close(logprobs(teacher), logprobs(plain), rtol=0, atol=1e-6)


def test_a_teacher_with_another_tokenizer_is_refused(recipe: Make, tmp_path: Path, console: Console) -> None:
    """The sentence says which tokens differ and what to do."""
    make_model(
        tmp_path / "other", tokenizer=char_tokenizer("9876543210+=;,:()"), hidden_size=32, num_layers=1, seed=0,
        max_positions=96,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"teacher\.path.*10 tokens have other ids.*same family"):
        parts(recipe("opd", f"teacher.path={tmp_path / 'other'}"))


@pytest.mark.parametrize("kind", [InitialTeacher, EMATeacher])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_rank_without_a_part_of_a_weight_goes_on(kind: Any, name: str, tmp_path: Path) -> None:
    """Of two ranks, one has all of a matrix that Muon takes, or of a weight with one row; both read their states from
    the checkpoint again."""
    teachers = []
    for rank in range(2):
        module: Any = nn.Sequential(nn.Linear(4, 4 if name == "muon" else 1, bias=False))
        module.device = torch.device("cpu")
        section = TrainSection.model_validate({"steps": 1, "optimizer": name})
        group: Any = SimpleNamespace(rank=rank, size=2, is_first=rank == 0)
        rule = GatheredOptimizer(module, section, compute_dtype=torch.float32, group=group)
        teacher = kind(module, None, rule, None, **({"rate": 0.1} if kind is EMATeacher else {}))
        save_file(teacher.state(), tmp_path / f"teacher-{rank + 1:05d}-of-00002.safetensors")
        teachers.append((rule, teacher))
    saved = Saved(path=tmp_path, step=1, counters={}, pass_rates={}, files=("teacher",), damaged={})
    for rule, teacher in teachers:
        before = {key: tensor.clone() for key, tensor in teacher.state().items()}
        for tensor in teacher.state().values():
            tensor.zero_()
        teacher.load_state(saved.tensors("teacher", rule.rows_of))
        assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state().items())
    with pytest.raises(UserError, match=r"0\.weight is missing"):
        teachers[0][1].load_state({})
