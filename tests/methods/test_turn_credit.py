"""Credit of an episode's turns, by hand: means by turn, GRPO by turn, weights of turns, episodes in several rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from opdkit import losses
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.methods.plan_inputs import PlanInputs
from opdkit.methods.weighting.problems import RewardSoftmax
from opdkit.methods.weighting.turns import TCOD, SageOPD, TurnOPD
from opdkit.recipe import parse_recipe
from opdkit.training.batch import Batch
from opdkit.types import Example, Problem, Rollout, TurnRecord

F64: Any = {"dtype": torch.float64}
# Episode 0: turns of 2 and 1 tokens; episode 1: one turn of 1 token; episode 2: turns of 1 and 2.
ROW_N, TURN_N = torch.tensor([0, 0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 0, 0, 1, 1])


def plan(**changed: Any) -> PlanInputs:
    known: dict[str, Any] = {
        "row_N": ROW_N,
        "turn_N": TURN_N,
        "index_N": torch.tensor([0, 1, 2, 0, 0, 1, 2]),
        "group_R": torch.tensor([0, 0, 0]),
        "reward_R": torch.tensor([3.0, 1.0, 2.0], **F64),
        "graded_R": torch.ones(3, dtype=torch.bool),
        "mask_N": torch.ones(7, dtype=torch.bool),
        "weight_N": torch.ones(7, **F64),
        "sampled_logprob_N": torch.zeros(7, **F64),
        "student_logprob_N": None,
        "student_entropy_N": None,
        "step": 0,
        "progress": 0.0,
        "turn_reward_N": torch.tensor([1.0, 1, 2, 1, 0, 2, 2], **F64),
    }
    return PlanInputs(**{**known, **changed})


def test_the_mean_by_turn() -> None:
    """Three episodes a third each, their turns alike, the tokens of a turn alike; a turn without a counted token is
    none. Without turns it is the mean by sequence."""
    coef_N = losses.token_coefficients(torch.ones(7, dtype=torch.bool), None, ROW_N, per="turn", turn_N=TURN_N)
    assert coef_N.tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 6, 1 / 3, 1 / 6, 1 / 12, 1 / 12])
    mask_N = torch.tensor([False, False, True, True, True, True, False])
    coef_N = losses.token_coefficients(mask_N, None, ROW_N, per="turn", turn_N=TURN_N)
    assert coef_N.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 6, 1 / 6, 0])
    same = [losses.token_coefficients(mask_N, None, ROW_N, per=per).tolist() for per in ("turn", "sequence")]
    assert same[0] == same[1]


def test_grpo_by_turn() -> None:
    """G: 1 + 2 and 2; 1; 0 + 2 and 2. Turn 0 is compared among three (mean 2), turn 1 among two (mean 2). Discounted
    by a half: 2, 1, 1 against 4/3. A turn that one alone reached: 0."""
    method = METHODS["grpo"].model_validate({"name": "grpo", "credit": "turn", "advantage_std": "none"})
    assert method.advantage_N(plan()).tolist() == pytest.approx([1, 1, 0, -1, 0, 0, 0])  # type: ignore[attr-defined]
    half = method.model_copy(update={"discount": 0.5})
    assert half.advantage_N(plan()).tolist() == pytest.approx([2 / 3, 2 / 3, 0, -1 / 3, -1 / 3, 0, 0])  # type: ignore[attr-defined]
    ungraded = plan(graded_R=torch.tensor([True, True, False]))
    assert method.advantage_N(ungraded).tolist() == pytest.approx([1, 1, 0, -1, 0, 0, 0])  # type: ignore[attr-defined]
    by_episode = METHODS["grpo"].model_validate({"name": "grpo", "advantage_std": "none"})
    assert by_episode.advantage_N(plan()).tolist() == [1, 1, 1, -1, 0, 0, 0]  # type: ignore[attr-defined]


def test_an_episode_in_several_rows_counts_once() -> None:
    """Rows 0 and 2 are one episode: its reward is in the group's mean once, its tokens are one sequence."""
    parts = plan(episode_R=torch.tensor([0, 1, 0]), reward_R=torch.tensor([3.0, 1.0, 3.0], **F64))
    method = METHODS["grpo"].model_validate({"name": "grpo", "advantage_std": "none"})
    assert method.advantage_N(parts).tolist() == [1, 1, 1, -1, 1, 1, 1]  # type: ignore[attr-defined]
    assert parts.coefficients("sequence").tolist() == pytest.approx([1 / 12] * 3 + [1 / 2] + [1 / 12] * 3)
    weight_N = RewardSoftmax().apply(parts).weight_N
    high, low = 2 / (1 + np.exp(-2)), 2 / (1 + np.exp(2))
    assert weight_N.tolist() == pytest.approx([high] * 3 + [low] + [high] * 3)


def test_turn_weights() -> None:
    """TurnOPD is the token mean at its start and the turn mean at its end; TCOD lets turns in from either side;
    SAGE-OPD skips a turn that the teacher likes as much, and keeps the mean of weights at 1."""
    for progress, reduction in ((0.0, "token"), (1.0, "turn")):
        weighed = TurnOPD().apply(plan(progress=progress)).coefficients("token")
        assert weighed.tolist() == pytest.approx(plan().coefficients(reduction).tolist())  # type: ignore[arg-type]
    of_domains: dict[str, Any] = {"domain_N": torch.tensor([0] * 4 + [1] * 3), "num_domains": 2}
    weighed = TurnOPD().apply(plan(progress=1.0, **of_domains)).coefficients("token")
    assert weighed.tolist() == pytest.approx(plan(**of_domains).coefficients("turn").tolist())
    front = TCOD(most=2).apply(plan())
    assert front.mask_N.tolist() == [True, True, False, True, True, False, False]
    back = TCOD(most=2, order="b2f").apply(plan())
    assert back.mask_N.tolist() == [False, False, True, True, False, True, True]
    assert TCOD(most=2).apply(plan(progress=0.5)).mask_N.all()
    gap_N = torch.tensor([1.0, -0.5, 0, 2, -1, 1, 1], **F64)  # of the turns: 0.25, 0, 2, -1, 1
    judged = plan(
        student_logprob_N=gap_N,
        view_logprob={"teacher": torch.zeros(7, **F64)},
        view_entropy={"teacher": torch.tensor([0.0] * 3 + [np.log(2)] + [0.0] * 3, **F64)},
    )
    weight_N = SageOPD().apply(judged).weight_N
    assert weight_N.tolist() == pytest.approx([x * 7 / 4.5 for x in (1, 1, 0, 0.5, 0, 1, 1)])


def test_rewards_of_turns_reach_the_batch() -> None:
    """The verdict, what is left of an episode's reward, is earned by the last turn, also in another row."""

    def row(sample_id: int, turns: list[int], rewards: list[float], reward: float, episode: int | None) -> Example:
        problem = Problem(id="p", task="none", messages=())
        rollout = Rollout(
            problem_id="p",
            sample_id=sample_id,
            policy_version=0,
            prompt_ids=(1,),
            answer_ids=tuple(range(len(turns))),
            answer_logprobs=np.zeros(len(turns), dtype=np.float32),
            answer_mask=np.ones(len(turns), dtype=np.bool_),
            finish="stop",
            reward=reward,
            turn=np.array(turns, dtype=np.int16),
            turns=tuple(TurnRecord(finish="stop", reward=one) for one in rewards),
            episode=episode,
        )
        return Example(problem=problem, rollout=rollout)

    whole = row(0, [0, 0, 1], [0.5, 0.25], 1.75, None)
    first, second = row(1, [0, 1], [1.0, 0.0], 3.0, 1), row(9, [2], [0.0], 3.0, 1)
    inputs = Batch([whole, first, second], torch.device("cpu")).plan_inputs(
        step=0, progress=0.0, seed=0, num_ids=9, asked={}, required_views=()
    )
    assert inputs.turn_reward_N is not None and inputs.episode_R is not None
    assert inputs.turn_reward_N.tolist() == [0.5, 0.5, 1.25, 1.0, 0.0, 2.0]
    assert inputs.episode_R.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("method", "settings", "fault"),
    [
        ("grpo", ["method.credit=turn"], r'method.credit = "turn" credits turns .* no \[episode\]'),
        ("grpo", ["method.discount=0.5"], r"method.discount = 0.5 is of credit"),
        ("opd", ["weights.turns.name=tcod"], r'weights.turns.name = "tcod" weighs turns .* no \[episode\]'),
        ("opd", ["weights.turns.name=turn_opd"], r'did you mean "turnopd"'),
        ("opd", ["weights.turns.name=turnopd", "method.reduction=sequence"], r'set it to "token"'),
    ],
)
def test_refusals(method: str, settings: list[str], fault: str) -> None:
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "teacher": {"kind": "model", "path": "t"},
        "data": {"train": "d.jsonl", "task": "math"},
        "method": {"name": method},
        "train": {"steps": 10},
    }
    with pytest.raises(UserError, match=fault):
        parse_recipe(raw, settings)
