"""What learning reaches, and whether it depends on how rows are put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from opdkit.doctor.findings import Finding, failed, not_checked, passed, warned
from opdkit.doctor.learning import gradients_of, is_expert
from opdkit.doctor.patient import Patient
from opdkit.engines.forward.passes import Passes
from opdkit.engines.model import LanguageModel
from opdkit.engines.prove import EXACT, LOW_ORDINARY
from opdkit.training.models.lora import ROUTERS
from opdkit.types import base_name

LIMITS = {"float64": EXACT, "float32": EXACT, "bfloat16": LOW_ORDINARY, "float16": LOW_ORDINARY}  # of their size
ROWS_ALONE = Passes(1, 0, None)  # every row goes alone, since a row is longer
LEAST_ADAPTED = 0.5  # our choice; attention alone is a quarter, and learns less (LoRA Without Regret, 2025)


def reached(patient: Patient) -> Finding:
    """Every trainable tensor gets a gradient; experts that no token of so few was sent to are listed."""
    state, found = patient.state, patient.gradients
    names = [*state.optimizer.weights]
    first_of_pair = {name for name in names if ".lora_A." in name}  # the second one begins at 0
    silent = [name for name in (*found.none, *found.zero) if name not in first_of_pair]
    silent += [name for name in found.none if name in first_of_pair]
    experts, lost = [n for n in silent if is_expert(n)], [n for n in silent if not is_expert(n)]
    if found.broken:
        return failed(f"{len(found.broken)} gradients are not finite (first: {found.broken[0]})",
                      'model.dtype = "float32" shows whether it is the precision; else the checkpoint is damaged',
                      found.broken[:20])  # fmt: skip
    if lost:
        return failed(
            f"{len(lost)} of {len(names)} trainable tensors get no gradient (first: {lost[0]})",
            "they are not used, or cut off from the loss; leave them out of what is trained (model.lora), or report it",
            lost[:20],
        )
    frozen = _frozen(patient)
    if frozen:
        return warned(
            f"{len(frozen)} tensors of the text model are not trained (first: {frozen[0]})",
            "the checkpoint or its code has frozen them; load a plain copy",
            frozen[:20],
        )
    lines = [f"no token here visited {name}" for name in experts]
    lines += [f"no token here visited {num} experts of {name}" for name, num in found.empty_experts.items()]
    said = f"{len(names)} trainable tensors get a gradient"
    return passed(f"{said}; {len(lines)} with experts that no token visited" if lines else said, lines[:20])


def _frozen(patient: Patient) -> list[str]:
    """Of a student that is trained whole: what is not."""
    student = patient.state.student
    if hasattr(student.module, "peft_config"):
        return []
    return [name for name, parameter in student.body.named_parameters() if not parameter.requires_grad]


def micro_batches(patient: Patient) -> Finding:
    """The gradient does not depend on which rows go through together: as the recipe has it against each row alone."""
    rows = patient.few_rows
    together, alone = patient.gradients, gradients_of(replace(patient.state, passes=ROWS_ALONE), rows)
    off = {name: _share(alone.kept[name], grad) for name, grad in together.kept.items() if name in alone.kept}
    worst = max(off, key=lambda name: off[name], default="")
    limit = LIMITS[patient.recipe.model.dtype]
    sizes = abs(together.norm - alone.norm) / max(together.norm, 1e-12)
    said = f"{len(rows)} rows: gradient {together.norm:.4g} together, {alone.norm:.4g} one by one"
    if not (sizes <= limit and all(value <= limit for value in off.values())):
        return failed(
            f"{said}; {worst} is off by {off.get(worst, 0.0):.2g} of its size, where {limit:g} is rounding",
            "train.share_prefixes = false or another model.attn_implementation shows where it comes from",
        )
    return passed(f"{said}; off by {off.get(worst, 0.0):.1e} at most")


def packing(patient: Patient) -> Finding:
    """Rows one behind the other in one pass have the hidden states of each row alone, in every model that reads so."""
    return _states_alike(patient, None, "packed one behind the other")


def prefix_sharing(patient: Patient) -> Finding:
    """What rows begin with is read once, and they have the hidden states of each row alone."""
    return _states_alike(patient, 2, "with what they begin with read once")


def _states_alike(patient: Patient, least_shared: int | None, how: str) -> Finding:
    said = []
    for model, contexts, answers in _readings(patient):
        if not model.is_packed:
            said.append(f"{model.name} is read in padded passes")
            continue
        weights = patient.weights if model is patient.state.student else None
        with torch.no_grad():
            ours = model.hidden(contexts, answers, weights=weights, passes=Passes(1 << 30, 0, least_shared))
            alone = patient.alone(model, contexts, answers, weights)
        off, limit = _share(ours, alone), LIMITS[str(ours.dtype).removeprefix("torch.")]
        if not off <= limit:
            return failed(
                f"{model.name}: {len(answers)} rows {how} have other hidden states than each alone (off by {off:.2g} "
                f"of their size, where {limit:g} is rounding)",
                "train.share_prefixes = false, or another model.attn_implementation; please report the model",
            )
        said.append(f"{model.name} off by {off:.1e}")
    return passed(f"rows {how}: {'; '.join(said)}")


def _readings(patient: Patient) -> Iterator[tuple[LanguageModel, list[tuple[int, ...]], list[tuple[int, ...]]]]:
    """What each loaded model reads of some rows: (model, contexts, answers)."""
    rows, state, most = patient.few_rows, patient.state, patient.dose.learned_tokens
    yield state.student, [row.rollout.prompt_ids for row in rows], [row.rollout.answer_ids for row in rows]
    for view, viewer in state.viewers.items():
        model, teacher = viewer.teacher.loaded_model, viewer.teacher
        if model is None or model is state.student or teacher.spread is not None:
            continue
        read = [(row.views[name], row.rollout) for row in patient.rows for name in row.views
                if (row.views[name].by or base_name(name)) == view]  # fmt: skip
        fitting = [(v.context_ids, r.answer_ids) for v, r in read if teacher.fits(v.context_ids, r.answer_ids)]
        if some := fitting[: patient.dose.learned_rows]:
            yield model, [context for context, _ in some], [answer[:most] for _, answer in some]


def lora_coverage(patient: Patient) -> Finding:
    """Adapters are on most of the layers' weights."""
    if patient.recipe.model.lora is None:
        return not_checked("no [model.lora]")
    student = patient.state.student
    adapted = total = 0
    left: dict[str, None] = {}
    for name, part in student.body.named_modules():
        words = name.split(".")
        if any(word.startswith("lora_") for word in words) or is_expert(name) or words[-1] in ROUTERS:
            continue
        is_adapted = hasattr(part, "lora_A")
        if isinstance(part, torch.nn.Linear) or is_adapted:
            if words[-1] == "base_layer":
                continue
            weight = part.base_layer.weight if is_adapted else part.weight
            total += weight.numel()
            adapted += weight.numel() if is_adapted else 0
            if not is_adapted:
                left[words[-1]] = None
    share = adapted / max(1, total)
    said = f"adapters on {share:.0%} of the layers' matrices"
    if share < LEAST_ADAPTED:
        return warned(
            f"{said}; without one: {', '.join(left)}",
            'model.lora.target_modules = "all-linear": attention alone learns less than MLPs do',
            student.notes,
        )
    return passed(said, [note for note in student.notes if note.startswith("LoRA")])


def _share(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm; 0 of nothing."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
