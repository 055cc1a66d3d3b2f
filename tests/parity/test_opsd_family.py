"""OPSD, its sampled-token form, PW-OPSD, EOPD and REOPOLD against the published code: 21 cases, through the methods.

Each case's settings are written as recipe keys; values per token, loss and gradient must be the published ones, by both
gradient paths. The published OPSD and PW-OPSD clip every vocabulary entry, which is `clip = "entry"` here and not the
default (`tests/losses/test_clip.py` says why).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_batch import PublishedBatch, method_of
from vectors import Case, load

from opdkit.losses import weights
from opdkit.methods.base import Method

CASES = {case.id: case for case in load("opsd_family")}
REDUCTIONS = {"token_mean": "token", "sequence_mean_of_token_mean": "sequence", "kept_token_mean": "token"}
both_paths = pytest.mark.parametrize("gradient", ["closed_form", "autograd"])


def cases(*words: str) -> Any:
    """Parametrizes by the cases whose id holds one of the words."""
    return pytest.mark.parametrize("name", [name for name in CASES if any(word in name for word in words)])


def divergence_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Direction, support and clip, as recipe keys."""
    share = config["teacher_weight"]
    keys: dict[str, Any] = {"divergence": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(share, "jsd")}
    if keys["divergence"] == "jsd":
        keys |= {"teacher_share": share, "jsd_scale": "published"}
    if config["teacher_top_k"]:
        keys |= {"support": "teacher_topk", "k": config["teacher_top_k"], "tail": "renormalise"}
    clip = config["clip_per_entry"]
    return keys | ({"clip": "none"} if clip is None else {"clip": "entry", "clip_at": clip})


def common_keys(case: Case) -> dict[str, Any]:
    return {"loss_temperature": case.config["temperature"], "reduction": REDUCTIONS[case.config["reduce"]]}


def batch_of(case: Case) -> PublishedBatch:
    return PublishedBatch(case.inputs, case.config["temperature"])


def check(case: Case, method: Method, batch: PublishedBatch, gradient: str, **known: Any) -> Any:
    """Loss and gradient are the published ones; returns what the loss saw."""
    out, grad_BTV = batch.run(method, batch.asked(method, **known), gradient)
    case.check("loss", out.loss.item())
    case.check_gradient("grad", grad_BTV)
    return out


@both_paths
@cases(".opsd.fkl", ".opsd.rkl", ".opsd.jsd")
def test_opsd(name: str, gradient: str) -> None:
    """Forward KL, reverse KL, JSD and the teacher's top 6 renormalised, with and without the per-entry clip."""
    case = CASES[name]
    batch = batch_of(case)
    out = check(case, method_of("opsd", **common_keys(case), **divergence_keys(dict(case.config))), batch, gradient)
    (value_N,) = out.token_loss.values()
    case.check("per_token", batch.padded(value_N), where=batch.mask_BT)


@both_paths
def test_sampled_token_form(gradient: str) -> None:
    """`use_tinker_loss` is support = "sampled"; the paper's clip steps back by itself, for there is nothing to clip."""
    case = CASES["pub.opsd.tinker"]
    batch, method = batch_of(case), method_of("opsd", support="sampled", divergence="reverse_kl", **common_keys(case))
    out = check(case, method, batch, gradient)
    case.check("per_token", batch.padded(out.token_loss["reverse_kl"]), where=batch.mask_BT)
    advantage_N = out.view_sampled_logprob["teacher"] - out.sampled_logprob_N
    case.check("advantage", batch.padded(advantage_N), where=batch.mask_BT)


@both_paths
@cases(".pwopsd.")
def test_pw_opsd(name: str, gradient: str) -> None:
    """The Moderate schedule, a sharp one, a uniform one and a step; both reductions; clip or not; JSD."""
    case = CASES[name]
    batch, schedule = batch_of(case), {key: case.config[key] for key in ("w_min", "tau", "s")}
    keys = common_keys(case) | divergence_keys(dict(case.config))
    method = method_of("pw_opsd", **keys, **schedule)
    out, plan = check(case, method, batch, gradient), batch.asked(method)
    (value_N,) = out.token_loss.values()
    case.check("divergence", batch.padded(value_N), where=batch.mask_BT)
    weight_N = weights.position(plan.row_N, **schedule, mean_one=False, dtype=torch.float64)
    case.check("weights", batch.padded(weight_N), where=batch.mask_BT)
    logged = case.outputs["logged"]
    for statistic in ("mean", "min", "max"):
        key = f"ea/position_weight_{statistic}"
        case.check(key, getattr(weight_N, statistic)().item(), expected=logged[key])


def test_moderate_is_the_default_schedule() -> None:
    """pw_opsd without keys has the weights of the published default: (0.25, 0.30, 0.10), mean over sequences."""
    method = method_of("pw_opsd")
    config = CASES["pub.opsd.pwopsd.default"].config
    assert [method.w_min, method.tau, method.s] == [config[key] for key in ("w_min", "tau", "s")]
    assert method.reduction == REDUCTIONS[config["reduce"]] and method.loss_temperature == config["temperature"]
    assert (method.clip, method.clip_at) == ("token", config["clip_per_entry"])


@both_paths
@cases(".eopd")
def test_eopd(name: str, gradient: str) -> None:
    """Gate, surrogate and top-16 forward KL one by one, and their sum. The gate is a weight: all tokens are counted.
    A gate at 0 nats lets all pass, which shows the forward KL of the others too."""
    case = CASES[name]
    batch, keys = batch_of(case), {"k": case.config["top_k"], **common_keys(case)}
    method = method_of("eopd", entropy_gate=case.config["entropy_gate"], **keys)
    out, plan = check(case, method, batch, gradient), batch.asked(method)
    where, logged = batch.mask_BT, case.outputs["logged"]
    case.check("teacher_entropy", batch.padded(plan.teacher_entropy_N), where=where)
    gate_BT = batch.padded(method.gated_N(plan).double())
    case.check("gate", gate_BT, where=where)
    case.check("policy_term", batch.padded(out.token_loss["surrogate"]), where=where)
    case.check("advantage", -batch.padded(out.token_loss["surrogate"]), where=where)
    both_N = out.token_loss["surrogate"] + out.token_loss["forward_kl"].nan_to_num()
    case.check("per_token", batch.padded(both_N), where=where)
    all_pass = method_of("eopd", entropy_gate=0.0, **keys)
    ungated_N = batch.run(all_pass, batch.asked(all_pass), gradient)[0].token_loss["forward_kl"]
    case.check("forward_kl_term", batch.padded(ungated_N), where=where)
    for key, got in {
        "teacher_entropy_mean": plan.teacher_entropy_N.mean(),
        "pct_high_entropy": method.report(plan).numbers["share_of_tokens_gated"],
        "L_OPD_mean": out.token_loss["surrogate"].mean(),
        "L_FKL_mean": ungated_N.mean(),
    }.items():
        case.check(key, float(got), expected=logged[f"eopd/{key}"])
    if "teacher_top16_ids" in case.outputs:
        ids_BTK = batch.padded(batch.teacher_tokens(method).topk_ids_NK)
        expected = torch.tensor(case.outputs["teacher_top16_ids"])
        assert torch.equal(ids_BTK.sort(-1).values[where], expected.sort(-1).values.long()[where])


@both_paths
@cases(".reopold.")
def test_reopold(name: str, gradient: str) -> None:
    """Rewards, floor, both phases' masks, the entropy threshold, and the loss over the kept tokens."""
    case = CASES[name]
    config, batch = case.config, batch_of(case)
    method = method_of(
        "reopold",
        floor_lambda=config["lambda"],
        refine_keep=config["beta"],
        switch_step=config["switch_step"],
        **common_keys(case),
    )
    out, plan = check(case, method, batch, gradient, step=config["step"]), batch.asked(method, step=config["step"])
    where = batch.mask_BT
    (term,) = method.terms(plan)
    case.check("reward", batch.padded(method.reward_N(plan)), where=where)
    case.check("floored_reward", batch.padded(term.advantage_N), where=where)
    case.check("student_entropy", batch.padded(plan.student_entropy_N), where=where)
    case.check("kept", batch.padded(method.kept_N(plan).double()), where=where)
    if "entropy_threshold" in case.outputs:
        threshold = weights.quantile(plan.student_entropy_N, 1 - config["beta"])
        case.check("entropy_threshold", threshold.item())
    case.check("per_token", batch.padded(out.token_loss["reopold"].nan_to_num()), where=where)
    said, logged = method.report(plan).numbers, case.outputs["logged"]
    for key, got in {
        "floor": method.floor,
        "R_mean": method.reward_N(plan).mean(),
        "R_min": method.reward_N(plan).min(),
        "clip_fraction": said["share_of_rewards_below_floor"],
        "M_fraction": said["share_of_tokens_kept"],
        "H_mean": plan.student_entropy_N.mean(),
    }.items():
        case.check(key, float(got), expected=logged[f"reopold/{key}"])


@cases(".micro_batches.")
def test_micro_batches(name: str) -> None:
    """One batch gives the published one-batch numbers. The published mean over micro-batches weighs a token by its
    micro-batch's size: with one row each, that is `reduction = "sequence"`, for any number of micro-batches."""
    case = CASES[name]
    method_name = {"opsd": "opsd", "pwopsd": "pw_opsd"}[case.config["method"]]
    keys = common_keys(case) | divergence_keys(dict(case.config))
    if method_name == "pw_opsd":
        keys |= {key: case.config[key] for key in ("w_min", "tau", "s")}
    batch, whole = batch_of(case), method_of(method_name, **keys)
    out, grad_BTV = batch.run(whole, batch.asked(whole))
    case.check("loss_one_batch", out.loss.item())
    case.check_gradient("grad_one_batch", grad_BTV)

    by_row = method_of(method_name, **keys | {"reduction": "sequence"})
    out, grad_BTV = batch.run(by_row, batch.asked(by_row))
    case.check("loss_as_published", out.loss.item())
    case.check_gradient("grad_as_published", grad_BTV)

    groups = case.config["micro_batches"]
    parts = [PublishedBatch(case.inputs, case.config["temperature"], rows) for rows in groups]
    runs = [part.run(whole, part.asked(whole)) for part in parts]
    case.check("loss_as_published", sum(out.loss.item() for out, _ in runs) / len(runs))
    case.check_gradient("grad_as_published", torch.cat([grad for _, grad in runs]) / len(runs))


def test_all_cases_are_used() -> None:
    """The file holds 21 cases, and every one is in a test above. Its README states the count."""
    families = (".opsd.fkl", ".opsd.rkl", ".opsd.jsd", "tinker", ".pwopsd.", ".eopd", ".reopold.", ".micro_batches.")
    assert len(CASES) == 21
    assert all(any(word in name for word in families) for name in CASES)
