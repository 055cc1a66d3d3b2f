"""SDPO and MOPD against the published code: the loss in all its settings, trust-region mixing, the teacher's average.

Each case is a [method] section, scored by the method's own terms. Rows with sample_mask 0 leave the batch, as in a
step.
Does not show who is shown to whom (`test_peers.py`), nor that the published ratio is of use: there it compares with
log-probs recomputed before the update, here with the sampler's, and the cases say which numbers those are.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from case_batch import CaseBatch, identity, of_lengths
from torch import Tensor
from vectors import Case, load

from opdkit.losses import ViewTokens, weights
from opdkit.losses.heads import mixed_head
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.training.models.teacher import EMATeacher

CASES = {case.id: case for case in load("sdpo_mopd")}
AVERAGES = [name for name in CASES if ".ema." in name]
MICRO_BATCHES = "pub.sdpo.micro_batches"
LOSSES = [name for name in CASES if name not in (*AVERAGES, MICRO_BATCHES)]
TAILS = {"tail": "bucket", "renormalise": "renormalise"}
REDUCTIONS = {
    "token_mean": "token",
    "sequence_mean_of_token_mean": "sequence",
    "sequence_mean_of_token_sum": "sequence_sum",
    "token_sum_over_window": "constant",
}


def method_of(config: dict[str, Any], window: int, **changes: Any) -> Method:
    """The published configuration as the keys of [method]."""
    sampled = config["support"] == "sampled"
    keys: dict[str, Any] = {
        "name": "mopd",
        "divergence": "reverse_kl" if sampled else config["divergence"],
        "support": config["support"],
        "loss_temperature": config["temperature"],
        "reduction": REDUCTIONS[config["reduce"]],
    }
    if config["divergence"] == "jsd":
        keys["teacher_share"] = config["teacher_weight"]
        keys["jsd_scale"] = "published"
    if config["support"] == "student_topk":
        keys |= {"k": config["k"], "tail": TAILS[config["rest"]]}
    if config["is_clip"] is not None:
        keys["importance_cap"] = config["is_clip"]
    if keys["reduction"] == "constant":
        keys["divide_by"] = float(window)
    return METHODS["mopd"].model_validate(keys | changes)


def batch_of(case: Case) -> tuple[CaseBatch, PlanInputs]:
    """What stays in the batch, and what is known of it."""
    config, inputs = case.config, case.inputs
    tokens_BT = torch.tensor(inputs["tokens"]).long()
    mask_BT = of_lengths(inputs["lengths"], tokens_BT.shape[1])
    batch = CaseBatch(mask_BT & torch.tensor(config["sample_mask"]).bool().unsqueeze(-1), tokens_BT)
    logprob_N = batch.logprob(torch.tensor(inputs["student_logits"]), config["temperature"])
    offset_N = batch.flat(inputs["old_log_prob_offset"]) if config["old_policy"] == "offset" else 0.0
    known: dict[str, Any] = {"student_logprob_N": logprob_N, "sampled_logprob_N": logprob_N - offset_N}
    plan = batch.plan(**known)
    if config["rollout_is"] is not None:
        log_ratio_N = batch.flat(inputs["rollout_log_ratio"])
        known["weight_N"] = weights.importance(log_ratio_N, plan.row_N, "token", config["rollout_is"], mean_one=False)
    return batch, batch.plan(**known)


def teacher_of(case: Case, batch: CaseBatch) -> ViewTokens:
    reference_NV, student_NV = batch.flat(case.inputs["teacher_logits"]), batch.flat(case.inputs["student_logits"])
    head, share = identity(reference_NV.shape[-1]), case.config["teacher_mix"]
    if share is None:
        return ViewTokens(hidden_NH=reference_NV, head=head)
    return ViewTokens(hidden_NH=torch.cat([reference_NV, student_NV], -1), head=mixed_head(head, head, share))


@pytest.mark.parametrize("gradient", ["closed_form", "autograd"])
@pytest.mark.parametrize("name", LOSSES)
def test_published_loss(name: str, gradient: str) -> None:
    """Loss, loss per token with its weight, capped ratios and gradient."""
    case = CASES[name]
    (batch, plan), window = batch_of(case), case.inputs["tokens"].shape[1]
    method = method_of(dict(case.config), window)
    (term,) = method.terms(plan)
    teacher, temperature = teacher_of(case, batch), method.loss_temperature
    out, grad_BTV = batch.learn(
        [term], case.inputs["student_logits"], teacher, temperature=temperature, gradient=gradient
    )
    case.check("loss", out.loss.item())
    case.check_gradient("grad", grad_BTV)
    weight_N = term.coef_N / plan.coefficients(method.reduction, divide_by=method.divide_by) * plan.weight_N
    if "ratio" in case.outputs:
        case.check("ratio", batch.padded(weight_N / plan.weight_N), where=batch.mask_BT)
    per_token_BT = batch.padded(weight_N * out.token_loss[term.name])
    if case.config.get("step_level"):
        per_token_BT = mean_over_steps(per_token_BT, batch.mask_BT, case.config["step_ids"])
    case.check("per_token", per_token_BT, where=batch.mask_BT)


def mean_over_steps(loss_BT: Tensor, mask_BT: Tensor, step_ids: list[list[int]]) -> Tensor:
    """What the published step-level loss writes for each token. Its sums and means are the token-level ones."""
    averaged_BT = loss_BT.clone()
    for row, steps in enumerate(torch.tensor(step_ids)):
        for step in steps[mask_BT[row]].unique():
            averaged_BT[row, steps == step] = loss_BT[row, steps == step].mean()
    return averaged_BT


def test_published_micro_batches() -> None:
    """Token means in micro-batches of one row are our mean over rows; one batch gives our mean over tokens."""
    case = CASES[MICRO_BATCHES]
    batch, plan = batch_of(case)
    for reduction, suffix in (("sequence", "as_published"), ("token", "one_batch")):
        method = method_of(dict(case.config), 0, reduction=reduction)
        out, grad_BTV = batch.learn(method.terms(plan), case.inputs["student_logits"], teacher_of(case, batch))
        case.check(f"loss_{suffix}", out.loss.item())
        case.check_gradient(f"grad_{suffix}", grad_BTV)


@pytest.mark.parametrize("name", AVERAGES)
def test_published_average(name: str) -> None:
    """The teacher's weights after each of three steps, from a teacher that began elsewhere than the student."""
    case = CASES[name]
    student, teacher, step = (
        {key: torch.tensor(value) for key, value in case.inputs[which].items()}
        for which in ("student", "teacher", "student_step")
    )
    optimizer: Any = SimpleNamespace(weights=student, compute_weights=lambda: None)
    average = EMATeacher(SimpleNamespace(adapter_off=nullcontext), None, optimizer, 1, rate=case.config["update_rate"])  # type: ignore[arg-type]
    average.load_state(teacher)
    for expected in case.outputs["teacher_after_step"]:
        for key, weight in student.items():
            weight += step[key]
        average.after_step()
        for key, wanted in expected.items():
            case.check(f"teacher.{key}", average.average[key], expected=np.asarray(wanted))


def test_all_cases_are_read() -> None:
    """The file is whole: 22 cases. Its README states the count."""
    assert len(CASES) == 22
