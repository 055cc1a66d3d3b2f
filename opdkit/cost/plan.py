"""A recipe, the sizes of its models and a device become a plan: bytes, seconds, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opdkit.cost.devices import FLOPS_REACHED, GPUS, Device
from opdkit.cost.memory import Parts, hosted, loading, moments
from opdkit.cost.seconds import seconds, update_flops
from opdkit.cost.size import ModelSize, known_sizes
from opdkit.cost.strategy import is_sharded
from opdkit.cost.work import Lengths, SizeOf, Work, work_of
from opdkit.errors import UserError
from opdkit.recipe.sections import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of one rank. Bytes are of tensors; seconds are None where a device's speed is not known."""

    work: Work
    device: Device | None
    moments: Mapping[str, Parts]
    seconds: Mapping[str, float] | None

    @property
    def totals(self) -> dict[str, float]:
        return {moment: sum(parts.values()) for moment, parts in self.moments.items()}

    @property
    def peak_moment(self) -> str:
        totals = self.totals
        return max(totals, key=lambda moment: totals[moment])

    @property
    def peak(self) -> float:
        return self.totals[self.peak_moment]

    @property
    def fits(self) -> bool | None:
        """None: no device was named."""
        return None if self.device is None else self.peak <= self.device.usable

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of the update: its necessary products, at the vendor's rate, over its seconds."""
        if self.seconds is None or self.device is None or self.device.flops is None or not self.seconds["update"]:
            return None
        rate = self.device.flops[self.work.dtype] / FLOPS_REACHED
        return update_flops(self.work) / self.seconds["update"] / rate

    @property
    def in_host_memory(self) -> dict[str, float]:
        """{what: bytes} beside a GPU."""
        return hosted(self.work, "cpu" if self.device is not None and self.device.is_cpu else "cuda")

    @property
    def while_loading(self) -> dict[str, float]:
        """{where: bytes of a whole model} that ranks then cut."""
        return loading(self.work)

    def as_dict(self) -> dict[str, Any]:
        """For other programs."""
        device, work = self.device, self.work
        return {
            "recipe": work.recipe.name,
            "device": device and {"name": device.name, "capacity": device.capacity, "usable": device.usable},
            "gpus": work.ranks,
            "strategy": ("sharded" if work.sharded else "gathered") if work.ranks > 1 else None,
            "estimate": True,
            "tokens": {"prompt": work.prompt, "answer": work.answer, "rows": work.rows},
            "parameters": {"student": work.student.parameters, "trained": work.trained},
            "bytes": {moment: dict(parts) for moment, parts in self.moments.items()},
            "peak": {"moment": self.peak_moment, "bytes": self.peak},
            "host_bytes": sum(self.in_host_memory.values()),
            "loading_bytes": self.while_loading,
            "fits": self.fits,
            "mfu": self.mfu,
            "seconds": None if self.seconds is None else dict(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where models' sizes come from: the committed table, a local folder, or a config.json that somebody names.

    given: {key of the recipe ("model.path", "teacher.path", ...): a config.json, its folder, or a name in the table}.
    may_build: whether a local folder's config is built, which imports torch and takes seconds.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    may_build: bool = True
    _built: dict[tuple[str, str | None, bool], ModelSize] = field(default_factory=dict)

    def __call__(self, key: str, path: str, attention: str | None, trust_remote_code: bool) -> ModelSize:
        """Raises UserError for a model whose size nobody knows."""
        chosen = self.given.get(key, path)
        if chosen in known_sizes():
            return known_sizes()[chosen]
        folder = _base_folder(Path(chosen).expanduser())
        if str(folder) in known_sizes():
            return known_sizes()[str(folder)]
        if folder.exists() and self.may_build:
            built = (str(folder), attention, trust_remote_code)
            if built not in self._built:
                from opdkit.cost.build import size_from_config

                self._built[built] = size_from_config(folder, attention=attention, trust_remote_code=trust_remote_code)
            return self._built[built]
        raise UserError(
            f"{key} = {chosen[:200]}: its size is not known (it is no local folder, and not one of the "
            f"{len(known_sizes())} models in opdkit's table); give its config.json, --config {key}=FILE, or the name "
            "of one in the table of the same size"
        )


def _base_folder(path: Path) -> Path:
    """An adapter's base, by its own words."""
    import json

    adapter = path / "adapter_config.json"
    if not adapter.is_file():
        return path
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter} names no base model ({error}); repair it, or give --config") from None
    return Path(str(base))


def plan(
    recipe: Recipe,
    size_of: SizeOf,
    *,
    device: Device | None = None,
    lengths: Lengths | None = None,
    ranks: int = 1,
) -> Plan:
    """Raises UserError for a model whose size is not known."""
    work = work_of(recipe, size_of, lengths or Lengths(), ranks)
    memory = None if device is None or device.is_cpu else device.capacity
    work = replace(work, sharded=is_sharded(recipe, work.student.parameters, ranks, memory))
    found = moments(work, device)
    took = None
    if device is not None and device.flops is not None:
        resident = sum(found["scoring"].get(part, 0.0) for part in ("weights", "optimizer", "teacher", "other views"))
        took = seconds(work, device, resident)
    return Plan(work=work, device=device, moments=found, seconds=took)


def fitting_gpus(recipe: Recipe, size_of: SizeOf, lengths: Lengths | None = None) -> list[str]:
    """The GPUs of the table that the recipe fits, one of each, as they are listed."""
    return [gpu.name for gpu in GPUS.values() if plan(recipe, size_of, device=gpu, lengths=lengths).fits]
