"""Overlap while training: for every kind of signal, without moving what is trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdkit.engines.model import LanguageModel
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train
from opdkit.training.metrics.agreement import compare_rows, student_side, teacher_side

Make = Callable[..., Recipe]


def lines(recipe: Recipe, console: Console) -> list[dict[str, Any]]:
    train(recipe, console=console, overwrite=(recipe.run_dir / "recipe.toml").exists())
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("opd", ()),
        ("opd", ("method.support=sampled",)),
        ("topk_opd", ()),
        ("opsd", ()),
        ("grpo_opd", ()),
        ("opsd", ("teacher.weights=trust_region", "teacher.student_share=0.1")),
        ("opsd", ("teacher.weights=adapter_off", "model.lora.r=4")),
        ("opd", ("method.support=sampled", "model.dtype=bfloat16", "model.gradient_checkpointing=true")),
    ],
)
def test_every_signal_is_diagnosed(method: str, overrides: tuple[str, ...], recipe: Make, console: Console) -> None:
    """Hidden states, sampled log-probs, top-k lists, self-teachers, a mixture, adapters: on steps that are due the same
    names; masses and ratios are shares and the divergences are not negative."""
    chosen = recipe(method, *overrides, "diagnostics.every=3", "diagnostics.bucket_tokens=8")
    seen = lines(chosen, console)
    assert [line["step"] for line in seen if "overlap/ratio" in line] == [1, 4, 6]  # after 0, 3 and 5: the last
    first = seen[0]
    for name in ("ratio", "mass_student", "mass_teacher", "top1_agreement"):
        assert 0 <= first[f"overlap/{name}"] <= 1
    assert first["overlap/forward_kl"] > -1e-6 and first["overlap/reverse_kl"] > -1e-6
    assert first["overlap/num_tokens"] == sum(v for n, v in first.items() if n.startswith("overlap/num_tokens@"))
    assert {"overlap/reverse_kl@0-8", "time/diagnostics_s"} <= first.keys()


def test_nothing_moves_and_zero_means_never(recipe: Make, console: Console) -> None:
    """A run with diagnostics at every step has the losses of one without, bit for bit."""
    with_it = lines(recipe("opd", "method.support=sampled", "diagnostics.every=1"), console)
    without = lines(recipe("opd", "method.support=sampled", "diagnostics.every=0"), console)
    assert not any(name.startswith("overlap/") for line in without for name in line)
    assert [line["train/loss"] for line in with_it] == [line["train/loss"] for line in without]
    assert all("overlap/ratio" in line for line in with_it)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("opd", ()),
        ("opd", ("train.updates_per_step=2",)),
        ("opsd", ("teacher.weights=ema", "teacher.ema_rate=0.1")),
        ("opd", ("method.support=sampled",)),
        ("topk_opd", ()),
    ],
)
def test_the_passes_are_those_of_the_loss(
    method: str,
    overrides: tuple[str, ...],
    recipe: Make,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states are made once: no pass of the student or the teacher for diagnostics, whatever the loss asked."""
    counts: list[Counter[str]] = []
    hidden = LanguageModel.hidden

    def counted(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts[-1][Path(self.name).name] += 1
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    overlaps = []
    for every in (0, 1):
        counts.append(Counter())
        seen = lines(recipe(method, *overrides, "train.steps=3", f"diagnostics.every={every}"), console)
        overlaps.append(sum("overlap/ratio" in line for line in seen))
    assert overlaps == [0, 3]
    assert counts[1] == counts[0]


def test_a_method_without_a_teacher_has_nothing_to_compare(recipe: Make, console: Console) -> None:
    assert not any(name.startswith("overlap/") for line in lines(recipe("grpo"), console) for name in line)


def test_comparing_in_parts_and_one_by_one_is_the_same(
    recipe: Make, console: Console, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the size of a part nor of a batch moves a number; a masked token leaves, the others stay."""
    from opdkit.engines.hf import HFEngine

    chosen = recipe("opd", "train.steps=1")
    train(chosen, console=console)
    rows = load_rows(chosen.run_dir / "rows" / "step_000001.parquet")
    sides = {}
    for name, path in models.items():
        model = LanguageModel.load(path, dtype=torch.float32, device="cpu")
        sides[name] = HFEngine(model, max_tokens_per_batch=64)

    def table(rows: Any) -> Any:
        return compare_rows(
            rows,
            student_side(sides["student"].score, sides["student"].model.head()),
            teacher_side(sides["teacher"].score, sides["teacher"].model.head()),
            k=4,
            temperature=1.0,
            device=torch.device("cpu"),
        )

    whole = table(rows)
    monkeypatch.setattr("opdkit.training.metrics.agreement.TOKENS_PER_PART", 20)
    parts = table(rows)
    assert whole.row_N.tolist() == parts.row_N.tolist() and whole.index_N.tolist() == parts.index_N.tolist()
    for name, values_N in whole.columns.items():
        assert torch.allclose(torch.tensor(values_N), torch.tensor(parts.columns[name]), atol=1e-5, equal_nan=True), (
            name
        )
    mask = rows[0].rollout.answer_mask.copy()
    mask[1] = False
    less = table([replace(rows[0], rollout=replace(rows[0].rollout, answer_mask=mask)), *rows[1:]])
    assert len(less.row_N) == len(whole.row_N) - 1
    assert less.columns["reverse_kl"][1] == pytest.approx(whole.columns["reverse_kl"][2], abs=1e-5)
