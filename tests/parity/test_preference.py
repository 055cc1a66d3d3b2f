"""DPO, SimPO and verified SFT against the published code: loss, metrics and gradient, through the methods' own terms.

What the student and the reference say of the sampled tokens comes from `head_stats`, as in a step. Does not show that
the published pairs, drawn inside a micro-batch, are all pairs of a batch: these cases have one micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case_batch import CaseBatch, of_lengths
from vectors import Case, load

from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs

CASES = {case.id: case for case in load("preference")}
METRICS = {"num_pairs": "num_pairs", "accuracy": "pair_accuracy", "reward_margin": "score_gap", "logits": "pair_logit"}


def method_of(config: dict[str, Any]) -> Method:
    """The published configuration as the keys of [method]."""
    keys: dict[str, Any] = {"name": config["method"]}
    if config["method"] == "verified_sft":
        keys["success_threshold"] = config["success_threshold"]
        keys["reduction"] = "sequence" if config["length_normalize"] else "sequence_sum"
    else:
        keys |= {"beta": config["beta"], "label_smoothing": config["label_smoothing"]}
        if config["method"] == "simpo":
            keys["margin"] = config["gamma"]
    return METHODS[keys["name"]].model_validate(keys)


def batch_of(case: Case) -> tuple[CaseBatch, PlanInputs]:
    student_BTV = torch.tensor(case.inputs["student_logits"])
    tokens_BT = torch.tensor(case.inputs["tokens"]).long()
    batch = CaseBatch(of_lengths(case.inputs["lengths"], tokens_BT.shape[1]), tokens_BT)
    plan = batch.plan(
        reward=case.inputs["rewards"],
        group=case.inputs["group"].tolist() if "group" in case.inputs else None,
        student_logprob_N=batch.logprob(student_BTV),
        view_logprob={"teacher": batch.logprob(case.inputs["reference_logits"])},
    )
    return batch, plan


@pytest.mark.parametrize("gradient", ["closed_form", "autograd"])
@pytest.mark.parametrize("name", CASES)
def test_published_preference(name: str, gradient: str) -> None:
    """The reported loss is the published one, and the terms have its gradient. SFT's terms have its value too."""
    case = CASES[name]
    method, (batch, plan) = method_of(dict(case.config)), batch_of(case)
    out, grad_BTV = batch.learn(method.terms(plan), case.inputs["student_logits"], gradient=gradient)
    report = method.report(plan)
    case.check("loss", out.loss.item() if report.loss is None else report.loss)
    case.check_gradient("grad", grad_BTV)
    if case.config["method"] == "verified_sft":
        assert report.numbers["num_right_answers"] == case.outputs["metrics"]["num_success"]
        return
    for published, ours in METRICS.items():
        got = report.numbers[ours]
        if got is None:  # no pairs: a mean over nothing, which the published code writes as 0
            assert case.config["pairs"] == 0 and case.outputs["metrics"].get(published, 0.0) == 0.0
            continue
        got = float(np.float32(got)) if published == "accuracy" else got  # a float32 mean there
        case.check(f"metrics.{published}", got, expected=case.outputs["metrics"][published])


def test_pairs_do_not_depend_on_micro_batches() -> None:
    """The coefficients are made over the batch, so cutting it between the two answers of a pair changes nothing."""
    case = CASES["pub.pref.dpo.beta0.1"]
    method, (batch, plan) = method_of(dict(case.config)), batch_of(case)
    (term,) = method.terms(plan)
    whole = batch.learn([term], case.inputs["student_logits"])[1]
    parts = torch.zeros_like(whole)
    for row in range(len(whole)):
        rows_BT = batch.mask_BT & (torch.arange(len(whole)) == row).unsqueeze(-1)
        part = CaseBatch(rows_BT, batch.ids_BT)
        parts += part.learn([term.take(plan.row_N == row)], case.inputs["student_logits"])[1]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)


def test_all_cases_are_read() -> None:
    """The file is whole: 8 cases. Its README states the count."""
    assert len(CASES) == 8
