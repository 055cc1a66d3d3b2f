"""`eval.divergence`: against both models' own logits, and that a run with it learns what it learns without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from opdkit.errors import UserError
from opdkit.metric_lines import read_metrics
from opdkit.recipe import Recipe
from opdkit.training.held_out import held_out
from opdkit.training.loop import train

Make = Callable[..., Recipe]


def test_by_hand(recipe: Make, start: Any, models: Any) -> None:
    """Both directions, of plain forward passes of two plain models, answer by answer. As many problems as are asked."""
    run = start(recipe("opd"))
    found = held_out(run.state, run.answers, run.problems[:3], most=3)
    assert found["num_rows"] == 6 and found["num_rows_not_compared"] == 0
    loaded = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for name, path in models.items()}
    means = []
    for group in run.answers.held_out(run.problems[:3], 0):
        kls: list[torch.Tensor] = []
        for rollout in group.rollouts:
            ids, first = torch.tensor([[*rollout.prompt_ids, *rollout.answer_ids]]), len(rollout.prompt_ids) - 1
            with torch.no_grad():
                p, q = (loaded[name](ids).logits[0, first:-1].log_softmax(-1) for name in ("student", "teacher"))
            kls.append(torch.stack([(p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)]))
        means.append(torch.cat(kls, dim=1).mean(1))
    reverse, forward = torch.stack(means).mean(0).tolist()
    assert found["reverse_kl"]["value"] == pytest.approx(reverse, rel=1e-5)
    assert found["forward_kl"]["value"] == pytest.approx(forward, rel=1e-5)
    assert held_out(run.state, run.answers, run.problems, most=5)["num_rows"] == 10


def test_a_run_learns_the_same_with_it(recipe: Make, console: Console) -> None:
    """Metrics of the evaluations have both directions with intervals; those of the steps are as without."""
    keys = ("train.steps=2", 'eval.data="arithmetic:merge-3:test"', "eval.limit=4", "eval.samples=2", "eval.every=1",
            "teacher.weights=ema", "teacher.ema_rate=0.1")  # fmt: skip
    lines = []
    for name, more in (("plain", ()), ("apart", ("eval.divergence=3",))):
        chosen = recipe("opsd", *keys, f"name={name}", *more)
        summary = train(chosen, console=console)
        lines.append(read_metrics(chosen.run_dir / "metrics.jsonl"))
    plain, apart = (
        [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in own] for own in lines
    )
    name = "eval/arithmetic_merge-3_test"
    more = {f"{name}/{kind}{end}" for kind in ("reverse_kl", "forward_kl") for end in ("", "_low", "_high")}
    for without, with_it in zip(plain, apart, strict=True):
        new = with_it.keys() - without.keys()
        assert new == (more if f"{name}/avg_at_n" in without else set())
        assert {key: with_it[key] for key in without} == without
    found = summary["eval"]["student_after"]["arithmetic:merge-3:test"]["divergence"]
    assert found["num_rows"] == 6 and found["reverse_kl"]["value"] == apart[-1][f"{name}/reverse_kl"] > 0


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("grpo", (), 'teacher.kind = "none"'),
        ("opd", ("teacher.kind=server", "teacher.url=http://127.0.0.1:1", "teacher.payload=topk"), "sends lists"),
        ("opd", ("teacher.tokens=align", "method.support=sampled"), "has only some of them"),
        ("opd", ("eval.data=",), "needs eval.data"),
    ],
)
def test_what_cannot_be_known_exactly(method: str, settings: Any, said: str, recipe: Make) -> None:
    keys = [k for k in ("eval.data='arithmetic:merge-3:test'",) if "eval.data=" not in settings]
    own = [setting for setting in settings if setting != "eval.data="]
    with pytest.raises(UserError) as refused:
        recipe(method, *keys, "eval.divergence=4", *own)
    assert said in str(refused.value)
