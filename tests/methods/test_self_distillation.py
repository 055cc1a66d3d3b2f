"""OPSD, PW-OPSD, EOPD and REOPOLD: their choices, what they refuse, numbers by hand. Published ones: tests/parity."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from opdkit.errors import UserError
from opdkit.losses import Divergence, TeacherAdvantage
from opdkit.methods import METHODS
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.tokens import Position
from opdkit.recipe import Recipe, parse_recipe
from opdkit.types import Asked, Needs


def recipe(*overrides: str) -> Recipe:
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "data": {"train": "d.jsonl", "task": "math"},
        "method": {"name": "opsd"},
        "train": {"steps": 10},
    }
    return parse_recipe(raw, overrides)


def method(name: str, **keys: Any) -> Any:
    return METHODS[name].model_validate({"name": name, **keys})


def plan(lengths: list[int], **known: Any) -> PlanInputs:
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    fields: dict[str, Any] = dict.fromkeys(("sampled_logprob_N", "student_logprob_N", "student_entropy_N"))
    fields |= {
        "row_N": row_N,
        "index_N": torch.arange(len(row_N)),
        "group_R": torch.arange(len(lengths)),
        "reward_R": torch.zeros(len(lengths)),
        "graded_R": torch.zeros(len(lengths), dtype=torch.bool),
        "mask_N": torch.ones(len(row_N), dtype=torch.bool),
        "weight_N": torch.ones(len(row_N), dtype=torch.float64),
        "step": 0,
        "progress": 0.0,
    }
    return PlanInputs(**(fields | known))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["opsd", "pw_opsd", "eopd", "reopold"])
def test_published_settings(name: str) -> None:
    """Without a key all four train as PW-OPSD's launchers did: temperature 1.1, top-k 20, top-p 0.95, 1024 tokens, lr
    5e-6 falling to 0, gradient norm 0.1, the initial weights as teacher, with the reference solution."""
    got = recipe(f"method.name={name}")
    sampling = got.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_answer_tokens) == (1.1, 20, 0.95, 1024)
    assert (got.train.lr, got.train.schedule, got.train.max_grad_norm) == (5e-6, "linear", 0.1)
    assert (got.teacher.weights, got.context.kind, got.method.loss_temperature) == (
        "initial",
        "reference_solution",
        1.1,
    )


def test_clips_of_opsd() -> None:
    """The default caps tokens at 0.05, "entry" is the published cap, "none" takes both away, and the sampled-token form
    has nothing to cap, unless somebody insists."""
    assert method("opsd").loss == Divergence("forward_kl", token_clip=0.05)
    assert method("opsd", clip="entry").loss == Divergence("forward_kl", entry_clip=0.05)
    assert method("opsd", clip="none").loss == Divergence("forward_kl")
    assert method("opd", clip="token", clip_at=0.2).loss == Divergence("reverse_kl", token_clip=0.2)
    sampled = {"support": "sampled", "divergence": "reverse_kl"}
    assert method("opsd", **sampled).loss == TeacherAdvantage()
    with pytest.raises(ValueError, match="caps a divergence"):
        method("opsd", clip="token", **sampled)


def test_the_aggressive_schedule_must_be_given_its_values() -> None:
    """The paper names it and publishes no values: refused with that sentence until the user sets all three."""
    with pytest.raises(UserError, match="its values are published neither there nor in the code") as refusal:
        recipe("method.name=pw_opsd", "method.schedule=aggressive", "method.w_min=0.1")
    assert "set method.tau, method.s yourself" in str(refusal.value)
    got = recipe(
        "method.name=pw_opsd", "method.schedule=aggressive", *(f"method.{k}=0.1" for k in ("w_min", "tau", "s"))
    )
    assert (got.method.w_min, got.method.tau, got.method.s) == (0.1, 0.1, 0.1)


def test_resolved_recipe_names_the_schedule_s_numbers() -> None:
    """recipe.toml of a run says what was trained, not only the schedule's name; one of them may be set alone."""
    resolved = recipe("method.name=pw_opsd", "method.tau=0.5").as_dict()["method"]
    assert (resolved["w_min"], resolved["tau"], resolved["s"]) == (0.25, 0.5, 0.10)


def test_pw_opsd_by_hand() -> None:
    """Rows of 1 and 2 tokens, a step at tau = 1/2 (s = 0), w_min 0.2: the tokens stand at u = 1/2; 1/4 and 3/4, so they
    weigh 0.6; 0.2 and 1. Their rows have half of the loss each, and the weights leave the denominators alone."""
    keys = {"w_min": 0.2, "tau": 0.5, "s": 0.0}
    (term,) = method("pw_opsd", **keys).terms(plan([1, 2]))
    assert term.coef_N.tolist() == pytest.approx([0.6 / 2, 0.2 / 4, 1.0 / 4])
    (term,) = method("pw_opsd", **keys, mean_one=True).terms(plan([1, 2]))
    assert term.coef_N.tolist() == pytest.approx([1 / 2, 1 / 12, 5 / 12])  # the whole weighs 1
    (term,) = method("pw_opsd", **keys, reduction="token").terms(plan([1, 2]))
    assert term.coef_N.tolist() == pytest.approx([0.6 / 3, 0.2 / 3, 1.0 / 3])


def test_pw_opsd_without_a_floor() -> None:
    """w_min = 0, which the published code runs with: tokens before the step weigh nothing and are still counted. In a
    row that the schedule leaves nothing, `mean_one` still has a limit: a lone token weighs 1, of two the last 2."""
    keys = {"w_min": 0.0, "tau": 0.5, "s": 0.0}
    (term,) = method("pw_opsd", **keys).terms(plan([1, 2]))
    assert term.coef_N.tolist() == pytest.approx([0.5 / 2, 0.0, 1.0 / 4])
    (term,) = method("pw_opsd", **{**keys, "tau": 9.0}, mean_one=True).terms(plan([1, 2]))
    assert term.coef_N.tolist() == pytest.approx([1 / 2, 0.0, 2 / 4])
    (term,) = method("pw_opsd", **{**keys, "tau": 9.0}).terms(plan([1, 2]))
    assert term.coef_N.tolist() == [0.0, 0.0, 0.0]
    weighting = Position(w_min=0.0, tau=0.5, s=0.0).apply(plan([1, 2]))
    assert weighting.weight_N.tolist() == pytest.approx([0.5, 0.0, 1.0])


def test_eopd_gate_is_a_weight() -> None:
    """Entropies 0.5, 0.8, 0.81: the gate is strict, one token of three passes, and its forward KL is still divided by
    three. The surrogate counts all."""
    assert method("eopd").needs == Needs(views={"teacher": Asked("topk", 16, entropy=True)})
    given = plan([3], view_entropy={"teacher": tensor(0.5, 0.8, 0.81)})
    surrogate, forward_kl = method("eopd").terms(given)
    assert surrogate.coef_N.tolist() == pytest.approx([1 / 3] * 3)
    assert forward_kl.coef_N.tolist() == pytest.approx([0, 0, 1 / 3])
    assert forward_kl.loss.tail == "renormalise_teacher" and forward_kl.loss.support.k == 16
    assert method("eopd").report(given).numbers == {"share_of_tokens_gated": pytest.approx(1 / 3)}


def test_reopold_phases_are_masks() -> None:
    """lambda = 1/2: floor = -2 ln 2. Rewards 1, -1, -2: while exploring the last token leaves the mean. While refining
    the 40 % of highest entropy are kept (here one of three), and its reward is raised to the floor."""
    reopold = method("reopold", floor_lambda=0.5, refine_keep=0.4, switch_step=10)
    known = {
        "view_logprob": {"teacher": tensor(-1, -2, -3)},
        "student_logprob_N": tensor(-2, -1, -1),
        "student_entropy_N": tensor(0.1, 0.2, 0.9),
    }
    assert reopold.floor == pytest.approx(-2 * log(2))
    (explore,) = reopold.terms(plan([3], **known, step=9))
    assert explore.coef_N.tolist() == pytest.approx([1 / 2, 1 / 2, 0])
    (refine,) = reopold.terms(plan([3], **known, step=10))
    assert refine.coef_N.tolist() == pytest.approx([0, 0, 1])
    assert refine.advantage_N.tolist() == pytest.approx([1, -1, -2 * log(2)])


def test_weights_compose_with_masks() -> None:
    """[weights] that leave out a token leave it out of REOPOLD's quantile and denominator, and keep their weight."""
    zeros = torch.zeros(4, dtype=torch.float64)
    known = {
        "view_logprob": {"teacher": zeros},
        "student_logprob_N": zeros,
        "student_entropy_N": tensor(9.0, 0.3, 0.2, 0.1),
        "mask_N": torch.tensor([False, True, True, True]),
        "weight_N": tensor(1, 1, 2, 1),
    }
    (term,) = method("reopold", refine_keep=0.5, switch_step=0).terms(plan([4], **known))
    assert term.coef_N.tolist() == pytest.approx([0, 1 / 2, 2 / 2, 0])


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("eopd", {"k": 0}, "greater than or equal to 1"),
        ("reopold", {"floor_lambda": 1.0}, "less than 1"),
        ("reopold", {"refine_keep": 0.0}, "greater than 0"),
        ("pw_opsd", {"w_min": -0.1}, "greater than or equal to 0"),
        ("opd", {"credit": "group_return"}, "concern the advantage of the sampled token"),
    ],
)
def test_refused_keys(name: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method(name, **keys)
