"""What takes less memory and means the same: bfloat16 master weights, moments in 8 bits, states on the host.

None of it was run on a card here: copies between host and card are copies within the host in these tests.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from opdkit.engines import causal, offload
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.recipe import Recipe, TrainSection
from opdkit.training.loop import train
from opdkit.training.models.optimizer import Optimizer, rounded_at_random
from opdkit.training.models.teacher import head_on
from opdkit.training.models.viewers import make_viewers

Make = Callable[..., Recipe]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_rounding_is_right_on_average() -> None:
    """A number becomes one of its two bfloat16 neighbours, the nearer the more often: the mean of 200,000 is within
    five standard errors. What bfloat16 has stays, also infinities and NaN; the same seed rounds the same."""
    between = torch.tensor([1 + 2**-9, -1 - 2**-10, 3.0e-5 * (1 + 2**-11), 7.1, 1e-39])
    drawn = rounded_at_random(between.repeat(200_000, 1), generator(0)).double()
    for number, column in zip(between.double(), drawn.unbind(1), strict=True):
        assert len(column.unique()) == 2
        assert abs(float(column.mean() - number)) <= 5 * float(column.std()) / 200_000**0.5
    exact = torch.tensor([0.0, 1.5, -2.0, float("inf"), -float("inf"), float("nan"), 3.38e38])
    rounded = rounded_at_random(exact, generator(1))
    assert torch.equal(rounded.nan_to_num(7), exact.bfloat16().nan_to_num(7))
    assert torch.equal(
        rounded_at_random(drawn.float() * 1.01, generator(5)), rounded_at_random(drawn.float() * 1.01, generator(5))
    )


def moved(module: nn.Module, rule: Optimizer, steps: range) -> None:
    for step in steps:
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        rule.step(step)


def rule_of(module: nn.Module, **keys: Any) -> Optimizer:
    section = TrainSection.model_validate({"steps": 1000, "lr": 1e-4, "master_dtype": "bfloat16", **keys})
    return Optimizer(module, section, compute_dtype=torch.bfloat16, seed=3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_that_bfloat16_cannot_take_are_taken_on_average(name: str) -> None:
    """AdamW moves a weight of 1 by 1e-4 a step, and bfloat16's neighbour is 40 times as far: rounded to the
    nearest it would never move. The moments are float32; a state that is saved and loaded goes on to the same bits."""
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)).bfloat16()
    with torch.no_grad():
        module[0].weight.fill_(1.0)
    rule = rule_of(module, optimizer=name)
    moved(module, rule, range(100))
    assert module[0].weight.dtype == torch.bfloat16 and module[0].weight.grad is None
    if name == "adamw":
        assert float(module[0].weight.detach().double().mean()) == pytest.approx(1 - 100 * 1e-4, abs=5e-4)
    state = {key: tensor.clone() for key, tensor in rule.state().items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    other = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)).bfloat16()
    other.load_state_dict(module.state_dict())
    again = rule_of(other, optimizer=name)
    again.load_state(state)
    moved(module, rule, range(100, 103))
    moved(other, again, range(100, 103))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_the_updates_of_a_step_are_rounded_by_draws_of_their_own() -> None:
    """The same draws would round every weight up in all of them, or in none."""
    module, moves = nn.Linear(64, 64, bias=False).bfloat16(), []
    module.weight.data.fill_(1.0)
    rule = rule_of(module, lr=2.0**-9, weight_decay=0.0, warmup_steps=0, schedule="constant")
    for _ in range(2):
        before = module.weight.detach().float().flatten()
        module.weight.grad = -torch.ones_like(module.weight)
        rule.step(0)
        moves.append(module.weight.detach().float().flatten() - before)
    assert 0 < float((moves[0] > 0).float().mean()) < 1
    assert abs(float(torch.corrcoef(torch.stack(moves))[0, 1])) < 0.1


def test_moments_in_8_bits() -> None:
    """Where torchao is not installed that is a sentence. Where it is: a block of 256 keeps its largest moment to half a
    code, so a step under one constant gradient is AdamW's; a saved state goes on to the same bits."""
    module = nn.Linear(64, 64)
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(UserError, match=r'"adamw_8bit" needs torchao.*pip install'):
            rule_of(module, optimizer="adamw_8bit", master_dtype="float32")
        pytest.skip("torchao is not installed")
    plain = nn.Linear(64, 64)
    plain.load_state_dict(module.state_dict())
    rules = [
        rule_of(part, optimizer=name, master_dtype="float32", weight_decay=0.1)
        for part, name in ((module, "adamw_8bit"), (plain, "adamw"))
    ]
    rules[0].reserve()
    for part, rule in zip((module, plain), rules, strict=True):
        moved(part, rule, range(3))
    torch.testing.assert_close(module.weight, plain.weight, atol=2e-5, rtol=0)
    state = {key: tensor.clone() for key, tensor in rules[0].state().items()}
    assert state["weight/exp_avg_codes"].dtype == torch.uint8 and "bias/exp_avg" in state
    again = rule_of(plain, optimizer="adamw_8bit", master_dtype="float32", weight_decay=0.1)
    plain.load_state_dict(module.state_dict())
    again.load_state(state)
    moved(module, rules[0], range(3, 5))
    moved(plain, again, range(3, 5))
    assert torch.equal(module.weight, plain.weight) and torch.equal(module.bias, plain.bias)


def test_a_run_in_bfloat16_goes_on_to_the_same_bits(recipe: Make, console: Console) -> None:
    """Masters in bfloat16, the average of an EMA teacher in float32 and on the host: three steps, or two and one."""
    keys = ("model.dtype=bfloat16", "train.master_dtype=bfloat16", "teacher.weights=ema", "teacher.ema_rate=0.1")
    keys = (*keys, "teacher.weights_on=host", "train.save_every=1", "diagnostics.every=0")
    whole = recipe("opsd", *keys, "train.steps=3", "name=whole")
    train(whole, console=console)
    part = recipe("opsd", *keys, "train.steps=3", "name=part")

    def stop(step: int, metrics: Any) -> None:
        if step == 2:
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        train(part, console=console, on_step=stop)
    train(part, console=console, resume=True)
    losses = [
        [json.loads(line)["train/loss"] for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
        for one in (whole, part)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_cannot_be(recipe: Make) -> None:
    for keys, sentence in (
        (("train.master_dtype=bfloat16", "model.dtype=float32"), "digits that the weights do not have"),
        (("train.master_dtype=bfloat16", "model.lora.r=4"), "an adapter is trained, in float32"),
        (("teacher.device=cuda:1",), r'teacher.device = .* is only read with teacher.kind = "model"'),
        (("teacher.weights=live", "teacher.weights_on=host"), "keep weights of their own"),
    ):
        with pytest.raises(UserError, match=sentence):
            recipe("opsd", *keys)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
    ],
)
@pytest.mark.parametrize("where", ["step", "reserve"])
def test_out_of_memory_loses_nothing(
    error: Exception, where: str, recipe: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens: one sentence with a way out, and the same command with --resume goes on."""
    chosen = recipe("opd", "train.steps=2", "train.save_every=1", "diagnostics.every=0")
    own = getattr(Optimizer, where)

    def fails(self: Optimizer, *args: Any) -> Any:
        if where == "reserve" or args == (1,):
            raise error
        return own(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, where, fails)
        with pytest.raises(UserError, match=r"^out of memory while .* --resume") as caught:
            train(chosen, console=console)
    assert len(caught.value.sentences) == 1
    assert train(chosen, console=console, resume=True)["steps"] == 2


def test_only_the_head_is_made_where_only_the_head_is_asked(recipe: Make) -> None:
    """Of an average in float32 a bfloat16 head is one matrix, not all of the model."""
    chosen = recipe("opsd", "model.dtype=bfloat16", "teacher.weights=ema", "teacher.ema_rate=0.1")
    from opdkit.training.models.student import load_student

    student = load_student(chosen)
    optimizer = Optimizer(student.module, chosen.train, compute_dtype=torch.bfloat16)
    teacher = make_viewers(chosen, student, optimizer)["teacher"].teacher
    assert len(student.head_names) == 1
    assert [*teacher._weights(student.head_names)] == student.head_names  # type: ignore[attr-defined]
    assert teacher.head().weight_VH.dtype == torch.bfloat16


def test_states_on_the_host_give_the_same_gradients(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing of both layers, of one, and without. Weights are not copied, and a layer that is run again
    keeps its states where it runs."""
    monkeypatch.setattr(offload, "SMALL", 0)
    found, packed = [], []
    for layers, offloads in ((0, False), (0, True), (1, True), (None, True)):
        model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
        if layers != 0:
            model.checkpoint_activations(layers)
        model.offloads_activations = offloads
        count: list[int] = []

        def counted(module: nn.Module, count: list[int] = count) -> Any:
            made = offload.kept_on_host(module)
            own = {p.data_ptr() for p in module.parameters()}

            def pack(kept: torch.Tensor) -> Any:
                out = made.pack_hook(kept)
                assert isinstance(out, torch.Tensor) == (kept.untyped_storage().data_ptr() in own)
                count.append(isinstance(out, tuple))
                return out

            return torch.autograd.graph.saved_tensors_hooks(pack, made.unpack_hook)

        with monkeypatch.context() as patched:
            patched.setattr(causal, "kept_on_host", counted)
            model.hidden([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]).square().sum().backward()
        found.append({name: p.grad for name, p in model.module.named_parameters()})
        packed.append(sum(count))
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][name], atol=1e-5, rtol=1e-5)
    assert packed[0] == 0 < packed[3] < packed[2] < packed[1]


def test_a_head_goes_where_the_student_is() -> None:
    """`meta` stands in for another card."""
    head = head_on(Head(weight_VH=torch.ones(9, 4), num_tokens=9, absent_ids=torch.tensor([2])), torch.device("meta"))
    assert (
        head.weight_VH.device.type == "meta" and head.absent_ids is not None and head.absent_ids.device.type == "meta"
    )
