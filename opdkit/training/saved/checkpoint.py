"""Checkpoints that are whole or not there: everything a resumed run needs to go on (on a CPU to the same bits).

    checkpoints/step_000100/model/                 Hugging Face format (a LoRA student: its adapter), float32
                            optimizer.safetensors  "<parameter>/<what>"; of N ranks optimizer-00001-of-0000N.safetensors
                                                   and so on, each with its rows of every tensor, in the ranks' order
                            teacher.safetensors    only for teachers that have a state (initial, ema)
                            queue/step_000103.parquet  with sampling.lag: answers that a step to come learns from
                            state.json             {"version", "step", "attempt", "lr_factor", "counters", "pass_rates",
                                                   "files"}
                            SHA256SUMS             of every file; `sha256sum -c SHA256SUMS` checks them by hand

There is no random state to save: every seed comes from identity (seed, step, problem, sample).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opdkit.engines.load import quiet_libraries
from opdkit.engines.model import LanguageModel
from opdkit.engines.stand_ins import slots, swapped
from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks
from opdkit.run.folder import sync_folder
from opdkit.run.rows import load_rows, save_rows
from opdkit.training.saved.behind import Behind, on_all
from opdkit.training.saved.checkpoint_sums import Damaged, check_sums, check_without_sums, write_sums
from opdkit.types import Example

VERSION = 2
IN_PARTS = 3  # written by several ranks
WITHOUT_SUMS = 1  # the format before this one
RowsOf = Callable[[str], slice | None]
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    step: int
    counters: Mapping[str, float]
    pass_rates: Mapping[str, float]

    files: tuple[str, ...]  # "optimizer", "teacher": what was written
    damaged: Mapping[Path, str]  # the newer ones that are not whole, and why
    attempt: int = 1  # which try at the steps behind it is made (`metric_lines`)
    lr_factor: float = 1.0  # of the learning rate of that try

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    def tensors(self, name: str, rows_of: RowsOf = lambda key: None) -> dict[str, Tensor]:
        """rows_of: which rows are wanted of a tensor, by its key (None: all); what has none of them is left out. So a
        run goes on with any number of ranks. Raises UserError for a file that became unreadable since it was checked.
        """
        if name not in self.files:
            return {}
        parts = sorted(self.path.glob(f"{name}-*-of-*.safetensors")) or [self.path / f"{name}.safetensors"]
        try:
            return _joined(parts, rows_of)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{name}.safetensors of {self.path} cannot be read ({error}); remove that folder to go on from an "
                "older one"
            ) from None

    def queue(self) -> dict[int, list[Example]]:
        """By step, the answers that were sampled and not learned from yet."""
        return {step: load_rows(path) for step, path in _steps_of(self.path / "queue")}


def _joined(files: Sequence[Path], rows_of: RowsOf) -> dict[str, Tensor]:
    """Tensors that stand in the files in parts, one behind the other."""
    with ExitStack() as opened:
        parts = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
        found: dict[str, list[Any]] = {}
        for part in parts:
            for key in part.keys():  # noqa: SIM118  (it is no mapping)
                found.setdefault(key, []).append(part.get_slice(key))
        wanted = {key: (slices, rows_of(key)) for key, slices in found.items()}
        return {
            key: _rows(slices, rows) for key, (slices, rows) in wanted.items() if rows is None or rows.start < rows.stop
        }


def _rows(slices: Sequence[Any], rows: slice | None) -> Tensor:
    if not slices[0].get_shape():
        return slices[0][...]
    found, before = [], 0
    for one in slices:
        size = one.get_shape()[0]
        start, end = (0, size) if rows is None else (max(rows.start - before, 0), min(rows.stop - before, size))
        if start < end or len(slices) == 1:
            found.append(one[start:end])
        before += size
    return found[0] if len(found) == 1 else torch.cat(found)


def _steps_of(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("step_*.parquet")):
        if found := _NAME.fullmatch(path.stem):
            yield int(found[1]), path


def save(
    folder: Path,
    *,
    step: int,
    model: LanguageModel,
    weights: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    counters: Mapping[str, float],
    pass_rates: Mapping[str, float],
    keep: int,
    also_kept: Callable[[int], bool] = lambda step: False,
    attempt: int = 1,
    lr_factor: float = 1.0,
    queue: Mapping[int, Sequence[Example]] | None = None,
    ranks: Ranks = ALONE,
    in_background: bool = False,
) -> Callable[[], None]:
    """Write `folder/step_XXXXXX` atomically, then remove all but the newest `keep` and those that `also_kept` names.
    Raises UserError on a full disk.

    weights: the model's, where its module does not hold them (`Optimizer.for_saving`). Every rank writes what it keeps
    of `optimizer` and `teacher`, the first one all else. in_background: from copies in host memory, but for the model,
    which is written first. Call what is returned, on all ranks, before anything else is saved or read: then the
    checkpoint is whole, or UserError is raised.
    """
    target, unfinished = folder / f"step_{step:06d}", folder / f".unfinished-step_{step:06d}"
    kept = {name: tensors for name, tensors in (("optimizer", optimizer), ("teacher", teacher)) if tensors}
    state = {
        "version": VERSION if ranks.size == 1 else IN_PARTS,
        "step": step,
        "files": sorted({name for names in ranks.gather(list(kept)) for name in names}),
        "attempt": attempt,
        "lr_factor": lr_factor,
        "counters": dict(counters),
        "pass_rates": dict(pass_rates),
    }
    part = "" if ranks.size == 1 else f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}"

    def begin() -> None:
        _begin(folder, unfinished)
        with swapped(slots(model.module, weights or {})):  # whole weights, also of layers that are in parts
            save_model(model, unfinished / "model")
        _save_queue(unfinished / "queue", queue or {})

    def write() -> None:
        for name in list(on_host):
            save_file(on_host.pop(name), unfinished / f"{name}{part}.safetensors")

    def finish() -> None:
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        write_sums(unfinished)
        _rename(unfinished, target)

    def whole() -> None:
        if behind is not None:
            with _all_or_nothing(target, unfinished, ranks):
                behind.wait()
        if ranks.is_first:
            remove_older(folder, keep, also_kept)

    behind: Behind | None = None
    with _all_or_nothing(target, unfinished, ranks):
        on_all(ranks, begin if ranks.is_first else None)
        on_host = {name: _on_host(tensors, copied=in_background) for name, tensors in kept.items()}
        if in_background:
            behind = Behind(ranks, unfinished, write, finish)
            return whole
        on_all(ranks, write)
        on_all(ranks, finish if ranks.is_first else None)
    whole()
    return lambda: None


def _begin(folder: Path, unfinished: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".unfinished-*"):  # of a run that was killed
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir()


def _save_queue(folder: Path, queue: Mapping[int, Sequence[Example]]) -> None:
    for later, rows in queue.items():
        folder.mkdir(exist_ok=True)
        save_rows(folder / f"step_{later:06d}.parquet", rows)


def _rename(unfinished: Path, target: Path) -> None:
    """Give what is whole, and on the disk, its name."""
    _sync(unfinished)
    if target.exists():  # a run that was resumed from an older checkpoint writes this one anew
        shutil.rmtree(target)
    unfinished.rename(target)
    sync_folder(target.parent)


@contextmanager
def _all_or_nothing(target: Path, unfinished: Path, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        saved = _all(target.parent)
        safe = (
            f"the last complete checkpoint is {saved[-1]}; make room and go on with --resume" if saved else "make room"
        )
        raise UserError(f"checkpoint {target} could not be written ({error}); {safe}") from error


def _on_host(tensors: Mapping[str, Tensor], *, copied: bool) -> dict[str, Tensor]:
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not copied:
        return on_host
    return {name: t.clone() if t.data_ptr() == tensors[name].data_ptr() else t for name, t in on_host.items()}


def remove_older(folder: Path, keep: int, also_kept: Callable[[int], bool]) -> None:
    """All but the newest `keep`. Each loses its name first: a crash leaves no part of one that looks like a whole."""
    for left in folder.glob(".unfinished-removed-*"):
        shutil.rmtree(left)
    for old in _all(folder)[:-keep]:
        if not also_kept(_step_of(old)):
            shutil.rmtree(old.rename(folder / f".unfinished-removed-{old.name}"))


def save_model(model: LanguageModel, path: Path) -> None:
    """Weights as they are trained (float32), tokenizer and stops, as transformers or peft load any checkpoint."""
    adapted = hasattr(model.module, "get_base_model")
    generation = getattr(model.module.get_base_model() if adapted else model.module, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = sorted(model.stop_ids)
    with quiet_libraries():
        model.module.save_pretrained(path)
        model.tokenizer.save_pretrained(path)
        if adapted and generation is not None:  # peft saves the adapter alone
            generation.save_pretrained(path)


def latest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole, every file of it read and compared with its checksum; None if there is none.

    Newer ones that are damaged are named in `Saved.damaged`. Raises UserError if all are, or if the newest was written
    by another version of the format.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_all(folder)):
        try:
            return _checked(path, dict(damaged))
        except Damaged as error:
            damaged[path] = str(error)
    if damaged:
        said = "; ".join(f"{path}: {why}" for path, why in damaged.items())
        raise UserError(
            f"no checkpoint of the run is whole ({said}): restore its files, or begin again with --overwrite"
        )
    return None


def at(folder: Path, step: int) -> Saved:
    """The checkpoint of that step, checked as `latest` does. Raises UserError if it is not there or not whole."""
    path = folder / f"step_{step:06d}"
    if not path.is_dir():
        there = ", ".join(map(str, steps(folder))) or "none"
        raise UserError(f"there is no checkpoint of step {step} in {folder}; there are: {there}")
    try:
        return _checked(path, {})
    except Damaged as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}); choose another step") from None


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that are there, whole or not."""
    return [_step_of(path) for path in _all(folder)]


def before(folder: Path, step: int) -> Saved | None:
    """The newest whole checkpoint before that step, once all others are gone that are not before it."""
    for path in _all(folder):
        if _step_of(path) >= step:
            shutil.rmtree(path)
    sync_folder(folder)
    return latest(folder)


def set_aside(saved: Saved) -> list[str]:
    """Rename the damaged checkpoints, so that nothing goes on from them or deletes a whole one in their favour.

    Returns a sentence for each.
    """
    said = []
    for path, why in saved.damaged.items():
        number = sum(1 for _ in path.parent.glob(f"{path.name}.damaged*"))
        aside = path.with_name(f"{path.name}.damaged{number or ''}")
        path.rename(aside)
        said.append(
            f"the checkpoint {path} is damaged ({why}), and is kept as {aside.name}: going on from {saved.path}"
        )
    sync_folder(saved.path.parent)
    return said


def _checked(path: Path, damaged: Mapping[Path, str]) -> Saved:
    state = _read_state(path / "state.json")
    if state.get("version") not in (IN_PARTS, VERSION, WITHOUT_SUMS):
        raise UserError(
            f"{path} has checkpoint format {state.get('version')}; this opdkit reads up to {IN_PARTS}: use the one "
            "that wrote it"
        )
    step, counters, pass_rates = state.get("step"), state.get("counters"), state.get("pass_rates")
    files = state.get("files")
    attempt, lr_factor = state.get("attempt", 1), state.get("lr_factor", 1.0)
    if type(step) is not int or path.name != f"step_{step:06d}":
        raise Damaged(f"its state.json is of step {step!r}")
    if not (_are_numbers(counters) and _are_numbers(pass_rates) and isinstance(files, list)):
        raise Damaged("its state.json has no counters, pass_rates and files")
    if type(attempt) is not int or not isinstance(lr_factor, float):
        raise Damaged("its state.json has no attempt and lr_factor")
    if state["version"] != WITHOUT_SUMS:
        check_sums(path)
    else:
        check_without_sums(path, files)
    return Saved(
        path=path,
        step=step,
        counters=counters,
        pass_rates=pass_rates,
        files=tuple(files),
        damaged=damaged,
        attempt=attempt,
        lr_factor=lr_factor,
    )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise Damaged(f"{path.name} is no JSON object")
    return state


def _are_numbers(table: Any) -> TypeGuard[dict[str, float]]:
    return isinstance(table, dict) and all(isinstance(value, int | float) for value in table.values())


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
