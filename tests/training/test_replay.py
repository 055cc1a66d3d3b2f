"""What teachers said is kept and read again: the gradients of a replay are those of the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.recipe.replay import replay_recipe
from opdkit.recipe.rules.whole import warnings
from opdkit.training.loop import train

Make = Callable[..., Recipe]
SMALL = ("train.steps=2", "train.problems_per_step=2", "diagnostics.every=1", "train.lr=1e-2", "train.save_every=0")


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of every update, flat, before the optimizer changes them."""
    seen: list[torch.Tensor] = []
    from opdkit.training.models.optimizer import Optimizer

    apply = Optimizer.step

    def step(self: Optimizer, number: int) -> Any:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights.values()]
        seen.append(torch.cat([g.flatten().double() for g in grads]))
        return apply(self, number)

    monkeypatch.setattr(Optimizer, "step", step)
    return seen


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("method", "overrides", "tolerance"),
    [
        ("opd", (), 0.0),
        ("opd", ("method.support=sampled",), 1e-6),
        ("opd", ("method.support=teacher_topk", "method.k=4", "weights.tokens.name=soft_or"), 1e-6),
        ("opsd", ("teacher.weights=ema", "teacher.ema_rate=0.5"), 0.0),
        ("opsd", ("teacher.weights=trust_region", "teacher.student_share=0.3"), 1e-6),
    ],
)
def test_a_replay_repeats_the_run(
    method: str,
    overrides: tuple[str, ...],
    tolerance: float,
    recipe: Make,
    console: Console,
    gradients: list[torch.Tensor],
) -> None:
    """Also the second step, whose teacher has moved: same loss, so the same student. Not that rewards are graded."""
    original = recipe(method, *overrides, *SMALL, "spool.max_gib=1")
    train(original, console=console)
    ran = gradients[:]
    gradients.clear()
    again = replay_recipe(original.run_dir)
    assert {view.teacher.kind for view in again.all_views.values()} == {"saved"}
    train(again, console=console)
    assert len(ran) == len(gradients) == 2
    for new, old in zip(gradients, ran, strict=True):
        assert distance(new, old) <= tolerance


def test_another_loss_is_that_of_a_live_teacher(recipe: Make, console: Console, gradients: list[torch.Tensor]) -> None:
    """A run of the sampled form, replayed as jsd at another temperature: the first step is as if it had been that."""
    other = ("method.divergence=jsd", "method.teacher_share=0.5", "method.support=full", "method.loss_temperature=0.7")
    sampled = recipe("opd", "method.support=sampled", *SMALL, "spool.max_gib=1")
    train(sampled, console=console)
    gradients.clear()
    train(replay_recipe(sampled.run_dir, other), console=console)
    replayed = gradients[0]
    gradients.clear()
    train(recipe("opd", *other, *SMALL, "name=live"), console=console)
    assert distance(replayed, gradients[0]) < 1e-6


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.02), ("float8", 0.2)])
def test_rounded_states_cost_little(
    dtype: str, most: float, recipe: Make, console: Console, gradients: list[torch.Tensor]
) -> None:
    """Relative error of a gradient of a random model, and the file is a half or a quarter."""
    runs = [
        recipe("opd", *SMALL, f"name={name}", "spool.max_gib=1", *more)
        for name, more in (("whole", ()), ("rounded", (f"spool.dtype={dtype}",)))
    ]
    sizes = []
    for one in runs:
        train(one, console=console)
        sizes.append((one.run_dir / "spool/step_000001.safetensors").stat().st_size)
    gradients.clear()
    train(replay_recipe(runs[0].run_dir), console=console)
    whole = gradients[0]
    gradients.clear()
    train(replay_recipe(runs[1].run_dir), console=console)
    assert 0 < distance(gradients[0], whole) < most
    assert sizes[1] < sizes[0] * (0.65 if dtype == "bfloat16" else 0.5)


def test_a_full_spool_ends_and_says_so(recipe: Make, console: Console) -> None:
    """The first steps are kept, without a gap; a replay of them is shorter."""
    full = recipe("opd", "train.steps=3", "spool.max_gib=1", "diagnostics.every=0")
    train(full, console=console)
    size = sum(path.stat().st_size for path in (full.run_dir / "spool").glob("*.safetensors"))
    short = recipe("opd", "train.steps=3", f"spool.max_gib={size * 0.8 / 2**30}", "name=short", "diagnostics.every=0")
    summary = train(short, console=console)
    assert any("spool" in sentence and "step" in sentence for sentence in summary["warnings"])
    assert replay_recipe(short.run_dir).train.steps == 2


def test_refusals_name_the_way_out(recipe: Make, console: Console, tmp_path: Path) -> None:
    """Each before a model is loaded."""
    plain = recipe("opd", "train.steps=1", "name=plain")
    train(plain, console=console)
    with pytest.raises(UserError, match=r"has kept nothing.*\[spool\]"):
        replay_recipe(plain.run_dir)
    kept = recipe("opd", "train.steps=1", "name=kept", "spool.max_gib=1")
    train(kept, console=console)
    for setting, said in {
        "train.steps=5": "kept its teachers for 1 steps",
        "seed=4": "was made with 3",
        "train.problems_per_step=4": "train.problems_per_step = 4",
        "sampling.temperature=0.5": "sampling.temperature = 0.5",
        "sampling.group_size=7": "sampling.group_size = 7",
        "data.max_prompt_tokens=9": "data.max_prompt_tokens = 9",
        "method.target={ other = 1.0 }": "other",
    }.items():
        with pytest.raises(UserError, match=said):
            replay_recipe(kept.run_dir, [setting])
    replay = replay_recipe(kept.run_dir, ["train.steps=1"], "two")
    assert replay.name == "two" and not [said for said in warnings(replay) if "biased" in said]
    (kept.run_dir / "spool/step_000001.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match="step_000001"):
        train(replay, console=console)


def test_a_replay_leaves_its_run_alone_and_samples_nothing(recipe: Make, console: Console) -> None:
    """Nothing waits for a sampler, the run is never written over, and a step that was killed in the middle is none."""
    kept = recipe("opd", "train.steps=2", "sampling.lag=1", "name=kept", "spool.max_gib=1", "diagnostics.every=0")
    train(kept, console=console)
    again = replay_recipe(kept.run_dir)
    assert (again.sampling.lag, again.sampling.engine, again.train.steps) == (0, "hf", 2)
    with pytest.raises(UserError, match="another name"):
        replay_recipe(kept.run_dir, name=kept.name)
    (kept.run_dir / "rows/step_000002.parquet").unlink()  # its spool is written before the student learns
    assert replay_recipe(kept.run_dir).train.steps == 1
