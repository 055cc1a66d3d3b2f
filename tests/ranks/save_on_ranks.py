"""What a rank holds more than before while it loads a model and while it writes a checkpoint, and the first one while
it exports its model: as `python save_on_ranks.py <job.json>` on each of several ranks; the first one writes bytes to
`<job>.pt`."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from opdkit.ranks.join import join, leave
from opdkit.recipe import parse_recipe
from opdkit.run.folder import RunFolder
from opdkit.training.parts import Parts
from opdkit.training.saved.checkpoint import save
from opdkit.training.saved.export import export

STATUS = Path("/proc/self/status")


def held() -> int:
    """Bytes of memory of its own: not what is mapped from files, which the system may drop. Linux."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def most_held(do: Callable[[], object]) -> int:
    """While it is done, every few milliseconds, beside what is held before."""
    gc.collect()
    before, seen, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(held() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    do()
    done.set()
    watching.join()
    return max(seen)


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    ranks = join(device="cpu", timeout_minutes=5)
    recipe = parse_recipe(job["recipe"])
    folder = RunFolder(recipe.run_dir)
    loaded: list[Parts] = []
    while_loading = ranks.gather(most_held(lambda: loaded.append(Parts(recipe, None, ranks=ranks))))
    (parts,) = loaded

    def written() -> None:
        save(
            folder.checkpoints, step=1, model=parts.student, weights=parts.optimizer.for_saving(), optimizer={},
            teacher={}, counters={}, pass_rates={}, keep=1, ranks=ranks,
        )  # fmt: skip

    while_saving = ranks.gather(most_held(written))
    if ranks.is_first:
        folder.write_recipe(recipe.as_dict())
        out = recipe.run_dir / "exported"
        exporting = most_held(lambda: export(recipe.run_dir, out, dtype="bfloat16", console=Console(quiet=True)))
        torch.save({"loading": while_loading, "saving": while_saving, "exporting": exporting}, path.with_suffix(".pt"))
    ranks.wait()
    leave(0)
