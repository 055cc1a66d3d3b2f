"""A server against the same model in this process, on the rows of the recipe."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from opdkit.doctor.findings import Finding, failed, not_checked, passed
from opdkit.doctor.patient import Patient
from opdkit.engines.hf import HFEngine
from opdkit.engines.model import LanguageModel
from opdkit.engines.servers.probe import LIMITS
from opdkit.recipe.model_sections import TeacherSection
from opdkit.training.models.base_teacher import Teacher
from opdkit.types import Asked, Example, base_name

SHARE_OF_MEMORY = 0.5  # of this machine, that a served model may take here
SAMPLED, TOP = Asked("sampled"), Asked("topk", 1)


def server_and_local(patient: Patient) -> Finding:
    """What servers say of real rows is what their models say here; the student's sampler is proved when it starts."""
    state, views = patient.state, patient.recipe.all_views
    assert patient.engine is not None  # raises where the student's own server is not the student
    served = {name: view.teacher for name, view in views.items() if view.teacher.kind == "server"}
    if not served:
        if patient.recipe.sampling.engine == "hf":
            return not_checked("no server")
        return passed("the sampler's log-probs are the student's: proved when the weights were sent there")
    said = []
    for name, section in served.items():
        rows = [row for row in patient.rows for read, view in row.views.items() if (view.by or base_name(read)) == name]
        rows = rows[: patient.dose.learned_rows]
        if not rows:
            return not_checked(f"the view {name!r} read nothing here")
        if (why := _too_large(section)) is not None:
            return not_checked(f"{section.path} was not loaded beside its server: {why}; the server was proved against "
                               "itself when it was opened")  # fmt: skip
        mean, most = _gap(patient, name, section, state.viewers[name].teacher, rows)
        limits = LIMITS[getattr(torch, section.dtype or patient.recipe.model.dtype)]
        if not (mean <= limits[0] and most <= limits[1]):
            return failed(
                f"the server of {name!r} says other log-probs than {section.path} here: off by {mean:.2g} nats in the "
                f"mean, {most:.2g} at most, where {limits[0]:g} and {limits[1]:g} are rounding",
                "serve what teacher.path names, in the same dtype, not quantised, with --generation-config vllm",
            )
        said.append(f"{name}: off by {mean:.1e} nats in the mean, {most:.1e} at most")
    return passed("; ".join(said))


def _gap(
    patient: Patient, name: str, section: TeacherSection, teacher: Teacher, rows: list[Example]
) -> tuple[float, float]:
    """(mean, largest) difference of the log-probs that both say of the answers' tokens."""
    contexts = [
        next(v.context_ids for read, v in row.views.items() if (v.by or base_name(read)) == name) for row in rows
    ]
    answers = [row.rollout.answer_ids for row in rows]
    assert section.path is not None
    local = LanguageModel.load(
        section.path,
        dtype=getattr(torch, section.dtype or patient.recipe.model.dtype),
        device=patient.state.student.device,
        trust_remote_code=section.trust_remote_code,
        chat_template=section.chat_template,
    )
    local.limit_to(patient.state.student.num_tokens, patient.state.student.absent_ids)
    asked = SAMPLED if teacher.can_say(SAMPLED) else TOP
    theirs, ours = (
        teacher.score(contexts, answers, asked, temperature=1.0),
        HFEngine(local).score(contexts, answers, asked, temperature=1.0),
    )
    gaps = []
    for their, our in zip(theirs, ours, strict=True):
        pair = (their.sampled_logprob_T, our.sampled_logprob_T)
        if pair[0] is None or pair[1] is None:
            pair = (their.topk_logprob_TK, our.topk_logprob_TK)
        assert pair[0] is not None and pair[1] is not None
        their_N, our_N = pair[0].astype(np.float64).ravel(), pair[1].astype(np.float64).ravel()
        is_said_N = ~np.isnan(our_N)
        gaps.append(np.nan_to_num(np.abs(their_N - our_N)[is_said_N], nan=np.inf))  # a server's NaN is no agreement
    gap_N = np.concatenate(gaps)
    return (float(gap_N.mean()), float(gap_N.max())) if len(gap_N) else (np.nan, np.nan)


def _too_large(section: TeacherSection) -> str | None:
    """Why a served model is not loaded here too; None: it can be."""
    path = Path(str(section.path)).expanduser()
    if not path.is_dir():
        return "its weights are not in a folder of this machine"
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * SHARE_OF_MEMORY
    if torch.cuda.is_available():
        room = min(room, torch.cuda.mem_get_info()[0] * SHARE_OF_MEMORY)
    return None if size <= room else f"{size / 2**30:.0f} GiB are more than there is room for"
