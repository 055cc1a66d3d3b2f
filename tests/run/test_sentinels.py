"""What the sentinels find in a run's numbers, and what is decided. No model: a run is its lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from opdkit.errors import UserError
from opdkit.measure.repetition import ends_in_a_loop
from opdkit.recipe import Recipe, parse_recipe, warnings
from opdkit.recipe.sentinels import SENTINELS
from opdkit.run.history import History
from opdkit.run.sentinels import LOOKS, WATCHED, find, judge

Line = dict[str, Any]


def recipe(*settings: str, method: str = "grpo") -> Recipe:
    raw = {
        "name": "run",
        "model": {"path": "m", "dtype": "float32"},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic"},
        "sampling": {"group_size": 4},
        "method": {"name": method},
        "train": {"steps": 100},
        "sentinels": {"window": 3},
        "diagnostics": {"every": 1},
    }
    return parse_recipe(raw, settings)


def step(number: int) -> Line:
    """Of a run that goes as it should: some noise, a reward that rises."""
    noise = (number * 7 % 5 - 2) / 100
    return {
        "step": number,
        "rollout/answer_tokens": 100 + 100 * noise,
        "rollout/num_rows": 64.0,
        "rollout/num_looping": 1.0,
        "rollout/num_truncated": 5.0,
        "rollout/reward": min(0.8, 0.5 + number / 100) + noise,
        "rollout/share_of_groups_with_one_reward": 0.4 + noise,
        "rollout/sampler_gap_bias": noise / 1000,
        "rollout/sampler_gap_p999": 0.01,
        "rollout/ess": 0.95 + noise,
        "rollout/lag": 0.0,
        "student/entropy": 1.0 - number / 100,
        "overlap/mass_teacher": 0.95 + noise,
        "train/loss": 1.0 - number / 100,
        "train/grad_norm": 1.0,
    }


def run(num: int = 20, **late: Any) -> History:
    """The last five steps have other values, under names with _ for /: a number, or of the number of steps."""
    lines = [step(number) for number in range(1, num + 1)]
    for line in lines[-5:]:
        line |= {name.replace("__", "/"): v(line["step"]) if callable(v) else v for name, v in late.items()}
    return History.of(lines, num)


def evaluation(at: int, value: float) -> Line:
    low, high = value - 0.02, value + 0.02
    name = "eval/d/pass_at_8"
    return {"step": at, "eval/d/pass_at_1": 0.5, name: value, f"{name}_low": low, f"{name}_high": high}


def names(history: History, chosen: Recipe) -> list[str]:
    return [finding.name for finding in find(history, chosen)]


PROVOKED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"rollout__answer_tokens": 320.0}, "3.2 times what they were"),
    "repetition": (
        {"rollout__num_looping": 20.0},
        "31% of the answers end in the same tokens again and",
    ),
    "unending": ({"rollout__num_truncated": 40.0}, "62% of the answers do not end"),
    "entropy": ({"student__entropy": 0.04}, "entropy is 0.04 nats, 4.1% of"),
    "reward": (
        {"rollout__reward": lambda n: 0.3 + n % 2 / 100},
        "reward has fallen to 0.303, from 0.637 around",
    ),
    "non_finite": ({"train__loss": None}, "the loss is not finite: the step changed nothing"),
    "teacher_mass": ({"overlap__mass_teacher": 0.8}, "gives 80% of its probability"),
    "sampler_gap": ({"rollout__sampler_gap_bias": -0.01}, "differ by -0.01 nats"),
    "stale_sampler": ({"rollout__ess": 0.3, "rollout__lag": 2.0}, "worth 30% as many"),
    "no_signal": ({"rollout__share_of_groups_with_one_reward": 0.97}, "in 97% of the groups"),
}


@pytest.mark.parametrize("name", PROVOKED)
def test_each_sentinel_finds_its_own_fault_and_no_other(name: str) -> None:
    """A run that goes well is silent at every length; false turns a sentinel off; a run of a step has no trend."""
    late, said = PROVOKED[name]
    (finding,) = find(run(**late), recipe())
    assert finding.name == name and said in finding.sentence
    off = [f"sentinels.{name}=false"] + (["sentinels.sampler_gap_p999=false"] if name == "sampler_gap" else [])
    assert not names(run(**late), recipe(*off))
    assert not names(run(4, **late), recipe()) or name in ("non_finite", "sampler_gap", "stale_sampler", "no_signal")


def test_a_run_that_goes_well_is_silent() -> None:
    for num in range(1, 60):
        assert names(run(num), recipe()) == []


@pytest.mark.parametrize(
    ("late", "found"),
    [
        ({"rollout__answer_tokens": 30.0}, ["length"]),  # collapse
        ({"rollout__answer_tokens": 290.0, "student__entropy": 0.06}, []),  # within the limits
        ({"train__grad_norm": float("inf")}, ["non_finite"]),
        ({"train__loss": float("nan"), "rollout__sampler_gap_p999": float("nan")}, ["non_finite", "sampler_gap"]),
        ({"rollout__reward": 0.3, "train__loss": 2.0}, []),  # the loss says so itself
        ({"rollout__reward": lambda n: n % 2 * 1.0}, []),  # within the noise
        ({"rollout__reward": None, "rollout__ess": None, "overlap__mass_teacher": None}, []),  # not known
    ],
)
def test_limits_and_what_is_not_known(late: Any, found: Any) -> None:
    history = run(**late)
    assert names(history, recipe()) == found
    assert names(History.of([{**line, "more/of_it": 1.0} for line in history.steps], 20, WATCHED), recipe()) == found


def test_groups_without_signal_matter_where_rewards_are_compared() -> None:
    assert not names(run(rollout__share_of_groups_with_one_reward=1.0), recipe(method="sft"))


def test_length_is_measured_by_a_limit_that_is_scheduled() -> None:
    history = run(rollout__answer_tokens=400.0)
    for line in history.steps:
        line["schedule/sampling.max_answer_tokens"] = 128 if line["step"] <= 15 else 512
    assert not names(history, recipe())


def test_pass_at_k_is_judged_when_it_is_measured() -> None:
    """Of the largest k, against the first evaluation, once: after the step that follows it."""
    lines = [step(n) for n in range(1, 12)]
    falling = [evaluation(0, 0.9), *lines[:5], evaluation(5, 0.89), *lines[5:10], evaluation(10, 0.8)]
    (finding,) = find(History.of([*falling, lines[10]], 11), recipe())
    assert finding.name == "pass_at_k" and "0.8 after 10 steps, and was 0.9 after 0" in finding.sentence
    assert finding.since == 6
    assert names(History.of(falling, 10), recipe()) == ["pass_at_k"]  # the last evaluation, which no step follows
    assert not names(History.of([*falling, lines[10], step(12)], 12), recipe())
    near = [evaluation(0, 0.9), *lines[:10], evaluation(10, 0.87)]
    assert not names(History.of(near, 10), recipe("sentinels.pass_at_k=0.01"))  # the intervals overlap


def decided(history: History, chosen: Recipe, rollbacks: int = 0) -> tuple[str, list[str]]:
    verdict = judge(history, chosen, num_rollbacks=rollbacks)
    return verdict.action, [one.name for one in verdict.because]


def test_a_finding_is_acted_upon_when_it_is_new() -> None:
    """Not again by the steps behind a pause; again once it has been gone for a window."""
    chosen = recipe("sentinels.action=pause")
    history, actions = History(), []
    for number in range(1, 22):
        history.add(step(number) | ({"train/loss": None} if number in (5, 6, 7, 9, 14) else {}))
        verdict = judge(history, chosen)
        history.steps[-1] |= {metric.name: metric.value for metric in verdict.metrics()}
        actions += [number] if verdict.action == "pause" else []
    assert actions == [5, 14]
    again = History.of(json.loads(json.dumps(history.steps[:5])), 5)  # what a resumed run reads decides the same
    assert judge(again, chosen) == judge(History(history.steps[:5]), chosen)


def test_what_acts() -> None:
    """No learning rate mends a sampler; the fourth rollback is a stop; `acting` narrows; warn never acts."""
    history = run(train__loss=None, rollout__ess=0.2)
    assert decided(history, recipe()) == ("none", [])
    rollback = "sentinels.action=rollback"
    assert decided(history, recipe(rollback)) == ("rollback", ["non_finite"])
    assert decided(history, recipe(rollback), rollbacks=2)[0] == "rollback"
    assert decided(history, recipe(rollback), rollbacks=3)[0] == "stop"
    assert decided(history, recipe("sentinels.action=stop"))[1] == ["non_finite", "stale_sampler"]
    assert decided(history, recipe("sentinels.action=stop", "sentinels.acting=['length']")) == ("none", [])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("sentinels.action=rollback", "train.save_every=0"), "train.save_every = 0 writes none before the end"),
        (("sentinels.action=rollback", "sentinels.acting=['no_signal']"), "does not mend no_signal"),
        (("sentinels.acting=['lenght']",), 'did you mean "length"'),
        (("sentinels.length=0.5",), "sentinels.length"),
        (("sentinels.action=panic",), "sentinels.action"),
    ],
)
def test_what_a_recipe_cannot_ask(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe(*settings)
    assert said in str(refused.value)


def test_a_run_that_is_too_short_for_trends_is_told() -> None:
    said = [
        sentence for sentence in warnings(recipe("sentinels.action=stop", "train.steps=5")) if "sentinels" in sentence
    ]
    assert len(said) == 1 and "train.steps = 5 are fewer than two" in said[0]
    assert not any(
        "sentinels" in s for s in [*warnings(recipe("train.steps=5")), *warnings(recipe("sentinels.action=stop"))]
    )


def test_every_sentinel_has_a_key_and_a_look() -> None:
    assert LOOKS.keys() == SENTINELS.keys() == PROVOKED.keys() | {"pass_at_k"}
    section = recipe().sentinels
    assert all(hasattr(section, name) for name in SENTINELS)


Tokens = Callable[[], list[int]]


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([], False),
        ([7] * 31, False),
        ([1, 2, 3] + [7] * 32, True),
        ([*range(100)], False),
        ([*range(9)] * 4, True),
        ([*range(9)] * 4 + [0, 1], True),  # cut within the block
        ([*range(9)] * 3, False),
        ([*range(9)] * 4 + [99], False),  # it got out of it
        ([*range(256)] * 4, True),
        ([*range(257)] * 4, False),
        ([1, 1, 1, 2] * 8, True),
    ],
)
def test_loops(ids: list[int], loops: bool) -> None:
    assert ends_in_a_loop(ids) is loops
