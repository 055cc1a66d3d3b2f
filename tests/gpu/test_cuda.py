"""The same numbers on an accelerator. Run by `make test-gpu`; elsewhere every test skips and says why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdkit import losses
from opdkit.engines.scratch import char_tokenizer, make_model
from opdkit.recipe import parse_recipe
from opdkit.tasks import arithmetic
from opdkit.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    for name, width, seed in (("student", 64, 0), ("teacher", 96, 1)):
        tokenizer = char_tokenizer(arithmetic.ALPHABET + "()")
        make_model(folder / name, tokenizer=tokenizer, hidden_size=width, num_layers=2, seed=seed, max_positions=128)
    return folder


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_head_loss_equals_the_cpu(kind: Any) -> None:
    """Loss and both gradients in float32 on the two devices, to 1e-4 relative."""
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        hidden, teacher_hidden = (torch.randn(300, 64, generator=generator).to(device) for _ in range(2))
        weight, teacher_weight = (torch.randn(5000, 64, generator=generator).to(device) / 8 for _ in range(2))
        hidden.requires_grad_(), weight.requires_grad_()
        term = losses.Term(name="d", loss=losses.Divergence(kind), coef_N=torch.full((300,), 1 / 300, device=device))
        out = losses.head_loss(
            hidden,
            losses.Head(weight_VH=weight, num_tokens=4990),
            torch.arange(300, device=device),
            [term],
            losses.ViewTokens(hidden_NH=teacher_hidden, head=losses.Head(weight_VH=teacher_weight, num_tokens=4990)),
        )
        out.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        results.append((out.loss.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu()))
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("overrides", [(), ("model.dtype=bfloat16",), ("model.lora.r=4", "model.dtype=bfloat16")])
@pytest.mark.parametrize("method", ["opd", "opsd", "grpo", "sft"])
def test_a_run_on_the_device(method: str, overrides: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """Two steps of sampling, scoring, learning, saving and evaluating run, and learn from finite gradients."""
    raw: dict[str, Any] = {
        "name": "r",
        "runs_dir": str(tmp_path),
        "model": {"path": str(folder / "student"), "dtype": "float32", "device": "cuda"},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 32},
        "sampling": {"max_answer_tokens": 16, "group_size": 2, "temperature": 1.0},
        "method": {"name": method},
        "train": {"steps": 2, "problems_per_step": 8, "lr": 1e-3},
        "eval": {"data": "arithmetic:merge-3:test", "limit": 8, "samples": 2},
    }
    if method == "opd":
        raw["teacher"] = {"kind": "model", "path": str(folder / "teacher")}
    if method == "opsd":
        raw["context"] = {"kind": "reference_solution", "template": "prefix"}
    summary = train(parse_recipe(raw, overrides), console=Console(quiet=True))
    assert summary["steps"] == 2 and summary["counts"]["skipped_steps"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_passes_and_trees(dtype: torch.dtype, folder: Path) -> None:
    """Flex attention, compiled: ragged siblings packed, and with their prompt read once, have the states and gradients
    of padded passes. In bfloat16 within its rounding."""
    from opdkit.engines.forward.passes import Passes
    from opdkit.engines.model import LanguageModel

    model = LanguageModel.load(folder / "student", dtype=dtype, device="cuda")
    assert model.is_packed, model.notes
    prompt, num = [2 + index % 9 for index in range(60)], model.num_tokens
    asked = ([prompt] * 4 + [[3]], [[(7 * index * row + row) % num for index in range(9 * row)] for row in range(1, 6)])
    found = {}
    for name, packs, least in (("padded", False, None), ("packed", True, None), ("shared", True, 32)):
        model.packs = packs
        model.module.zero_grad()
        states_NH = model.hidden(*asked, passes=Passes(4096, 1, least))
        states_NH.float().square().sum().backward()
        grads = [p.grad.float().flatten() for p in model.module.parameters() if p.grad is not None]
        found[name] = (states_NH.detach().float(), torch.cat(grads))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for name in ("packed", "shared"):
        for ours, padded in zip(found[name], found["padded"], strict=True):
            assert (ours - padded).norm() <= tolerance * padded.norm(), name
