"""Checkpoints that are whole or not there: everything a resumed run needs to continue to the same bits.

    checkpoints/step_000100/model/                 Hugging Face format (a LoRA student: its adapter), float32
                            optimizer.safetensors  "<parameter>/<what>"
                            teacher.safetensors    only for teachers that have a state (initial, ema)
                            state.json             {"version", "step", "counters", "pass_rates"}

There is no random state to save: every seed comes from identity (seed, step, problem, sample).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.train.run_folder import sync_folder

VERSION = 1
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    step: int
    counters: Mapping[str, float]
    pass_rates: Mapping[str, float]

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    files: tuple[str, ...]  # "optimizer", "teacher": what was written

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Raises UserError if a file that was written is no longer there."""
        file = self.path / f"{name}.safetensors"
        if name not in self.files:
            return {}
        if not file.exists():
            raise UserError(
                f"{file} is missing: the checkpoint is not whole; remove its folder to go on from an older one"
            )
        return load_file(file)


def save(
    folder: Path,
    *,
    step: int,
    model: LanguageModel,
    optimizer: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    counters: Mapping[str, float],
    pass_rates: Mapping[str, float],
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXX` atomically, then remove all but the newest `keep`. Raises UserError on a full disk."""
    target, unfinished = folder / f"step_{step:06d}", folder / f".unfinished-step_{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_model(model, unfinished / "model")
        files = [name for name, tensors in (("optimizer", optimizer), ("teacher", teacher)) if tensors]
        for name, tensors in (("optimizer", optimizer), ("teacher", teacher)):
            if tensors:
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, unfinished / f"{name}.safetensors"
                )
        state = {"version": VERSION, "step": step, "counters": dict(counters), "pass_rates": dict(pass_rates)}
        state["files"] = files
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        _sync(unfinished)
        if target.exists():  # a run that was resumed from an older checkpoint writes this one anew
            shutil.rmtree(target)
        unfinished.rename(target)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = latest(folder)
        safe = (
            f"the last complete checkpoint is {kept.path}; make room and go on with --resume" if kept else "make room"
        )
        raise UserError(f"checkpoint {target} could not be written ({error}); {safe}") from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def save_model(model: LanguageModel, path: Path) -> None:
    """Weights as they are trained (float32), tokenizer and stops, as transformers or peft load any checkpoint."""
    adapted = hasattr(model.module, "get_base_model")
    generation = getattr(model.module.get_base_model() if adapted else model.module, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = sorted(model.stop_ids)
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    if adapted and generation is not None:  # peft saves the adapter alone
        generation.save_pretrained(path)


def latest(folder: Path) -> Saved | None:
    """The newest complete checkpoint. Raises UserError if it was written by another version of the format."""
    complete = _all(folder)
    if not complete:
        return None
    path = complete[-1]
    state = json.loads((path / "state.json").read_text())
    if state["version"] != VERSION:
        raise UserError(
            f"{path} has checkpoint format {state['version']}; this opdkit reads {VERSION}: use the one that wrote it"
        )
    return Saved(
        path=path,
        step=state["step"],
        counters=state["counters"],
        pass_rates=state["pass_rates"],
        files=tuple(state["files"]),
    )


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
