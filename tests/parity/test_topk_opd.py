"""Top-k on-policy distillation against the published code: five candidate sets, three weights, the sampled token.

On-policy, every case is a [method] section scored by the method's own terms. Off-policy the student has moved since
candidates and advantages were fixed; the trainer never does that (a batch is used for one update), so there each
candidate is scored by the library's clipped policy gradient, with advantages and candidates from the method's own loss.
Does not show that following these advantages is a good idea: see tests/methods/test_topk_modes.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from case_batch import CaseBatch
from torch import Tensor
from vectors import Case, load

from opdkit.losses import PolicyGradient, Term, ViewTokens, logprobs
from opdkit.losses.support import Entries, TargetScores, select
from opdkit.losses.surrogate import entry_advantages
from opdkit.methods import METHODS
from opdkit.methods.base import Method
from opdkit.methods.plan_inputs import PlanInputs

CASES = {case.id: case for case in load("topk_opd")}
SUPPORTS = {
    "only_stu": "student_topk",
    "only_tch": "teacher_topk",
    "intersection": "intersection",
    "union": "union",
    "union-intersection": "symmetric_difference",
    "sampled": "sampled",
}
WEIGHTS = {"p": "student_p", "q": "teacher_p", "uniform": "none"}
REDUCTIONS = {
    "token_mean": "token",
    "sequence_mean_of_token_mean": "sequence",
    "sequence_mean_of_token_sum": "sequence_sum",
    "token_sum_over_window": "constant",
}
CLOSED_AND_REFERENCE = pytest.mark.parametrize("gradient", ["closed_form", "autograd"])


def method_of(config: dict[str, Any]) -> Method:
    """The published configuration as the keys of [method]."""
    mixed = "outcome_weight" in config
    keys: dict[str, Any] = {
        "name": "grpo_opd" if mixed else "topk_opd",
        "form": "advantage",
        "support": SUPPORTS[config["strategy"]],
        "loss_temperature": config["student_temperature"],
        "reduction": REDUCTIONS[config["reduce"]],
    }
    if config["strategy"] != "sampled":
        keys |= {"k": config["k"], "entry_weight": WEIGHTS[config["weight"]]}
    if keys["reduction"] == "constant":
        keys["divide_by"] = 3.0  # the window of the case
    if mixed:
        assert config["divide_by_group_std"] and config["std"].startswith("unbiased")
        keys |= {"reward_weight": config["outcome_weight"], "advantage_std": "unbiased"}
        keys |= {key: config[key] for key in ("clip_low", "clip_high", "dual_clip")}
    return METHODS[keys["name"]].model_validate(keys)


class Published:
    """One case: its method, its batch, and what both sides say of the counted tokens."""

    def __init__(self, case: Case) -> None:
        self.case, self.config = case, dict(case.config)
        self.method = method_of(self.config)
        mask_BT = torch.tensor(case.inputs["mask"]).bool()
        if "format_mask" in self.config:  # rows without the answer format leave
            mask_BT = mask_BT & torch.tensor(self.config["format_mask"]).bool().unsqueeze(-1)
        self.batch = CaseBatch(mask_BT, torch.tensor(case.inputs["tokens"]).long())
        # One temperature serves both sides; where the published ones differ, the teacher's logits make up for it.
        ratio = self.config["student_temperature"] / self.config["teacher_temperature"]
        self.teacher: ViewTokens = self.batch.teacher(torch.tensor(case.inputs["teacher_logits"]) * ratio)

    def logprob(self, side: str) -> Tensor:
        """[N, V] at the loss temperature."""
        logits_NV = self.batch.flat(self.case.inputs[f"{side}_logits"])
        return logprobs.log_softmax(logits_NV / self.method.loss_temperature)

    @property
    def plan(self) -> PlanInputs:
        config, temperature = self.config, self.method.loss_temperature
        known: dict[str, Any] = {
            "sampled_logprob_N": self.batch.logprob(torch.tensor(self.case.inputs["student_logits"]), temperature)
        }
        if "rollout_weights" in self.case.inputs:
            known["weight_N"] = self.batch.flat(self.case.inputs["rollout_weights"])
        return self.batch.plan(reward=config.get("outcome_rewards"), group=config.get("groups"), **known)

    def entries(self) -> tuple[Entries, Tensor]:
        """The candidates of the student that sampled, and their advantages [N, E]."""
        assert self.teacher.hidden_NH is not None
        teacher_NV = logprobs.log_softmax(self.teacher.hidden_NH / self.method.loss_temperature)
        student_NV, support = self.logprob("student"), self.method.loss.support
        entries = select(support, student_NV, None, TargetScores(teacher_NV), self.batch.ids_N)
        if support.kind == "sampled":
            assert entries.teacher_nE is not None
            return entries, entries.teacher_nE - entries.student_nE
        return entries, entry_advantages(self.method.loss, entries)


@CLOSED_AND_REFERENCE
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "on_policy" in case.outputs])
def test_on_policy(name: str, gradient: str) -> None:
    """Loss, loss per token and gradient of the method's own terms."""
    published = Published(CASES[name])
    case, batch, method = published.case, published.batch, published.method
    terms, expected = method.terms(published.plan), case.outputs["on_policy"]
    out, grad_BTV = batch.learn(
        terms, case.inputs["student_logits"], published.teacher, temperature=method.loss_temperature, gradient=gradient
    )
    case.check("loss", out.loss.item(), expected=expected["loss"])
    per_token_BT = batch.padded(torch.stack([out.token_loss[term.name] for term in terms]).sum(0))
    case.check("per_token", per_token_BT, where=batch.mask_BT, expected=expected["per_token"])
    check_gradient(case, expected["grad"], grad_BTV)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "candidate_ids" in case.outputs])
def test_candidates_and_advantages(name: str) -> None:
    """Both lists, their overlap, and the advantage of every candidate; published fillers have advantage 0."""
    published = Published(CASES[name])
    case, (entries, advantage_NE) = published.case, published.entries()
    k = published.config["k"]
    assert published.teacher.hidden_NH is not None
    lists = {
        "student_top_k_ids": published.logprob("student").topk(k).indices,
        "teacher_top_k_ids": published.teacher.hidden_NH.topk(k).indices,
    }
    for output, ids_NK in lists.items():
        assert published.batch.flat(case.outputs[output]).tolist() == ids_NK.tolist()
    overlap_N = (lists["student_top_k_ids"].unsqueeze(-1) == lists["teacher_top_k_ids"].unsqueeze(-2)).sum((-1, -2))
    assert published.batch.flat(case.outputs["overlap_count"]).tolist() == overlap_N.tolist()
    ids_BTC, advantage_BTC = (published.batch.flat(case.outputs[key]) for key in ("candidate_ids", "advantages"))
    assert entries.ids_nE is not None
    valid_NE = torch.ones_like(entries.ids_nE).bool() if entries.valid_nE is None else entries.valid_nE
    for token, valid_E in enumerate(valid_NE):
        ours = summed(entries.ids_nE[token][valid_E], advantage_NE[token][valid_E])
        wanted = summed(ids_BTC[token], advantage_BTC[token])
        assert len(ours) == valid_E.sum() and set(ours) <= set(wanted)  # no candidate twice
        case.check("advantages", [ours.get(i, 0.0) for i in wanted], expected=list(wanted.values()))


def summed(ids_C: Tensor, advantage_C: Tensor) -> dict[int, float]:
    """Advantage by id: one that is in both published lists has its advantage in one of them and 0 in the other."""
    total: dict[int, float] = {}
    for i, advantage in zip(ids_C.tolist(), advantage_C.tolist(), strict=True):
        total[int(i)] = total.get(int(i), 0.0) + advantage
    return total


@CLOSED_AND_REFERENCE
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "off_policy" in case.outputs])
def test_off_policy(name: str, gradient: str) -> None:
    """The student has moved: each candidate's clipped ratio, summed, through the head."""
    published = Published(CASES[name])
    entries, advantage_NE = published.entries()
    check_moved(published, entries, advantage_NE, entries.student_nE, "off_policy", gradient)


@CLOSED_AND_REFERENCE
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "off_policy_as_published" in case.outputs])
def test_off_policy_with_the_wrong_old_values(name: str, gradient: str) -> None:
    """The published only_tch compares the teacher's candidates with the student's: so do we when told to."""
    published = Published(CASES[name])
    entries, advantage_NE = published.entries()
    wrong_NE = published.logprob("student").topk(published.config["k"]).values
    check_moved(published, entries, advantage_NE, wrong_NE, "off_policy_as_published", gradient)


def check_moved(
    published: Published, entries: Entries, advantage_NE: Tensor, old_NE: Tensor, output: str, gradient: str
) -> None:
    case, batch, method = published.case, published.batch, published.method
    clips = PolicyGradient(**{key: published.config[key] for key in ("clip_low", "clip_high", "dual_clip")})
    (term,) = method.terms(published.plan)
    assert entries.ids_nE is not None
    loss, per_token_N, grad_BTV = 0.0, torch.zeros(len(batch.ids_N), dtype=torch.float64), torch.zeros(())
    for ids_N, advantage_N, old_N in zip(entries.ids_nE.T, advantage_NE.T, old_NE.T, strict=True):
        moved = Term(name="entry", loss=clips, coef_N=term.coef_N, advantage_N=advantage_N, old_logprob_N=old_N)
        out, grad = batch.learn(
            [moved],
            case.inputs["updated_student_logits"],
            ids_N=ids_N,
            temperature=method.loss_temperature,
            gradient=gradient,
        )
        loss, per_token_N, grad_BTV = loss + out.loss.item(), per_token_N + out.token_loss["entry"], grad_BTV + grad
    expected = case.outputs[output]
    case.check("loss", loss, expected=expected["loss"])
    if "per_token" in expected:
        case.check("per_token", batch.padded(per_token_N), where=batch.mask_BT, expected=expected["per_token"])
    check_gradient(case, expected["grad"], grad_BTV)


def check_gradient(case: Case, expected: dict[str, Any], grad_BTV: Tensor) -> None:
    """As `Case.check_gradient`, for a gradient that stands inside another output."""
    replace(case, outputs={"grad": expected}).check_gradient("grad", grad_BTV)


def test_all_cases_are_read() -> None:
    """The file is whole: 22 cases, each of them scored above. Its README states the count."""
    assert len(CASES) == 22
    assert all({"on_policy", "off_policy"} & set(case.outputs) for case in CASES.values())
