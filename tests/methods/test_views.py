"""Methods of several views, and their control: numbers by hand, what is asked, what is refused. One step of each on a
tiny model: tests/training/test_view_methods.py."""

from __future__ import annotations

from math import exp, log, tanh
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.errors import UserError
from opdkit.losses import Divergence, Head, Support, Target, ViewTokens, head_loss, log_mean, scaled_by_ratio, sign_kept
from opdkit.methods import METHODS
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.recipe import parse_recipe
from opdkit.types import Asked, Needs

F64: Any = {"dtype": torch.float64}
NAN = float("nan")
TEACHER = {"teacher": {"kind": "model", "path": "t"}}
SAME = {"context": {"kind": "reference_solution"}, "count": 1}
MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 40},
}


def method(name: str, **keys: Any) -> Any:
    return METHODS[name].model_validate({"name": name, **keys})


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, **F64)


def plan(lengths: list[int], *, reward: list[float] | None = None, group: list[int] | None = None, **known: Any) -> Any:
    """Rows of these lengths; unless it is said otherwise answers to one problem, drawn by the student as it is."""
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    fields: dict[str, Any] = {
        "row_N": row_N,
        "index_N": torch.arange(len(row_N)),
        "group_R": torch.tensor(group or [0] * len(lengths)),
        "reward_R": tensor(*(reward or [0.0] * len(lengths))),
        "graded_R": torch.full((len(lengths),), reward is not None),
        "mask_N": torch.ones(len(row_N), dtype=torch.bool),
        "weight_N": torch.ones(len(row_N), **F64),
        "sampled_logprob_N": torch.full((len(row_N),), -1.0, **F64),
        "student_logprob_N": torch.full((len(row_N),), -1.0, **F64),
        "student_entropy_N": torch.zeros(len(row_N), **F64),
        "step": 0,
        "progress": 0.0,
    }
    known["has_view"] = {view: ~said_N.isnan() for view, said_N in known.get("view_logprob", {}).items()}
    return PlanInputs(**(fields | known))


def head_of(*probabilities: float) -> tuple[ViewTokens, Head]:
    """A reader of one token with this distribution."""
    head = Head(weight_VH=torch.eye(len(probabilities), **F64), num_tokens=len(probabilities))
    return ViewTokens(hidden_NH=tensor(*probabilities).log()[None], head=head), head


def learn(chosen: Any, student: tuple[float, ...], inputs: PlanInputs, **views: Any) -> tuple[float, Tensor]:
    """(loss, gradient with respect to the logits) of the first id as the sampled token."""
    (tokens, head) = head_of(*student)
    assert tokens.hidden_NH is not None
    hidden_NV = tokens.hidden_NH.clone().requires_grad_()
    out = head_loss(hidden_NV, head, torch.zeros(1, dtype=torch.long), chosen.terms(inputs), views)
    return out.loss.item(), torch.autograd.grad(out.loss, hidden_NV)[0][0]


# exopd


def test_exopd_by_hand() -> None:
    """log T = -1, log R = -2, log S = -1.5: 1.25 * -1 - .25 * -2 + 1.5 = .75; plain OPD, which asks no R, .5. The loss
    is -A log S, its gradient -A (1 - S) at the sampled token's logit."""
    said = {name: ViewTokens(sampled_logprob_N=tensor(p)) for name, p in (("teacher", -1.0), ("reference", -2.0))}
    student = (exp(-1.5), 1 - exp(-1.5))
    for scale, advantage in ((1.25, 0.75), (1.0, 0.5), (0.5, 0.5 * -1 + 0.5 * -2 + 1.5)):
        loss, gradient = learn(method("exopd", reward_scale=scale), student, plan([1]), **said)
        assert loss == pytest.approx(advantage * 1.5) and gradient[0] == pytest.approx(-advantage * (1 - student[0]))
    assert method("exopd").needs == Needs(views=dict.fromkeys(("teacher", "reference"), Asked("sampled")))
    assert method("exopd", reward_scale=1.0).needs == Needs(views={"teacher": Asked("sampled")})


def test_exopd_on_the_whole_vocabulary() -> None:
    """c = 2: T^2 / R = (.64, .04) / .5 -> (.9412, .0588). A student that is there has nothing to learn, T has."""
    views = {"teacher": head_of(0.8, 0.2)[0], "reference": head_of(0.5, 0.5)[0]}
    full = method("exopd", reward_scale=2.0, support="full")
    assert full.compared == Target.of({"teacher": 2.0, "reference": -1.0})
    loss, gradient = learn(full, (0.64 / 0.68, 0.04 / 0.68), plan([1]), **views)
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-12
    assert learn(full, (0.8, 0.2), plan([1]), **views)[0] > 0.01


# rlsd


def test_rlsd_by_hand() -> None:
    """A = 1, l = .5, ratio clipped to [.8, 1.2]: d = .4 gives w = 1.4918 -> 1.2 and A' = 1.1; A = -1 gives w = .6703 ->
    .8 and A' = -.9. d = .1 is not clipped. The sign is always the reward's; without a word of the teacher A stays."""
    got = scaled_by_ratio(tensor(1, -1, 1, -1, 0, 1), tensor(0.4, 0.4, 0.1, -9, 0.4, NAN), 0.5, 0.2)
    assert got.tolist() == pytest.approx([1.1, -0.9, 0.5 + 0.5 * exp(0.1), -1.1, 0, 1])
    teacher_N = tensor(-0.6, NAN)
    inputs = plan([1, 1], reward=[1.0, 0.0], view_logprob={"teacher": teacher_N})
    (term,) = method("rlsd", advantage_std="none").terms(inputs)
    assert term.advantage_N.tolist() == pytest.approx([0.5 * 1.1, -0.5]) and term.coef_N.tolist() == [0.5, 0.5]
    report = method("rlsd", advantage_std="none").report(inputs)
    assert report.numbers == {"teacher_share": 0.5, "share_of_ratios_clipped": 1.0}


def test_rlsd_fades_to_grpo() -> None:
    """Half-way of 50 steps l is .25, from 50 on 0; fade_steps = 0 keeps .5. Equal rewards: A = 0, whatever T says."""
    known: dict[str, Any] = {"reward": [1.0, 0.0], "view_logprob": {"teacher": tensor(-0.6, -0.6)}}
    for step, fade, wanted in ((25, 50, 1.05), (50, 50, 1.0), (99, 50, 1.0), (99, 0, 1.1)):
        (term,) = method("rlsd", advantage_std="none", fade_steps=fade).terms(plan([1, 1], step=step, **known))
        assert term.advantage_N[0].item() == pytest.approx(0.5 * wanted)
    (term,) = method("rlsd").terms(plan([1, 1], reward=[1.0, 1.0], view_logprob=known["view_logprob"]))
    assert term.advantage_N.tolist() == [0.0, 0.0]


# rlcsd


def test_rlcsd_by_hand() -> None:
    """A = .25, tau = .02, l = .5, e = -.02: r = .5 tanh(-1) = -.3808, and A + r is cut at 0. A = 0 stays 0."""
    bonus = 0.5 * tanh(-1)
    assert bonus == pytest.approx(-0.3808, abs=1e-4)
    got = sign_kept(tensor(0.25, 0.5, -0.25, 0, -0.25), tensor(bonus, bonus, bonus, bonus, 0.3))
    assert got.tolist() == pytest.approx([0, 0.5 + bonus, -0.25 + bonus, 0, 0])


def test_rlcsd_takes_the_mean_of_wrong_hints() -> None:
    """Log of the mean probability: of 1/2 and 1/4 log 3/8. A missing reading leaves the mean, NaN where all are."""
    got = log_mean([tensor(0.5, 0.5, NAN).log(), tensor(0.25, NAN, NAN).log()])
    assert got[:2].tolist() == pytest.approx([log(3 / 8), log(1 / 2)]) and got[2].isnan()


def test_rlcsd_has_two_means() -> None:
    """Answers of 3 tokens rewarded 1 and 1 token rewarded 0: A = 1/2 and -1/2. Contrast 0, log 2 and unknown in the
    first, -1 in the second: two tokens are selected (r = .5 tanh(34.7) = .5, and -.5), and move to 1 and -1, under a
    mean of their own. eta = .5 halves it."""
    view_logprob = {
        "right": tensor(-1.0, -1.0, NAN, -2.0),
        "wrong.0": tensor(-1.0, -1.0 - log(2), -1.0, -1.0),
        "wrong.1": tensor(-1.0, NAN, -1.0, NAN),
    }
    inputs = plan([3, 1], reward=[1.0, 0.0], view_logprob=view_logprob)
    plain, hinted = method("rlcsd", advantage_std="none", eta=0.5).terms(inputs)
    assert plain.coef_N.tolist() == pytest.approx([0.5, 0, 0.5, 0])
    assert hinted.coef_N.tolist() == pytest.approx([0, 0.25, 0, 0.25])
    assert plain.advantage_N.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert hinted.advantage_N[[1, 3]].tolist() == pytest.approx([1.0, -1.0])
    numbers = method("rlcsd").report(inputs).numbers
    assert numbers == {"share_of_tokens_selected": 0.5, "mean_contrast": pytest.approx((log(2) + 1) / 3)}
    silent = plan([3, 1], reward=[1.0, 1.0], view_logprob=view_logprob)
    assert all((term.advantage_N == 0).all() for term in method("rlcsd").terms(silent))


def test_rlcsd_published_numbers() -> None:
    """The repository's three sets of numbers by name; one of them may be set alone."""
    keys = ("tau", "eta", "beta", "bonus_clip")

    def numbers(**chosen: Any) -> tuple[float, ...]:
        return tuple(getattr(method("rlcsd", **chosen), key) for key in keys)

    assert numbers() == numbers(published="config") == (0.02, 1.0, 1.0, 2.0)
    assert numbers(published="readme") == (1.3, 0.5, 1.0, 2.0) and numbers(published="code") == (0.02, 1.0, 0.2, 0.5)
    assert numbers(published="code", tau=1.0) == (1.0, 1.0, 0.2, 0.5)
    with pytest.raises(ValueError, match="'config', 'readme' or 'code'"):
        method("rlcsd", published="paper")


# sr_opsd


def test_sr_opsd_by_hand() -> None:
    """T = (.8, .2), R = (.5, .5), a = .5: P = (2/3, 1/3). Order 1/2, S = (1/2, 1/2): sum of the roots of P S is
    (sqrt(1/3) + sqrt(1/6)), L = -2 log of it; the gradient is S - Q, Q in proportion to those roots."""
    views = {"teacher": head_of(0.8, 0.2)[0], "reference": head_of(0.5, 0.5)[0]}
    chosen = method("sr_opsd", teacher_exponent=0.5, order=0.5, support="full")
    loss, gradient = learn(chosen, (0.5, 0.5), plan([1]), **views)
    roots = ((1 / 3) ** 0.5, (1 / 6) ** 0.5)
    assert loss == pytest.approx(-2 * log(sum(roots)))
    assert gradient.tolist() == pytest.approx([0.5 - roots[0] / sum(roots), 0.5 - roots[1] / sum(roots)])
    assert abs(learn(chosen, (2 / 3, 1 / 3), plan([1]), **views)[0]) < 1e-12


def test_sr_opsd_as_published_and_without_an_anchor() -> None:
    chosen = method("sr_opsd")
    assert chosen.loss == Divergence("renyi", Support("student_topk", 100), order=0.95)
    assert dict(chosen.compared.weights) == pytest.approx({"teacher": 0.9, "reference": 0.1})
    assert method("sr_opsd", teacher_exponent=1.0).needs == Needs(views={"teacher": Asked("distribution")})
    assert method("sr_opsd", divergence="forward_kl").loss == Divergence("forward_kl", Support("student_topk", 100))


# dopd


def test_dopd_routes_by_hand() -> None:
    """Gaps 0, .1, 1, -.8 and 9, the last of which is dropped (a fifth): mapped to 0, .1, 1, .8. Likely is T >= 1/2."""
    teacher_N = tensor(0.9, 0.2, 0.9, 0.1, 0.9).log()
    gap_N = tensor(0, 0.1, 1.0, -0.8, 9.0)
    inputs = plan([5], view_logprob={"teacher": teacher_N, "hinted": teacher_N - gap_N})
    chosen = method("dopd", outlier_share=0.2)
    coefs = {term.name: (term.coef_N.tolist(), term.target.views, term.loss.kind) for term in chosen.terms(inputs)}
    share = 1 / 4  # of each kept token
    assert coefs == {
        "both_know": (pytest.approx([0.6 * share, 0, 0, 0, 0]), ("teacher",), "reverse_kl"),
        "neither_knows": (pytest.approx([0, 0.3 * share, 0, 0, 0]), ("hinted",), "reverse_kl"),
        "teacher_ahead": (pytest.approx([0, 0, share, 0, 0]), ("teacher",), "jsd"),
        "student_ahead": (pytest.approx([0, 0, 0, 0.6 * share, 0]), ("hinted",), "reverse_kl"),
    }
    assert set(chosen.report(inputs).numbers.values()) == {1 / 5}
    asked = Asked("distribution", logprob=True)
    assert chosen.needs == Needs(views={"teacher": asked, "hinted": asked})


# opsa


def test_opsa_by_hand() -> None:
    """Two answers of 3 and 2 tokens. Of the batch the two least likely are selected; entropies from 0 to 2 become 0 to
    1. They count 1/5 each: the others stay in the mean with A = 0."""
    known = {
        "student_logprob_N": tensor(-5, -4, -3, -2, -1),
        "student_entropy_N": tensor(1.0, 2.0, 0.5, 0.0, 0.5),
    }
    inputs = plan([3, 2], **known)
    (term,) = method("opsa", share=0.4).terms(inputs)
    assert term.coef_N.tolist() == pytest.approx([1 / 5, 1 / 5, 0, 0, 0])
    assert term.advantage_N[:2].tolist() == pytest.approx([-0.75, -1.0])
    numbers = method("opsa", share=0.4).report(inputs).numbers
    assert numbers == {"share_of_tokens_selected": 0.4, "mean_advantage": pytest.approx(-0.875)}
    (term,) = method("opsa", share=0.4, share_of="answer", entropy_range_of="answer").terms(inputs)
    assert term.coef_N.tolist() == pytest.approx([1 / 5, 0, 0, 1 / 5, 0])  # floor(.4 * 2) is 0, but one at least
    assert term.advantage_N[[0, 3]].tolist() == pytest.approx([-0.5 - (0.5 / 1.5) / 2, -0.5])
    (term,) = method("opsa", share=0.4, advantage="constant").terms(inputs)
    assert term.advantage_N.tolist() == [-0.5] * 5
    assert method("opsa").needs == Needs(student=True)


def test_opsa_lowers_its_tokens() -> None:
    """The gradient at the sampled token's logit is |A| (1 - S): descent makes it less likely. Tokens that a mask of
    [weights] leaves out are in no quantile, range or count."""
    _, gradient = learn(method("opsa"), (0.25, 0.75), plan([1]))
    assert gradient[0] == pytest.approx(0.5 * 0.75)
    mask_N = torch.tensor([False, True, True])
    known = {"student_logprob_N": tensor(-9, -2, -1), "student_entropy_N": tensor(9, 0, 1), "mask_N": mask_N}
    (term,) = method("opsa").terms(plan([3], **known))
    assert term.coef_N.tolist() == [0, 0.5, 0] and term.advantage_N[1:].tolist() == [-0.5, -1.0]


# srpo and i_sdpo

LENGTHS, GROUPS, REWARDS = [2, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2], [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def branches(name: str, *, view: bool = True, **keys: Any) -> tuple[list[float], list[float]]:
    """(coefficients of the divergence, of the reward) of a mixed problem, one that nobody solved, and one that all did.
    The teacher's entropy is log 3 at the second token of the first answer, else 0."""
    entropy_N = tensor(0, log(3), 0, 0, 0, 0, 0)
    said_N = torch.zeros(7, **F64) if view else torch.full((7,), NAN, **F64)
    inputs = plan(
        LENGTHS, reward=REWARDS, group=GROUPS, view_logprob={"teacher": said_N}, view_entropy={"teacher": entropy_N}
    )
    distilled, reward = method(name, **keys).terms(inputs)
    return distilled.coef_N.tolist(), reward.coef_N.tolist()


def test_srpo_routes_answers() -> None:
    """The failed answer of the mixed problem is distilled: its tokens weigh e^0 and e^-log 3 = 1/3, by their mean 2/3:
    3/2 and 1/2. All 7 tokens are in one count, or 2 and 5 in their own."""
    distilled, reward = branches("srpo")
    assert distilled == pytest.approx([1.5 / 7, 0.5 / 7, 0, 0, 0, 0, 0])
    assert reward == pytest.approx([0, 0, *[1 / 7] * 5])
    distilled, reward = branches("srpo", mean_over="branch", certainty=0.0)
    assert distilled == pytest.approx([1 / 2, 1 / 2, 0, 0, 0, 0, 0]) and reward == pytest.approx([0, 0, *[1 / 5] * 5])


def test_i_sdpo_routes_problems() -> None:
    """Both answers to the problem that nobody solved are distilled; the failed one beside a right one is GRPO's."""
    distilled, reward = branches("i_sdpo")
    assert distilled == pytest.approx([0, 0, 0, 1 / 7, 1 / 7, 0, 0])
    assert reward == pytest.approx([1 / 7, 1 / 7, 1 / 7, 0, 0, 1 / 7, 1 / 7])
    assert method("i_sdpo").loss == Divergence("mixed_kl", Support("student_topk", 100), reverse_share=0.5)


@pytest.mark.parametrize("name", ["srpo", "i_sdpo"])
def test_without_the_teachers_word_all_is_grpo(name: str) -> None:
    """Nothing is distilled, and nothing is dropped."""
    distilled, reward = branches(name, view=False)
    assert distilled == [0.0] * 7 and reward == pytest.approx([1 / 7] * 7)
    asked = Asked("distribution", entropy=True)
    assert method(name).needs == Needs(views={"teacher": asked}, reward=True, student=True)


# Divergences that the family takes, recipes, refusals


def test_mixed_kl_and_renyi_go_with_opd() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): both from their definitions; b = 1/4 mixes forward and reverse 3 to 1."""
    forward = 0.75 * log(1.5) + 0.25 * log(0.5)
    reverse = -0.5 * (log(1.5) + log(0.5))
    teacher = head_of(0.75, 0.25)[0]
    mixed = method("opd", divergence="mixed_kl", reverse_share=0.25)
    assert learn(mixed, (0.5, 0.5), plan([1]), teacher=teacher)[0] == pytest.approx(0.75 * forward + 0.25 * reverse)
    renyi = method("opd", divergence="renyi", order=0.5)
    affinity = 0.375**0.5 + 0.125**0.5
    assert learn(renyi, (0.5, 0.5), plan([1]), teacher=teacher)[0] == pytest.approx(-2 * log(affinity))


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("exopd", {}, "needs a teacher"),
        ("exopd", {**TEACHER, "method": {"target": {"teacher": 2.0}}}, r"method\.target is not a key"),
        ("exopd", {**TEACHER, "method": {"reward_scale": 0.0}}, "greater than 0"),
        ("exopd", {**TEACHER, "views": {"refrence": {}}}, r"is not used by method\.name"),
        ("sr_opsd", {"method": {"teacher_exponent": 1.5}}, "less than or equal to 1"),
        ("rlsd", {"sampling": {"group_size": 1}}, "no group to compare"),
        ("rlsd", {"weights": {"importance": {}}}, "a second time"),
        ("rlcsd", {"sampling": {"temperature": 0.7}}, "compare two distributions"),
        ("rlcsd", {"teacher": {"kind": "self", "weights": "initial"}}, "never asks"),
        ("srpo", {"sampling": {"temperature": 0.7}}, "compare two distributions"),
        ("srpo", {"method": {"without_context": "dilute"}}, "should be 'leave'"),
        ("i_sdpo", {"data": {"train": "d.jsonl"}}, "needs rewards"),
        ("rlcsd", {"views": dict.fromkeys(("right", "wrong"), SAME)}, "contrast is zero"),
        ("dopd", {}, "needs a teacher"),
        ("dopd", {**TEACHER, "views": {"hinted": {"context": {"kind": "none"}}}}, "is the student itself"),
        ("opsa", TEACHER, "never asks"),
        ("opsa", {"method": {"advantage": "constant", "entropy_range_of": "answer"}}, "has no use for"),
    ],
)
def test_refusals(name: str, sections: dict[str, Any], words: str) -> None:
    raw = {**MINIMAL, **sections, "method": {"name": name, **sections.get("method", {})}}
    with pytest.raises(UserError, match=words):
        parse_recipe(raw)


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("exopd", {**TEACHER, "context": {"kind": "reference_solution"}}, "what the teacher reads"),
        ("dopd", {**TEACHER, "context": {"kind": "none"}}, "give both the same"),
        ("rlcsd", {"views": {"right": {"teacher": {"weights": "live"}}}}, "one of two models"),
        ("rlsd", {"method": {"fade_steps": 20}}, "from there to train.steps = 40 this is GRPO"),
        ("opsa", {"train": {"steps": 40, "updates_per_step": 4}}, "an earlier student drew"),
    ],
)
def test_what_is_doubtful_is_said(name: str, sections: dict[str, Any], words: str) -> None:
    recipe = parse_recipe({**MINIMAL, **sections, "method": {"name": name, **sections.get("method", {})}})
    assert any(words in sentence for sentence in recipe.method.warnings(recipe))
    plain = parse_recipe(
        {**MINIMAL, **({} if name in ("rlcsd", "rlsd", "opsa") else TEACHER), "method": {"name": name}}
    )
    assert not any(words in sentence for sentence in plain.method.warnings(plain))
