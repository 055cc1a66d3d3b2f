"""SDPO and MOPD as recipes: the papers' defaults, what goes with what, what is refused. Numbers: tests/parity."""

import tomllib
from typing import Any

import pytest
import torch

from opdkit import toml
from opdkit.contexts.peers import Peers
from opdkit.errors import UserError
from opdkit.losses import Divergence, Support
from opdkit.methods import METHODS
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.sdpo import FromSiblings
from opdkit.recipe import Recipe, parse_recipe
from opdkit.types import Asked, Needs

MINIMAL: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "task": "math"},
    "train": {"steps": 100},
}


def recipe(name: str = "mopd", *overrides: str, **method: Any) -> Recipe:
    return parse_recipe({**MINIMAL, "method": {"name": name, **method}}, overrides)


@pytest.mark.parametrize(
    ("name", "slots", "remove_thinking", "tokens"),
    [("sdpo", ("success",), "successes", 8192), ("mopd", ("success", "success", "failure"), "never", 4096)],
)
def test_papers_defaults(name: str, slots: tuple[str, ...], remove_thinking: str, tokens: int) -> None:
    """JSD 0.5 on the student's top 100 with a tail bucket, EMA 0.05, 32 problems of 8 answers, lr 1e-5 after 10."""
    made = recipe(name)
    context, method = made.context, made.method
    assert isinstance(context, Peers) and isinstance(method, FromSiblings)
    assert (context.slots, context.remove_thinking, context.failures) == (slots, remove_thinking, "always")
    assert context.feedback == "when_no_solution"
    assert method.loss == Divergence("jsd", Support("student_topk", 100), "bucket", 0.5, "published")
    assert (method.reduction, method.without_context, method.importance_cap) == ("sequence", "leave", None)
    assert (made.teacher.weights, made.teacher.ema_rate) == ("ema", 0.05)
    sampling, train = made.sampling, made.train
    assert (sampling.group_size, sampling.temperature, sampling.max_answer_tokens) == (8, 1.0, tokens)
    assert (train.problems_per_step, train.lr, train.warmup_steps, train.weight_decay) == (32, 1e-5, 10, 0.01)
    assert method.needs == Needs(views={"teacher": Asked("distribution")}, reward=True)


def test_paper_defaults_step_back_together() -> None:
    """Another direction needs no word about jsd's share and scale, the full vocabulary none about k, other teacher
    weights none about the ema_rate; positive-only MOPD is one line."""
    assert recipe(divergence="reverse_kl", k=20).method.loss == Divergence("reverse_kl", Support("student_topk", 20))  # type: ignore[attr-defined]
    assert recipe(support="full").method.loss == Divergence("jsd", teacher_share=0.5, scale="published")  # type: ignore[attr-defined]
    assert recipe(support="sampled", divergence="reverse_kl").needs.teacher == Asked("sampled")
    mixed = recipe("sdpo", "teacher.weights=trust_region", "teacher.student_share=0.05")
    assert (mixed.teacher.kind, mixed.teacher.ema_rate) == ("self", None)
    assert recipe("mopd", "context.slots=['success', 'success']").context.slots == ("success", "success")  # type: ignore[attr-defined]


@pytest.mark.parametrize("keys", [{}, {"divergence": "reverse_kl"}, {"support": "full"}, {"importance_cap": 2.0}])
def test_resolved_recipes_read_back(keys: dict[str, Any]) -> None:
    first = recipe(**keys)
    assert parse_recipe(tomllib.loads(toml.dumps(first.as_dict()))) == first


def test_capped_ratios_by_hand() -> None:
    """Log-ratios log 1, log 4 and log 1/2 with cap 2 count 1, 2 and 1/2; one of three tokens is capped. Mean over two
    rows of 2 and 1 tokens: coefficients 1/4, 2/4 and 1/4."""
    method = METHODS["mopd"].model_validate({"name": "mopd", "importance_cap": 2.0})
    sampled_N = torch.tensor([-1.0, -3.0, -1.0])
    plan = PlanInputs(
        row_N=torch.tensor([0, 0, 1]),
        index_N=torch.tensor([0, 1, 0]),
        group_R=torch.tensor([0, 0]),
        reward_R=torch.zeros(2, dtype=torch.float64),
        graded_R=torch.ones(2, dtype=torch.bool),
        mask_N=torch.ones(3, dtype=torch.bool),
        weight_N=torch.ones(3),
        sampled_logprob_N=sampled_N,
        student_logprob_N=sampled_N + torch.tensor([1.0, 4.0, 0.5]).log(),
        student_entropy_N=None,
        step=0,
        progress=0.0,
    )
    (term,) = method.terms(plan)
    assert term.coef_N.tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert method.report(plan).numbers["share_of_ratios_capped"] == pytest.approx(1 / 3)
    assert method.needs.student  # it must know log p before coefficients are made


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.importance_cap=0"], "greater than 0"),
        (["method.importance_cap=2", "sampling.temperature=0.7"], "set both to the same, or remove the cap"),
        (["method.importance_cap=2", "weights.importance.cap=2"], "twice; keep one of them"),
        (["method.without_context=dilute", "method.reduction=sum"], "counts rows without context in the denominator"),
        (["method.without_context=drop"], "should be 'leave' or 'dilute'"),
        (["method.divergence=skewed_forward_kl"], "needs teacher_share"),
        (["context.kind=none", "teacher.weights=live"], "compares the student with itself"),
    ],
)
def test_refusals(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe("mopd", *overrides)


def test_sampled_tokens_of_an_earlier_student_are_doubtful() -> None:
    """Several updates on one batch: `check` says that a sampled estimate is biased unless a ratio makes up for it."""
    sampled = {"support": "sampled", "divergence": "reverse_kl", "teacher_share": None, "k": None, "tail": "drop"}
    for overrides, cap, doubtful in (
        (["train.updates_per_step=4"], None, True),
        (["train.updates_per_step=4"], 2.0, False),
        ([], None, False),
    ):
        chosen = recipe("sdpo", *overrides, **sampled, importance_cap=cap)
        assert any("an earlier student drew" in said for said in chosen.method.warnings(chosen)) == doubtful


@pytest.mark.parametrize("name", ["eopd", "reopold", "topk_opd", "opd"])
def test_the_same_of_other_methods(name: str) -> None:
    """Those whose every loss is of the sampled token say it always; the others where their support is that token."""
    teacher = {"kind": "model", "path": "t"}
    raw = {"name": "r", "model": {"path": "m"}, "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic"}}
    raw |= {"teacher": teacher, "method": {"name": name}, "train": {"steps": 30, "updates_per_step": 2}}
    chosen = parse_recipe(raw)
    doubtful = any("an earlier student drew" in said for said in chosen.method.warnings(chosen))
    assert doubtful == (name in ("eopd", "reopold"))
