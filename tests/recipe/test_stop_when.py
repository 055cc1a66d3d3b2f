"""Conditions in words, and what a recipe may choose by. No model."""

from __future__ import annotations

import pytest

from opdkit.data.files.names import metric_names
from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe, warnings
from opdkit.recipe.stop_when import condition, is_more_better


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("eval/d/avg_at_n >= 0.8", [0.1, 0.8], True),
        ("eval/d/avg_at_n>0.8", [0.9, 0.8], False),
        ("eval/d/avg_at_n > 0.8", [], False),
        ("train/loss < 1e-2 for 3", [0.5, 0.001, 0.002, 0.003], True),
        ("train/loss < 1e-2 for 3", [0.5, 0.001, 0.02, 0.003], False),
        ("train/loss <= 0.5 for 3", [0.5, 0.5], False),
        ("eval/d/avg_at_n stalls for 2", [0.5, 0.6, 0.6, 0.59], True),
        ("eval/d/avg_at_n stalls for 2", [0.5, 0.6, 0.6, 0.61], False),
        ("eval/d/avg_at_n stalls for 2", [0.5, 0.4], False),  # no best before them
        ("eval/d/pass_at_8 stalls for 1", [0.5, 0.4], True),
        ("eval/d/reverse_kl stalls for 1", [0.5, 0.4], False),  # less is better
    ],
)
def test_conditions(text: str, values: list[float], holds: bool) -> None:
    assert condition(text).holds(values) is holds


@pytest.mark.parametrize(
    "text",
    ["", "loss < 1", "train/loss", "train/loss < one", "train/loss < 1 for 0", "train/loss stalls for 3", "a/b = 1"],
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no condition|what stalls must be"):
        condition(text)


def test_names_of_sets() -> None:
    assert metric_names(["a/b.jsonl", "a_b.jsonl", "..."]) == {
        "a/b.jsonl": "a_b.jsonl", "a_b.jsonl": "a_b.jsonl-2", "...": "data",
    }  # fmt: skip
    assert is_more_better("eval/d/answer_tokens") is None and is_more_better("train/loss") is None


def recipe(*settings: str) -> Recipe:
    raw = {
        "name": "run",
        "model": {"path": "m"},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic"},
        "method": {"name": "grpo"},
        "sampling": {"group_size": 4},
        "train": {"steps": 10},
        "eval": {"data": "arithmetic:merge-3:test", "samples": 6, "every": 5},
    }
    return parse_recipe(raw, settings)


REPORTED, OTHER = "eval/arithmetic_merge-3_test", "eval/arithmetic_merge-4_test"
ON = "eval.select_on=arithmetic:merge-4:test"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("train.keep_best=eval/x/avg_at_n",), "no set of eval.data or eval.select_on"),
        (("train.keep_best=train/loss",), "is no number to choose by"),
        ((f"train.keep_best={REPORTED}/answer_tokens",), "is no number to choose by"),
        ((f"train.keep_best={REPORTED}/pass_at_8",), "known for k = 1, 2, 4, 6"),
        ((f"train.keep_best={REPORTED}/avg_at_n", "eval.every=0"), "makes none before the last step"),
        (("train.stop_when=nonsense",), "is no condition"),
        ((f"train.stop_when={OTHER}/avg_at_n > 1",), "no set of eval.data or eval.select_on"),
        (("eval.select_on=arithmetic:merge-3:test",), "is in eval.data too"),
        (("train.average_last=3",), "train.keep_checkpoints = 2; raise that"),
        (("train.average_last=2", "model.lora.r=4"), "mean of LoRA's factors"),
        (("train.average_last=2", "train.save_every=0"), "set train.save_every"),
    ],
)
def test_what_a_recipe_cannot_ask(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe(*settings)
    assert said in str(refused.value)


def test_choosing_on_what_is_reported_is_said() -> None:
    best = f"train.keep_best={REPORTED}/avg_at_n"
    assert any(
        "the best of several numbers flatters; name another set in eval.select_on" in s for s in warnings(recipe(best))
    )
    assert any(
        "train.stop_when chooses on" in s for s in warnings(recipe(f"train.stop_when={REPORTED}/avg_at_n > 0.9"))
    )
    chosen = recipe(ON, f"train.keep_best={OTHER}/pass_at_6", "train.stop_when=train/loss < 0.1")
    assert not any("flatters" in sentence for sentence in warnings(chosen))
    assert chosen.eval.sources == ("arithmetic:merge-3:test", "arithmetic:merge-4:test")
