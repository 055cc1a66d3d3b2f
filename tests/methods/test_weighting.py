"""[weights]: what a recipe may say, what is refused, what the plan becomes. Formulas: tests/losses, tests/parity."""

from __future__ import annotations

import tomllib
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from opdkit import toml
from opdkit.errors import UserError
from opdkit.losses import Divergence
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting import Paced, Weights
from opdkit.methods.weighting.problems import RewardSoftmax
from opdkit.methods.weighting.tokens import Position
from opdkit.recipe import Recipe, parse_recipe
from opdkit.types import Asked, Group, Needs, Problem, Rollout

TEACHER = {"kind": "model", "path": "t"}


def recipe(weights: dict[str, Any], *overrides: str, **sections: Any) -> Recipe:
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "teacher": TEACHER,
        "data": {"train": "d.jsonl", "task": "math"},
        "method": {"name": "opd"},
        "train": {"steps": 10},
        "weights": weights,
        **sections,
    }
    return parse_recipe(raw, overrides)


def group(problem_id: str, *rewards: float | None) -> Group:
    problem = Problem(id=problem_id, task="math", messages=({"role": "user", "content": "?"},))
    return Group(
        problem=problem,
        rollouts=tuple(
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
        ),
    )


def test_resolved_weights_round_trip() -> None:
    """recipe.toml of a run holds every key of every weight, and reads back equal."""
    first = recipe(
        {
            "tokens": {"name": "q3", "keep": 0.2},
            "problems": {"name": "paced", "floor": 0.01},
            "importance": {},
            "prefix": {"gamma": 0.5},
        }
    )
    text = toml.dumps(first.as_dict())
    assert parse_recipe(tomllib.loads(text)) == first
    assert "entropy_percentile = 0.98" in text and "pass_rate" in text


def test_needs_are_those_of_method_and_weights() -> None:
    """Only what somebody asks for: nothing by default, the exact divergence for TIP, the list for a JSD on top-k."""
    assert Weights().needs == Needs() and Weights().scores == {}
    assert recipe({}).needs == Needs(views={"teacher": Asked("distribution")})
    sampled = "method.support=sampled"
    assert recipe({}, sampled).needs == Needs(views={"teacher": Asked("sampled")})
    tip = recipe({"tokens": {"name": "soft_or"}}, sampled)
    assert tip.needs == Needs(views={"teacher": Asked("distribution")}, student=True)
    assert tip.weights.scores == {"reverse_kl": Divergence("reverse_kl")}
    on_list = recipe({"tokens": {"name": "entropy_sampling", "gamma": 1.0, "k": 8}}, sampled)
    assert on_list.needs == Needs(views={"teacher": Asked("topk", 8)}, student=True)
    assert recipe({"tokens": {"name": "entropy_sampling"}}, sampled).needs == Needs(
        views={"teacher": Asked("sampled")}, student=True
    )
    assert recipe({"tokens": {"name": "position"}}, sampled).needs == Needs(views={"teacher": Asked("sampled")})
    asked = Asked("topk", 16, entropy=True)
    assert Needs(views={"teacher": Asked("topk", 4)}) | Needs(views={"teacher": asked}) == Needs(
        views={"teacher": asked}
    )


@pytest.mark.parametrize(
    ("weights", "overrides", "words"),
    [
        (
            {"tokens": {"name": "softor"}},
            (),
            "weights.tokens.name = 'softor' does not exist; did you mean \"soft_or\"?",
        ),
        ({"tokens": {"keep": 0.5}}, (), "weights.tokens.name is missing"),
        ({"tokens": {"name": "soft_or", "kep": 0.5}}, (), 'weights.tokens.kep is not a key; did you mean "keep"?'),
        ({"tokens": {"name": "soft_or", "keep": 0.0}}, (), "weights.tokens.keep = 0.0"),
        ({"tokens": {"name": "entropy_sampling", "k": 8}}, (), "is the support of the JSD, which gamma = 0 leaves out"),
        ({"tokens": {"name": "position"}}, ("method.name=pw_opsd",), "weigh by position a second time"),
        ({"problems": {"name": "paced"}}, ("sampling.group_size=1",), "gives a pass rate of 0 or 1"),
        ({"problems": {"name": "reward_softmax"}}, ("sampling.group_size=1",), "every weight is 1"),
        ({"importance": {"cap": 0.0}}, (), "weights.importance.cap = 0.0"),
        ({"importance": {}}, ("sampling.temperature=0.7",), "one of two temperatures"),
        ({"importense": {}}, (), 'weights.importense is not a key; did you mean "importance"?'),
    ],
)
def test_refused(weights: dict[str, Any], overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        recipe(weights, *overrides)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"tokens": {"name": "soft_or"}}, "what [weights] compares needs a teacher"),
        ({"prefix": {}}, "what [weights] compares needs a teacher"),
        ({"importance": {}}, "would correct for the sampler a second time"),
    ],
)
def test_refused_for_methods_without_a_teacher(weights: dict[str, Any], words: str) -> None:
    """GRPO asks no teacher: divergences need one, and its own ratio is to the sampler already."""
    with pytest.raises(UserError) as refusal:
        recipe(weights, teacher={"kind": "none"}, method={"name": "grpo"})
    assert words in str(refusal.value)
    assert recipe({"tokens": {"name": "soft_or"}}, method={"name": "grpo"}).needs.teacher == Asked("distribution")


@pytest.mark.parametrize("section", [{"problems": {"name": "paced"}}, {"importance": {}}, {"prefix": {}}])
def test_refused_for_answers_that_nobody_sampled(section: dict[str, Any]) -> None:
    """The data set's solutions have neither rewards nor a sampler."""
    with pytest.raises(UserError, match="come from the dataset"):
        recipe(section, "sampling.group_size=8", teacher={"kind": "none"}, method={"name": "sft"})


def test_pass_rates_of_real_groups() -> None:
    """Right answers over graded ones; a partial score below the threshold is not right; nothing graded is unknown."""
    groups = [group("a", 1.0, 0.0, 0.5, None), group("b", None, None), group("c", 1.0, 1.0)]
    assert Paced().pass_rates(groups, {}) == {"a": pytest.approx(1 / 3), "b": None, "c": 1.0}
    lenient = Paced(success_threshold=0.5)
    assert lenient.pass_rates(groups, {})["a"] == pytest.approx(2 / 3)


def test_fixed_pass_rates_are_the_first_ones() -> None:
    """A problem that was ungraded when first met gets its rate when it is graded; a known one keeps its first."""
    known: dict[str, float] = {}
    fixed, refreshed = Paced(), Paced(pass_rate="refreshed")
    fixed.pass_rates([group("a", 1.0, 0.0), group("b", None, None)], known)
    assert known == {"a": 0.5}
    assert fixed.pass_rates([group("a", 1.0, 1.0), group("b", 0.0, 0.0)], known) == {"a": 0.5, "b": 0.0}
    assert refreshed.pass_rates([group("a", 1.0, 1.0)], known) == {"a": 1.0}
    assert known == {"a": 0.5, "b": 0.0}


def plan(row_of_token: list[int], reward: list[float | None], pass_rate: list[float] | None = None) -> PlanInputs:
    """One problem a row."""
    unknown = ("sampled_logprob_N", "student_logprob_N", "student_entropy_N")
    num_tokens = len(row_of_token)
    return PlanInputs(
        **dict.fromkeys(unknown),
        row_N=torch.tensor(row_of_token),
        index_N=torch.zeros(num_tokens, dtype=torch.long),
        group_R=torch.arange(len(reward)),
        reward_R=torch.tensor([r or 0.0 for r in reward], dtype=torch.float64),
        graded_R=torch.tensor([r is not None for r in reward]),
        mask_N=torch.ones(num_tokens, dtype=torch.bool),
        weight_N=torch.ones(num_tokens),
        pass_rate_R=None if pass_rate is None else torch.tensor(pass_rate, dtype=torch.float64),
        step=0,
        progress=0.0,
    )


def test_paced_by_hand() -> None:
    """Pass rates 1/2, 0 and unknown: weights 1/4 and 0, the third leaves the mean; a floor of 0.05 keeps the second; at
    mean one over the two known problems 0.25 and 0.05 become 5/3 and 1/3."""
    given = plan([0, 0, 1, 2], [1.0, 0.0, None], [0.5, 0.0, float("nan")])
    weighed = Paced(mean_one=False).apply(given)
    assert weighed.weight_N.tolist() == [0.25, 0.25, 0.0, 0.0] and weighed.mask_N.tolist() == [True, True, True, False]
    assert Paced(mean_one=False, floor=0.05).apply(given).weight_N[:3].tolist() == pytest.approx([0.25, 0.25, 0.05])
    assert Paced(floor=0.05).apply(given).weight_N[:3].tolist() == pytest.approx([5 / 3, 5 / 3, 1 / 3])
    assert weighed.coefficients("sequence").tolist() == pytest.approx([0.25 / 4, 0.25 / 4, 0, 0])  # mean over two rows


def test_ungraded_answers_leave_a_reward_softmax() -> None:
    """Rewards 1, unknown, 0 over the batch at 1 / ln 3: 3/2 and 1/2 for the graded ones, the other is not counted."""
    weighed = RewardSoftmax(temperature=1 / log(3), per="batch").apply(plan([0, 1, 2], [1.0, None, 0.0]))
    assert weighed.weight_N.tolist() == pytest.approx([1.5, 0.0, 0.5]) and weighed.mask_N.tolist() == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("mean_one", [False, True])
def test_reversed_position_weights_are_the_same_backwards(mean_one: bool) -> None:
    """The control: the first token of an answer weighs what the last one did, and the mean stays."""
    given = plan([0, 0, 0, 0, 1, 1, 1], [1.0, 1.0])
    late, early = (Position(reverse=reverse, mean_one=mean_one).apply(given).weight_N for reverse in (False, True))
    torch.testing.assert_close(early[:4], late[:4].flip(0))
    torch.testing.assert_close(early[4:], late[4:].flip(0))
    assert late[0] < late[3] and early[0] > early[3]


def test_pw_opsd_has_the_reversed_form_too() -> None:
    raw = {"method": {"name": "pw_opsd", "reverse": True}, "teacher": {"kind": "self", "weights": "initial"}}
    assert recipe({}, **raw, context={"kind": "reference_solution"}).method.reverse is True  # type: ignore[attr-defined]
