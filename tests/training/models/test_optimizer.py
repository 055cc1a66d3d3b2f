"""The rule that moves the weights, in numbers one can do in the head."""

import pytest
import torch
from torch import nn

from opdkit.recipe import TrainSection
from opdkit.training.models.muon import Muon
from opdkit.training.models.optimizer import Optimizer, total_norm


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.hidden = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def optimizer(module: nn.Module | None = None, **keys: object) -> Optimizer:
    section = TrainSection.model_validate({"steps": 10, "lr": 1.0, **keys})
    return Optimizer(module or Tiny(), section, compute_dtype=torch.float32)


def test_learning_rates_by_hand() -> None:
    """Warm-up over 3 steps: a quarter, a half, three quarters. Then constant; linear and cosine fall from 1 towards 0,
    half-way at the middle of what is left."""
    for schedule, middle, last in (("constant", 1.0, 1.0), ("linear", 0.5, 1 / 8), ("cosine", 0.5, 0.0380602)):
        lr = optimizer(schedule=schedule, warmup_steps=2).lr
        assert [round(lr(step), 6) for step in (0, 1, 2)] == [0.333333, 0.666667, 1.0]
        assert lr(6) == pytest.approx(middle) and lr(9) == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(("limit", "moved"), [(1.0, 0.1), (0, 1.0), (100.0, 1.0)])
def test_clipping_by_norm(limit: float, moved: float) -> None:
    """One gradient of norm 10: clipped to 1 it is a tenth; 0 means no clipping. Read off AdamW's first moment, which is
    (1 - 0.9) times what it was given."""
    module = nn.Linear(1, 1, bias=False)
    rule = optimizer(module, max_grad_norm=limit)
    module.weight.grad = torch.full((1, 1), 10.0)
    result = rule.step(0)
    assert result.grad_norm == pytest.approx(10.0) and not result.skipped
    assert float(rule.state()["weight/exp_avg"]) == pytest.approx(0.1 * 10 * moved)


def test_weight_decay_falls_on_matrices_only() -> None:
    """With zero gradients AdamW only decays: matrices shrink by lr * decay, biases and norms stay."""
    module = Tiny()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    rule = optimizer(module, weight_decay=0.1, max_grad_norm=0)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    rule.step(0)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.ndim == 2 else 1.0), msg=name)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    """The embedding is a matrix, but not a hidden one."""
    module = Tiny()
    rule = optimizer(module, optimizer="muon")
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    rule.step(0)
    state = rule.state()
    assert [k for k in state if k.endswith("momentum_buffer")] == ["hidden.weight/momentum_buffer"]
    assert {k.split("/")[0] for k in state if k.endswith("exp_avg")} == {
        "embedding.weight", "hidden.bias", "norm.weight", "norm.bias",
    }  # fmt: skip


def test_muon_alone_where_there_are_only_hidden_matrices() -> None:
    """A LoRA student under Muon has nothing left for AdamW."""
    module = nn.Linear(2, 2, bias=False)
    rule = optimizer(module, optimizer="muon")
    module.weight.grad = torch.ones(2, 2)
    assert not rule.step(0).skipped and list(rule.state()) == ["weight/momentum_buffer"]


def test_muon_is_torch_s_rule() -> None:
    """Matrices of each shape, with decay, over several steps: as far apart as bfloat16 rounds, of moves of 0.1."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in ((6, 6), (12, 5), (5, 12))] for _ in "ab")
    rules = (
        Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn_like(one)
        for rule in rules:
            rule.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - 1).abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_state_round_trip_continues_to_the_same_bits() -> None:
    torch.manual_seed(0)
    module = Tiny()
    rule = optimizer(module, optimizer="muon", lr=1e-2)
    grads = [{n: torch.randn_like(p) for n, p in module.named_parameters()} for _ in range(4)]

    def steps(module: nn.Module, rule: Optimizer, which: range) -> None:
        for i in which:
            for n, p in module.named_parameters():
                p.grad = grads[i][n].clone()
            rule.step(i)

    steps(module, rule, range(2))
    again = Tiny()
    again.load_state_dict(module.state_dict())
    other = optimizer(again, optimizer="muon", lr=1e-2)
    other.load_state({k: v.clone() for k, v in rule.state().items()})
    steps(module, rule, range(2, 4))
    steps(again, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_nothing_to_learn_from_moves_nothing() -> None:
    """No gradient at all is a skipped step: no momentum, no decay."""
    module = Tiny()
    before = [p.detach().clone() for p in module.parameters()]
    assert optimizer(module, weight_decay=0.1).step(0).skipped
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_the_norm_of_many_numbers() -> None:
    """5 million float32 numbers, whole or split anywhere: the norm is float64's to 1e-6 (torch's own: 1e-4 on a CPU).
    Of bfloat16 numbers it is as exact. What is not finite stays so."""
    grad = torch.randn(5_000_003, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = float(grad.double().norm())
    for split in ([len(grad)], [1, 4095, 4097, len(grad) - 8193]):
        assert float(total_norm(grad.split(split))) == pytest.approx(exact, rel=1e-6)
    short = grad[:100_003].bfloat16()
    assert float(total_norm(short.split(40_000))) == pytest.approx(float(short.double().norm()), rel=1e-6)
    assert not total_norm([grad, torch.tensor([torch.inf])]).isfinite()
    assert float(total_norm([])) == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_reserved_state_moves_nothing(kind: str) -> None:
    """What is there from the beginning, so that memory runs out then or never, is what torch makes at its first step:
    zeros."""
    results = []
    for reserved in (False, True):
        torch.manual_seed(0)
        module = Tiny()
        rule = optimizer(module, optimizer=kind, weight_decay=0.1)
        if reserved:
            rule.reserve()
            assert rule.state() and not any(tensor.any() for tensor in rule.state().values())
        for step in range(2):
            for parameter in (module.embedding.weight, module.hidden.weight, module.norm.bias):
                parameter.grad = torch.randn(parameter.shape)
            rule.step(step)
        results.append({**rule.state(), **{name: p.detach().clone() for name, p in module.named_parameters()}})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
