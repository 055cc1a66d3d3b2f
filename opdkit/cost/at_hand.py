"""Whether a recipe fits the machine that it is checked on, by its plan. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from opdkit.cost.changes import changes
from opdkit.cost.devices import GIB, Device
from opdkit.cost.plan import Plan, Sizes, plan
from opdkit.cost.work import Lengths
from opdkit.errors import UserError
from opdkit.recipe.load import load_recipe, read_toml
from opdkit.recipe.pipeline import is_pipeline, load_pipeline
from opdkit.recipe.sections import Recipe

ASK_GPUS = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")  # MiB, a line for each
PATIENCE_S = 20
MOST_CHANGES = 4


def misfits_in(path: Path, overrides: Sequence[str], sizes: Sizes) -> list[str]:
    """`misfit` of a recipe, or of each training stage of a pipeline."""
    if not is_pipeline(read_toml(path)):
        named = [("", load_recipe(path, overrides))]
    else:
        stages = [(stage.name, stage.does) for stage in load_pipeline(path, overrides).stages]
        named = [(f"stage {name}: ", does) for name, does in stages if isinstance(does, Recipe)]
    told = [(where, misfit(recipe, sizes)) for where, recipe in named]
    return [f"{where}{said}" for where, said in told if said is not None]


def misfit(recipe: Recipe, sizes: Sizes) -> str | None:
    """A sentence with what would help if the recipe needs more memory than there is; None if it fits, or if nobody
    knows the size of a model."""
    device = device_at_hand(recipe.model.device)
    try:
        found = plan(recipe, sizes, device=device)
    except UserError:
        return None
    if found.fits:
        return None
    helping = _settings_that_help(found, sizes)
    advice = f"it would with {', '.join(helping)}; " if helping else ""
    return (
        f"it does not fit: by its plan one process needs about {found.peak / GIB:.1f} GiB at {found.peak_moment}, and "
        f"{device.name} has {device.usable / GIB:.1f}; {advice}`opdkit plan` lists what would save how much, and which "
        "GPUs it fits"
    )


def _settings_that_help(found: Plan, sizes: Sizes) -> list[str]:
    """So that it fits, lines of TOML: the best change, then the best besides, those that change nothing that is learned
    first; empty if too few help."""
    lines: dict[str, str] = {}
    for _ in range(MOST_CHANGES):
        best = next(iter(changes(found, sizes, Lengths())), None)
        if best is None:
            break
        found = best.after
        lines |= dict(zip(best.settings, best.lines, strict=True))
        if found.fits:
            return list(lines.values())
    return []


def device_at_hand(asked: str) -> Device:
    """The smallest GPU of this machine, if it has one and the recipe does not ask for the processor, or the machine."""
    memories = [] if asked == "cpu" else _gpus()
    if memories:
        return Device(name="the GPU of this machine", capacity=min(memories))
    without = "" if asked == "cpu" else ", without a GPU,"
    return Device(name=f"this machine{without}", capacity=machine_bytes(), is_cpu=True)


def machine_bytes() -> int:
    """Of this machine, or of the share that its container has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> list[int]:
    """Bytes of each GPU, by NVIDIA's own word."""
    if shutil.which(ASK_GPUS[0]) is None:
        return []
    try:
        said = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
        return [int(line) << 20 for line in said.split()]
    except (OSError, ValueError, subprocess.SubprocessError):  # no driver, or none that speaks
        return []
