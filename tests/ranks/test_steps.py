"""A step on several ranks is the step of one process: the same answers, coefficients, gradient and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from step_on_ranks import step

from opdkit.ranks.base import ALONE, dealt
from opdkit.recipe import Recipe, parse_recipe

Make = Callable[..., Recipe]
# The published sentences hold characters that the tiny tokenizer does not know.
WORDING = "context.wording={ layout = '{question}{success}{another}{failure}', " + ", ".join(
    f"{kind} = ';{{text}}'" for kind in ("success", "another", "failure", "feedback", "summary", "failed_summary")
)
PEERS = ("context.kind=peers", "context.feedback=never", WORDING + " }", "train.warmup_steps=0")
SOLUTION = ("context.kind=reference_solution", "context.template=prefix", "method.loss_temperature=1.0")
TOPK = ("method.support=teacher_topk", "method.k=4", "method.divergence=forward_kl", "method.reduction=sequence")
EMA = ("teacher.kind=self", "teacher.weights=ema", "teacher.ema_rate=0.1")
LORA = ("model.lora.r=4", "model.lora.alpha=8")
SHORT: dict[str, tuple[str, ...]] = {
    "opd, two updates": ("opd", "train.updates_per_step=2", "diagnostics.every=1"),
    "opsd, average, LoRA": ("opsd", *EMA, *LORA),
    "mopd": ("mopd", *PEERS, "method.importance_cap=2.0"),
}
SETTINGS: dict[str, tuple[str, ...]] = {
    **SHORT,
    "opd": ("opd",),
    "opd, ragged parts": ("opd", "train.max_tokens_per_micro_batch=60"),
    "opd, checkpointed": ("opd", "model.gradient_checkpointing=true"),
    "opd, sampled": ("opd", "method.support=sampled"),
    "opd, lists": ("opd", *TOPK),
    "opd, group return": ("opd", "method.support=sampled", "method.credit=group_return"),
    "opd, soft or": ("opd", "weights.tokens.name=soft_or", "weights.importance.cap=1.5", "weights.prefix.gamma=0.5"),
    "opd, drawn": ("opd", "method.support=sampled", "weights.tokens.name=entropy_sampling", "weights.tokens.gamma=1.0"),
    "opd, paced": ("opd", "weights.problems.name=paced", "weights.problems.mean_one=true"),
    "opd, reward softmax": ("opd", "weights.problems.name=reward_softmax", "weights.problems.per=batch"),
    "opd, five updates": ("opd", "train.updates_per_step=5"),  # of two rows: on four ranks, two have none
    "opd, muon": ("opd", "train.optimizer=muon"),
    "opd, scheduled": ("opd", "schedule.method.loss_temperature=[[0, 1.0], [0.3, 0.5]]"),
    "topk_opd": ("topk_opd", "method.k=4", "method.support=union"),
    "topk_opd, advantage": ("topk_opd", "method.k=4", "method.support=symmetric_difference", "method.form=advantage"),
    "opsd": ("opsd",),
    "opsd, live": ("opsd", "teacher.kind=self", "teacher.weights=live", "train.updates_per_step=2"),
    "opsd, adapter off": ("opsd", "teacher.kind=self", "teacher.weights=adapter_off", *LORA),
    "pw_opsd": ("pw_opsd", *SOLUTION),
    "eopd": ("eopd", *SOLUTION, "method.entropy_gate=2.0"),
    "reopold": ("reopold", *SOLUTION),
    "reopold, refining": ("reopold", *SOLUTION, "method.switch_step=0", "weights.tokens.name=q3"),
    "grpo": ("grpo",),
    "grpo, KL": ("grpo", "method.kl_weight=0.1", "teacher.kind=model", "teacher.path=$TEACHER"),
    "grpo_opd": ("grpo_opd", "method.form=advantage", "method.support=sampled"),
    "opd, teacher in parts": ("opd", "teacher.placement=sharded"),
    "sft": ("sft",),
    "dpo": ("dpo",),
    "simpo": ("simpo",),
    "verified_sft": ("verified_sft",),  # a rank may have wrong answers alone: none of its tokens counts
    "sdpo": (
        *("sdpo", *PEERS, "teacher.weights=trust_region", "teacher.student_share=0.3"),
        "method.without_context=dilute",
    ),
}


_alone: dict[str, dict[str, Any]] = {}


def alone(raw: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The steps of one process, which are the same however several would keep the student: made once."""
    key = json.dumps([num_steps, {part: keys for part, keys in raw.items() if part not in ("parallel", "runs_dir")}])
    if key not in _alone:
        _alone[key] = step(parse_recipe(raw), ALONE, num_steps)
    return _alone[key]


def compared(recipe: Make, settings: dict[str, tuple[str, ...]], on_ranks: Any, num_ranks: int) -> None:
    recipes = {name: recipe(*chosen).as_dict() for name, chosen in settings.items()}
    several = on_ranks({name: (raw, [], 2) for name, raw in recipes.items()}, num_ranks)
    for name, raw in recipes.items():
        one, together = alone(raw, 2), several[name]
        first, second = one["steps"][0], together["steps"][0]
        assert bool(together["in_parts"]) == (parse_recipe(raw).parallel.strategy == "sharded")
        assert first["answers"] == second["answers"], name
        assert first["metrics"].keys() == second["metrics"].keys(), name
        for metric, value in first["metrics"].items():
            wanted = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)
            assert second["metrics"][metric] == wanted, (name, metric)
        assert distance(one["gradients"][0], together["gradients"][0]) < 2e-6, name
        for kind in ("after", "averages"):
            assert distance(one[kind], together[kind]) < 1e-4, (name, kind)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    none = torch.zeros(1, dtype=torch.float64)  # where nothing is kept
    flat_1, flat_2 = (torch.cat([none, *(of[name].flatten().double() for name in sorted(of))]) for of in (one, other))
    return float((flat_1 - flat_2).norm() / flat_1.norm().clamp(min=1e-30))


def test_a_step_on_two_ranks(recipe: Make, on_ranks: Any) -> None:
    """Rows equal, metrics to 1e-5, gradients to 2e-6 (rounding): full weights in two updates, adapters and a moving
    average, peers read across ranks; the adapters' model, and one of full weights, also with layers in parts. Tiny
    models in float32 on gloo; NCCL is not seen."""
    in_parts = {f"{name}, in parts": (*SHORT[name], "parallel.strategy=sharded") for name in list(SHORT)[:2]}
    compared(recipe, SHORT | in_parts, on_ranks, 2)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "num_ranks"), [("gathered", 2), ("gathered", 3), ("gathered", 4), ("sharded", 2), ("sharded", 3)]
)
def test_every_setting(strategy: str, num_ranks: int, recipe: Make, on_ranks: Any) -> None:
    """The same for every kind of term, weight and optimizer, with ranks that have no row of an update, or count no
    token of theirs; and in parts with ranks that make fewer passes, and views of other weights."""
    chosen = (f"parallel.strategy={strategy}",)
    compared(recipe, {name: (*setting, *chosen) for name, setting in SETTINGS.items()}, on_ranks, num_ranks)


@pytest.mark.ranks
def test_two_copies_in_parts(recipe: Make, on_ranks: Any) -> None:
    """Of four ranks two keep a copy (HSDP); the norm and the gradients count each weight once. With `offload`, too,
    where on a CPU nothing moves."""
    chosen = ("parallel.strategy=sharded", "parallel.hsdp=2")
    settings = {name: (*setting, *chosen) for name, setting in SHORT.items()}
    settings["muon"] = ("opd", "train.optimizer=muon", *chosen)
    settings["offload"] = ("opd", "parallel.offload=true", *chosen)
    compared(recipe, settings, on_ranks, 4)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["gathered", "sharded"])
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16(lora: bool, strategy: str, recipe: Make, on_ranks: Any) -> None:
    """The same answers; gradients differ by no more than twice what they do in one process in other micro-batches,
    whose sums round as often: about 2.5e-3; of fresh adapters 2e-7."""
    chosen = ("opd", "model.dtype=bfloat16", *(LORA if lora else ()), f"parallel.strategy={strategy}")
    raw = recipe(*chosen).as_dict()
    one, otherwise = alone(raw, 1), alone(recipe(*chosen, "train.max_tokens_per_micro_batch=60").as_dict(), 1)
    together = on_ranks({"bf16": (raw, [], 1)}, 2)["bf16"]
    assert one["steps"][0]["answers"] == together["steps"][0]["answers"]
    noise = distance(one["gradients"][0], otherwise["gradients"][0])
    assert noise < 3e-2
    assert distance(one["gradients"][0], together["gradients"][0]) < max(2 * noise, 2e-6)


TALK = """
from opdkit.rollouts.environments.base import Step

class Talk:
    tools = ()
    def reset(self, problem, seed):
        self.left = 1 + int(problem.gold) % 4
        return problem.messages
    def step(self, action, seed):
        self.left -= 1
        return Step(done=not self.left, reward=0.5, messages=[{"role": "user", "content": str(seed % 100)}])
"""


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["gathered", "sharded"])
def test_episodes_of_unequal_lengths(strategy: str, recipe: Make, on_ranks: Any, tmp_path: Path) -> None:
    """Every rank plays its own as long as they take, also where layers in parts are gathered together."""
    (tmp_path / "talk.py").write_text(TALK)
    played = (f"episode.environment={tmp_path / 'talk.py'}", "episode.max_turn_tokens=8", "episode.workers=1")
    settings = {"opd": ("opd", *played, f"parallel.strategy={strategy}")}
    compared(recipe, settings, on_ranks, 2)


def test_rows_are_dealt_evenly() -> None:
    """Ragged costs: the busiest rank has at most 1.05 of the mean, whatever their order."""
    costs = [float(1 + (7 * n * n) % 997) for n in range(256)]
    for num_ranks in (2, 4, 8):
        loads = [0.0] * num_ranks
        for cost, rank in zip(costs, dealt(costs, num_ranks), strict=True):
            loads[rank] += cost
        assert max(loads) <= 1.05 * sum(loads) / num_ranks
