"""Disk, memory and time of the whole run, from the parts that were made and the answers that were sampled."""

from __future__ import annotations

import os
import shutil

import torch

from opdkit.cost import at_hand
from opdkit.cost.devices import Device, device_named
from opdkit.cost.plan import plan as make_plan
from opdkit.cost.work import Lengths
from opdkit.doctor.findings import Finding, failed, not_checked, passed, warned
from opdkit.doctor.patient import Patient
from opdkit.errors import UserError
from opdkit.run.rows import save_rows
from opdkit.training.batch import Batch
from opdkit.training.metrics.taught import without_hidden_states
from opdkit.training.models.viewers import state_of

GIB = 2**30
MOMENTS = {"adamw": 8, "adamw_8bit": 2, "muon": 4}  # bytes a trained parameter
LEAST_INODES = 10_000
LONG_DAYS = 7.0  # our choice
NEARLY = 0.9  # of the room: the estimates are no better


def disk(patient: Patient) -> Finding:
    """Checkpoints, rows and what a sampler is handed have room where the run is written."""
    recipe, folder = patient.recipe, patient.folder
    free = shutil.disk_usage(folder).free
    inodes = os.statvfs(folder)
    checkpoint, rows = _checkpoint_bytes(patient), _rows_bytes(patient)
    kept = recipe.train.keep_checkpoints + 1  # the next one is whole before the oldest goes
    parts = {
        f"{kept} checkpoints": kept * checkpoint,
        "rows": rows,
        "spool": recipe.spool.max_gib * GIB if recipe.spool else 0,
        "weights for the sampler": 2 * checkpoint / 3 if recipe.sampling.engine == "server" else 0,
    }
    needed = sum(parts.values())
    lines = [f"{name}: {_gib(size)}" for name, size in parts.items() if size]
    said = f"about {_gib(needed)} of {_gib(free)} free in {recipe.runs_dir}"
    fix = "train.keep_checkpoints, train.save_rows_every, spool.max_gib, or another runs_dir"
    if inodes.f_files and inodes.f_favail < LEAST_INODES:
        return failed(f"{recipe.runs_dir} has room for {inodes.f_favail} more files", "delete files, or choose another")
    if needed > free:
        return failed(said, fix, lines)
    return warned(said, fix, lines) if needed > NEARLY * free else passed(said, lines)


def _checkpoint_bytes(patient: Patient) -> float:
    """Of one: the student, the optimizer's state, what teachers keep."""
    parts, train = patient.run.parts, patient.recipe.train
    weights = parts.optimizer.weights
    trained = sum(weight.numel() for weight in weights.values())
    saved = (
        [*weights.values()] if hasattr(parts.student.module, "peft_config") else [*parts.student.module.parameters()]
    )
    own = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in state_of(parts.viewers).values())
    return own + kept + MOMENTS[train.optimizer] * trained


def _rows_bytes(patient: Patient) -> float:
    """Of all steps' rows, as these are written, by their tokens."""
    train, sampling, rows = patient.recipe.train, patient.recipe.sampling, patient.rows
    if not train.save_rows_every:
        return 0.0
    file = patient.folder / "rows.parquet"
    save_rows(file, without_hidden_states(rows, Batch(rows, patient.state.student.device), {}))
    tokens = sum(len(row.rollout.answer_ids) for row in rows)
    a_step = train.problems_per_step * sampling.group_size * patient.recipe.longest_answer
    return file.stat().st_size / max(1, tokens) * a_step * (train.steps // train.save_rows_every)


def memory(patient: Patient) -> Finding:
    """`opdkit plan` of this recipe, for this machine: what is needed at the worst moment of a step."""
    recipe, device = patient.recipe, _device(patient)
    prompts = [len(row.rollout.prompt_ids) for row in patient.rows]
    lengths = Lengths(prompt=sum(prompts) // max(1, len(prompts)))
    try:
        found = make_plan(recipe, patient.sizes, device=device, lengths=lengths)
    except UserError as error:
        return not_checked(f"opdkit plan cannot say: {error}")
    said = (
        f"about {_gib(found.peak)} at {found.peak_moment}, with answers of {recipe.longest_answer} tokens; "
        f"{device.name} has {_gib(device.usable)}"
    )
    fix = "`opdkit plan` on this recipe lists what would save how much"
    if found.peak > device.usable:
        return failed(said, fix)
    return warned(said, fix) if found.peak > NEARLY * device.usable else passed(said)


def _device(patient: Patient) -> Device:
    device = patient.state.student.device
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / GIB
        return device_named(f"{gib:.1f}GB")
    return Device(name="this machine", capacity=at_hand.machine_bytes(), is_cpu=True)


def duration(patient: Patient) -> Finding:
    """Seconds of a step and of the run, from what these answers took; of whole batches on a GPU it is the most."""
    recipe, rows = patient.recipe, patient.rows
    assert patient.gradients is not None
    of_answers = max(1, sum(len(row.rollout.answer_ids) for row in rows))
    of_rows = max(1, sum(len(row.rollout.prompt_ids) + len(row.rollout.answer_ids) for row in rows))
    some = patient.few_rows
    learned = max(1, sum(len(row.rollout.prompt_ids) + len(row.rollout.answer_ids) for row in some))
    prompt = sum(len(row.rollout.prompt_ids) for row in rows) / max(1, len(rows))
    num = recipe.train.problems_per_step * recipe.sampling.group_size
    answer = recipe.longest_answer
    took = {
        "sample": patient.seconds["sample"] / of_answers * num * answer,
        "score": patient.seconds["score"] / of_rows * num * (prompt + answer),
        "learn": patient.seconds["learn"] / learned * num * (prompt + answer),
    }
    step = sum(took.values())
    days = step * recipe.train.steps / 86400
    parts = ", ".join(f"{name} {_time(seconds)}" for name, seconds in took.items())
    said = (
        f"at most {_time(step)} a step ({parts}) and {_time(days * 86400)} for {recipe.train.steps} steps, were every "
        f"answer {answer} tokens long and a batch as slow as these {len(rows)} rows"
    )
    if days > LONG_DAYS:
        return warned(said, "train.steps, train.problems_per_step, sampling.max_answer_tokens, or sampling.engine")
    return passed(said)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
