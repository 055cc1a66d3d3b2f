"""Settings that would make a run smaller or faster, each tried by itself: what it saves, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opdkit.cost.plan import Plan, plan
from opdkit.cost.work import Lengths, SizeOf
from opdkit.errors import UserError
from opdkit.recipe.load import parse_recipe
from opdkit.recipe.sections import Recipe

WORTH_BYTES, WORTH_SECONDS = 0.01, 0.03  # shares; changes of less are not shown
LORA = {"model.lora.r": 64, "model.lora.alpha": 128}


@dataclass(frozen=True, slots=True)
class Change:
    settings: dict[str, Any]  # {key: value}
    learns_otherwise: bool  # whether it changes what is learned, and not only what it costs
    after: Plan

    @property
    def lines(self) -> list[str]:
        return [f"{key} = {_toml(value)}" for key, value in self.settings.items()]

    def as_dict(self) -> dict[str, Any]:
        took = None if self.after.seconds is None else sum(self.after.seconds.values())
        return {
            "set": self.settings,
            "changes_what_is_learned": self.learns_otherwise,
            "peak_bytes": self.after.peak,
            "fits": self.after.fits,
            "seconds": took,
        }


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def changes(before: Plan, size_of: SizeOf, lengths: Lengths) -> list[Change]:
    """Of those that are possible and worth it, the ones that save most bytes first."""
    found: list[Change] = []
    for settings, learns_otherwise in _candidates(before):
        after = _planned(before, settings, size_of, lengths)
        if after is not None:
            change = Change(settings, learns_otherwise, after)
            # Of one key's values the mildest that saves as much.
            again = any(c.settings.keys() == settings.keys() and c.after.peak <= after.peak for c in found)
            if _is_worth_it(before, after) and not again:
                found.append(change)
    return sorted(found, key=lambda change: (change.learns_otherwise, change.after.peak))


def engine_shapes(before: Plan, size_of: SizeOf, lengths: Lengths) -> dict[str, Plan]:
    """A vLLM beside the trainer, both ways that it may be idle; only those that the recipe allows."""
    ways = {how: _planned(before, {"sampling.when_idle": how}, size_of, lengths) for how in ("sleep", "keep")}
    return {how: found for how, found in ways.items() if found is not None}


def _planned(before: Plan, settings: dict[str, Any], size_of: SizeOf, lengths: Lengths) -> Plan | None:
    """None: the recipe refuses it."""
    recipe = _changed(before.work.recipe, settings)
    if recipe is None:
        return None
    how: dict[str, Any] = {"ranks": before.work.ranks}
    return plan(recipe, size_of, device=before.device, lengths=lengths, **how)


def _is_worth_it(before: Plan, after: Plan) -> bool:
    if after.peak < (1 - WORTH_BYTES) * before.peak:
        return True
    if before.seconds is None or after.seconds is None or (after.fits is False):
        return False
    return sum(after.seconds.values()) < (1 - WORTH_SECONDS) * sum(before.seconds.values())


def _candidates(before: Plan) -> Iterator[tuple[dict[str, Any], bool]]:
    """({key: value}, whether it changes what is learned)."""
    recipe, work = before.work.recipe, before.work
    model, teacher = recipe.model, recipe.teacher
    yield {"model.gradient_checkpointing": not model.gradient_checkpointing}, False
    budget, row = work.learning_budget, int(work.row)
    for smaller in (budget // 2, budget // 4, budget // 8):
        if smaller >= row:
            yield {"train.max_tokens_per_micro_batch": smaller}, False
    for smaller in (work.scoring_budget // 2, work.scoring_budget // 4):
        if smaller >= row:
            yield {"sampling.max_tokens_per_batch": smaller}, False
    if model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}, False
    if teacher.kind == "model" and (teacher.dtype or model.dtype) == "float32":
        yield {"teacher.dtype": "bfloat16"}, False
    if teacher.kind == "self" and teacher.weights in ("initial", "ema", "trust_region"):
        yield {"teacher.weights_on": "host"}, False
    if teacher.kind == "model":
        yield {"teacher.placement": "cpu"}, False
        yield {"teacher.quantization": "int8"}, True
    if model.gradient_checkpointing and not model.activation_offload:
        yield {"model.activation_offload": True}, False
    if recipe.train.optimizer == "adamw":
        yield {"train.optimizer": "adamw_8bit"}, True
    if model.lora is None and model.dtype == "bfloat16":
        yield {"train.master_dtype": "bfloat16"}, True
    if recipe.sampling.engine == "hf" and before.device is not None and not before.device.is_cpu:
        resident = {"weights", "optimizer", "teacher", "other views", "bfloat16 copy"}
        left = before.device.usable - sum(before.moments["sampling"].get(part, 0.0) for part in resident)
        if (share := math.floor(left / before.device.capacity * 20) / 20) > 0:
            engine = {"sampling.engine": "vllm", "sampling.when_idle": "sleep"}
            yield {**engine, "sampling.vllm.gpu_memory_utilization": share}, False
    if model.lora is None and teacher.weights == "initial":
        yield {**LORA, "teacher.weights": "adapter_off"}, True
    if model.lora is None:
        yield dict(LORA), True
    if recipe.train.optimizer == "adamw":
        yield {"train.optimizer": "muon"}, True
    if recipe.sampling.group_size > 2:
        yield {"sampling.group_size": recipe.sampling.group_size // 2}, True


def _changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe | None:
    """None: the recipe refuses it."""
    try:
        return parse_recipe(recipe.as_dict(), [f"{key}={_toml(value)}" for key, value in settings.items()])
    except UserError:
        return None
