"""Weights, selections and advantages against published numbers: 20 cases, through recipe keys.

TIP and PACED were transcribed from their papers, which leave percentile method, minimum and tie rule open; the numbers
hold the choices of the file, which are ours. Where the published code works on a micro-batch, so that its numbers
depend on the split, the test says what of it is reproduced.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case_batch import CaseBatch, of_lengths
from published_batch import PublishedBatch, method_of
from torch import Tensor
from vectors import load

from opdkit.losses import weights as formulas
from opdkit.methods.weighting import Paced, Weights
from opdkit.recipe import parse_recipe
from opdkit.types import Group, Problem, Rollout

CASES = {case.id.removeprefix("pub.weights."): case for case in load("weights")}
both_paths = pytest.mark.parametrize("gradient", ["closed_form", "autograd"])


def cases(prefix: str) -> Any:
    return pytest.mark.parametrize("name", [name for name in CASES if name.startswith(prefix)])


def weights_of(method: str = "opd", **section: Any) -> Weights:
    """[weights] of a recipe that the checks let pass."""
    teacher = {"opd": {"kind": "model", "path": "t"}, "grpo": {"kind": "none"}}[method]
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "teacher": teacher,
        "data": {"train": "d", "task": "math"},
        "sampling": {"group_size": 8},
        "method": {"name": method},
        "weights": section,
        "train": {"steps": 1},
    }
    return parse_recipe(raw).weights


def of_rows(lengths: list[int]) -> CaseBatch:
    mask_BT = of_lengths(lengths, max(lengths))
    return CaseBatch(mask_BT, torch.zeros(mask_BT.shape, dtype=torch.long))


@cases("position.")
def test_position(name: str) -> None:
    """Rows of 1, 2, 3, 5, 8 and no tokens, two schedules."""
    case = CASES[name]
    batch = of_rows(case.inputs["lengths"])
    plan = weights_of(tokens={"name": "position", **case.config}).apply(batch.plan())
    for row, expected in enumerate(case.outputs["weights"]):
        case.check(f"weights[{row}]", plan.weight_N[plan.row_N == row], expected=expected)
    statistics = [plan.weight_N.mean(), plan.weight_N.min(), plan.weight_N.max()]
    case.check("mean_min_max", [float(x) for x in statistics])


@cases("entropy_sampling.")
def test_entropy_sampling(name: str) -> None:
    """The propensities of the published code, on both supports of the JSD, and how many tokens it draws.

    It draws from a micro-batch: here all tokens stand in one row, since ours draws from each answer. Its `scale`
    multiplies each factor by the same for all tokens, which cancels in a draw; it has no key and is put back here."""
    case = CASES[name]
    config, batch = case.config, PublishedBatch(case.inputs)
    keys = {"alpha": config["alpha"], "gamma": config["gamma"]}
    keys |= {"k": config["jsd_teacher_top_k"]} if config["jsd_teacher_top_k"] else {}
    section = weights_of(tokens={"name": "entropy_sampling", "keep": config["sample_ratio"], **keys})
    with_jsd = weights_of(
        tokens={"name": "entropy_sampling", "gamma": 1.0, **({"k": keys["k"]} if "k" in keys else {})}
    )
    plan = batch.asked(method_of("opd"), with_jsd)
    scale = config["scale"]
    got_N = section.tokens.propensity_N(plan) * scale ** (config["alpha"] + config["gamma"])
    case.check("weights_valid_tokens", got_N)
    case.check("normalised_entropy", plan.student_entropy_N / math.log(15) * scale)
    case.check("normalised_jsd", plan.student_scores["jsd"] / math.log(2) * scale)
    one_row = {"row_N": torch.zeros_like(plan.row_N), "group_R": torch.zeros(1, dtype=torch.long), "seed_R": [5]}
    drawn = batch.asked(method_of("opd"), section, **one_row).mask_N
    assert int(drawn.sum()) == case.outputs["draw_count"]


def test_teacher_token_stats() -> None:
    """What EOPD is told of the teacher: its entropy, and its log-prob of the sampled token."""
    case = CASES["teacher_token_stats"]
    plan = PublishedBatch(case.inputs).asked(method_of("eopd"))
    case.check("teacher_entropy_normalised", plan.teacher_entropy_N / math.log(15))
    case.check("teacher_probability_of_token", plan.teacher_logprob_N.exp())


@both_paths
def test_tip(gradient: str) -> None:
    """Entropies, divergences, scores, the kept tokens of every selection, and the loss over those of Soft-OR."""
    case = CASES["tip_soft_or"]
    batch, opd = PublishedBatch(case.inputs), method_of("opd")

    def plan(name: str, keep: float = 0.5) -> Any:
        return batch.asked(opd, weights_of(tokens={"name": name, "keep": keep}))

    soft_or, q3 = plan("soft_or"), plan("q3")
    entropy_N, reverse_N = soft_or.student_entropy_N, soft_or.student_scores["reverse_kl"]
    forward_N = q3.student_scores["forward_kl"]
    case.check("h", entropy_N / math.log(15))
    case.check("h_cap", float(formulas.quantile(entropy_N, 0.98) / math.log(15)))
    case.check("h_hat", formulas.clipped_entropy(entropy_N, 0.98))
    case.check("delta", reverse_N)
    case.check("delta_hat", formulas.unit_interval(reverse_N))
    case.check("delta_forward", forward_N)
    case.check("soft_or", formulas.soft_or(entropy_N, reverse_N, 0.98))
    case.check("q3", formulas.confident_and_wrong(entropy_N, forward_N, 0.98))

    for name, expected in case.outputs["kept"].items():
        selection, keep = name.split("@")
        if selection == "lowest_entropy":  # an ablation of the paper without a key of its own
            mask_N = formulas.keep_best(-entropy_N, soft_or.row_N, float(keep))
        else:
            mask_N = plan(selection, float(keep)).mask_N
        kept_BT = batch.padded(mask_N)
        assert [row.nonzero().flatten().tolist() for row in kept_BT] == expected, name

    out, grad_BTV = batch.run(opd, plan(*case.outputs["loss_kept_set"].split("@")[:1]), gradient)
    case.check("loss_reverse_kl_on_kept_soft_or", out.loss.item())
    case.check_gradient("grad", grad_BTV)
    assert int(out.computed_N.sum()) == sum(map(len, case.outputs["kept"]["soft_or@0.5"]))


def group(problem_id: str, rewards: list[float]) -> Group:
    """Answers of one token each."""
    problem = Problem(id=problem_id, task="math", messages=({"role": "user", "content": "?"},))
    rollouts = tuple(
        Rollout(
            problem_id=problem_id,
            sample_id=sample,
            policy_version=0,
            prompt_ids=(1,),
            answer_ids=(2,),
            answer_logprobs=None,
            answer_mask=np.ones(1, dtype=np.bool_),
            finish="stop",
            reward=reward,
        )
        for sample, reward in enumerate(rewards)
    )
    return Group(problem=problem, rollouts=rollouts)


@cases("paced.")
def test_paced(name: str) -> None:
    """Weights of all nine pass rates of eight answers, and of a batch of four problems at mean one, from groups."""
    case = CASES[name]
    alpha, beta, size = (case.config[key] for key in ("alpha", "beta", "rollouts"))

    def weight_R(counts: list[int], **keys: Any) -> Tensor:
        section = weights_of("grpo", problems={"name": "paced", "alpha": alpha, "beta": beta, **keys})
        groups = [group(str(i), [1.0] * right + [0.0] * (size - right)) for i, right in enumerate(counts)]
        rates = section.pass_rates(groups, {})
        ones = [1] * len(counts)  # one row of one token to a problem; the pass rate is of all its answers
        plan = of_rows(ones).plan(group=list(range(len(counts))))
        known = torch.tensor([rates[str(i)] for i in range(len(counts))], dtype=torch.float64)
        return section.apply(replace(plan, pass_rate_R=known)).weight_N

    case.check("weights", weight_R(case.inputs["correct_counts"], mean_one=False))
    case.check("batch_weights_mean_one", weight_R(case.inputs["batch_correct_counts"]))
    fine = torch.linspace(0, 1, 60_001, dtype=torch.float64)
    assert float(fine[formulas.beta_kernel(fine, alpha, beta).argmax()]) == pytest.approx(
        case.outputs["argmax_p"], abs=2e-5
    )


@cases("reward_beta.")
def test_reward_softmax(name: str) -> None:
    """per = "batch" has the published weights, and as the mean over rows the whole-batch mean. The published mean over
    micro-batches is a softmax in each of them: per = "problem", if every micro-batch is called a problem. Where all
    weights of one underflow the published code says nan; ours are uniform."""
    case = CASES[name]
    micro_batches, losses = (
        case.config["micro_batches"],
        torch.tensor(case.inputs["sample_losses"], dtype=torch.float64),
    )
    rewards = case.inputs["rewards_binary"]
    group_of = [next(i for i, rows in enumerate(micro_batches) if row in rows) for row in range(len(rewards))]

    def weighed(per: str) -> Any:
        problems = {"name": "reward_softmax", "temperature": case.config["beta"], "per": per}
        plan = of_rows([1] * len(rewards)).plan(reward=[float(r) for r in rewards], group=group_of)
        return weights_of("grpo", problems=problems).apply(plan)

    plan = weighed("batch")
    case.check("weights", plan.weight_N)
    case.check("whole_batch_weighted_mean", float((plan.coefficients("sequence") * losses).sum()))
    product_N = weighed("problem").weight_N * losses
    of_micro_batches = [float(product_N[rows].mean()) for rows in micro_batches]
    published = case.outputs["micro_batch_losses_as_published"]
    for got, expected in zip(of_micro_batches, published, strict=True):
        if math.isnan(expected):
            assert math.isfinite(got)
        else:
            case.check("micro_batch_losses_as_published", got, expected=expected)
    if not any(map(math.isnan, published)):
        case.check("mean_over_micro_batches_as_published", float(np.mean(of_micro_batches)))


@cases("truncated_is.")
def test_truncated_importance(name: str) -> None:
    """Per token, per token with mean one, and per sequence, capped."""
    case = CASES[name]
    keys = {"level": case.config["level"], "cap": case.config["cap"]}
    batch = CaseBatch(of_lengths(case.inputs["lengths"], 7), torch.zeros(3, 7, dtype=torch.long))
    log_ratio_N = batch.flat(torch.tensor(case.inputs["log_ratio"]))
    plan = batch.plan(student_logprob_N=log_ratio_N, sampled_logprob_N=torch.zeros_like(log_ratio_N))

    def weight_N(mean_one: bool) -> Tensor:
        return weights_of(importance={**keys, "mean_one": mean_one}).apply(plan).weight_N

    got_N = weight_N(case.config["divide_by_mean"])
    case.check("weights", batch.padded(got_N))
    if case.config["divide_by_mean"]:
        case.check("batch_mean_before_division", float(weight_N(False).mean()))


@cases("grpo.")
def test_grpo(name: str) -> None:
    """Advantages of the method, by both kinds of deviation; the answer that is alone has none."""
    case = CASES[name]
    plan = of_rows([1] * len(case.inputs["rewards"])).plan(reward=case.inputs["rewards"], group=case.inputs["group"])
    plan = replace(plan, sampled_logprob_N=torch.zeros(len(plan.row_N), dtype=torch.float64))
    for std, key in (("unbiased", "divided_by_std"), ("none", "mean_only")):
        (term,) = method_of("grpo", advantage_std=std).terms(plan)
        case.check(key, term.advantage_N, expected=case.outputs["advantages"][key])


def test_token_grpo() -> None:
    """credit = "group_return": the advantage of each token, centred in its group and summed to the answer's end."""
    case = CASES["token_grpo"]
    batch = CaseBatch(of_lengths(case.inputs["lengths"], 7), torch.zeros(3, 7, dtype=torch.long))
    reward_N = batch.flat(torch.tensor(case.inputs["token_rewards"]))
    plan = batch.plan(
        group=case.inputs["group"], view_logprob={"teacher": reward_N}, student_logprob_N=torch.zeros_like(reward_N)
    )
    for std, key in (("unbiased", "divided_by_std"), ("none", "mean_only")):
        (term,) = method_of("opd", support="sampled", credit="group_return", credit_std=std).terms(plan)
        case.check(key, batch.padded(term.advantage_N), expected=case.outputs["advantages"][key])


@both_paths
@cases("iw_opd.")
def test_iw_opd(name: str, gradient: str) -> None:
    """Advantage against the sampler's log-probs, prefix weights, loss and gradient."""
    case = CASES[name]
    batch = PublishedBatch(case.inputs, case.config["temperature"])
    opd = method_of("opd", support="sampled", advantage_from="sampler")
    known = {}
    if "rollout_log_prob_offset" in case.inputs:
        offset_N = batch.flat(torch.tensor(case.inputs["rollout_log_prob_offset"]))
        known["sampled_logprob_N"] = batch.asked(opd).student_logprob_N - offset_N
    plan = batch.asked(opd, weights_of(prefix={"gamma": case.config["gamma"]}), **known)
    out, grad_BTV = batch.run(opd, plan, gradient)
    case.check("weights", batch.padded(plan.weight_N), where=batch.mask_BT)
    (term,) = opd.terms(plan)
    case.check("a", batch.padded(term.advantage_N), where=batch.mask_BT)
    case.check("loss", out.loss.item())
    case.check_gradient("grad", grad_BTV)


def test_all_cases_are_used() -> None:
    """The file holds 20 cases, and every one is in a test above. Its README states the count."""
    families = (
        "position.", "entropy_sampling.", "teacher_token_stats", "tip_soft_or", "paced.", "reward_beta.",
        "truncated_is.", "grpo.", "token_grpo", "iw_opd.",
    )  # fmt: skip
    assert len(CASES) == 20
    assert all(name.startswith(families) for name in CASES)
    assert isinstance(weights_of("grpo", problems={"name": "paced"}).problems, Paced)
