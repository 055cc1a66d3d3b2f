"""A method's own views: they stand below the recipe's, section by section."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from opdkit import toml
from opdkit.errors import UserError
from opdkit.methods import METHODS
from opdkit.recipe import Recipe, parse_recipe
from opdkit.recipe.rules.departures import departures

TEACHER = {"kind": "model", "path": "t"}


def recipe(name: str, *overrides: str, **sections: Any) -> Recipe:
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "data": {"train": "d.jsonl", "task": "math"},
        "method": {"name": name},
        "train": {"steps": 100},
    }
    return parse_recipe({**raw, **sections}, overrides)


def test_views_of_a_method_need_no_word() -> None:
    """rlcsd's two hints: who reads them, what, how often; the wording of both is one and the same."""
    views = recipe("rlcsd").views
    assert list(views) == ["right", "wrong"] and (views["right"].count, views["wrong"].count) == (1, 4)
    right, wrong = (views[name].context.model_dump() for name in ("right", "wrong"))
    assert (right["slots"], wrong["slots"]) == (("success",), ("failure",))
    assert right["wording"]["success"] == wrong["wording"]["failure"]
    assert {key for key in right if right[key] != wrong[key]} == {"slots"}


def test_one_key_of_a_view_leaves_the_others() -> None:
    """In the file or by --set; other views stay as they are."""
    views = recipe("rlcsd", "views.wrong.count=2", views={"right": {"context": {"max_tokens_per_peer": 64}}}).views
    assert views["wrong"].count == 2 and views["right"].context.max_tokens_per_peer == 64  # type: ignore[attr-defined]
    assert views["right"].context.slots == ("success",)  # type: ignore[attr-defined]
    assert views["wrong"].context.max_tokens_per_peer == 4096  # type: ignore[attr-defined]


def test_another_kind_or_other_weights_start_afresh() -> None:
    """The reference as a model of its own has no weights = "initial"; a hint of another kind has no slots; an average
    that becomes the initial weights loses its rate. Each section by itself."""
    own = recipe("exopd", teacher=TEACHER, views={"reference": {"teacher": {"kind": "model", "path": "base"}}})
    assert own.views["reference"].teacher.weights is None and own.views["reference"].context.kind == "none"
    hints = recipe("rlcsd", views={"right": {"context": {"kind": "reference_solution"}}}).views
    assert hints["right"].context.kind == "reference_solution" and hints["right"].teacher.weights == "initial"
    other = recipe("rlcsd", "views.right.teacher.weights=ema", "views.right.teacher.ema_rate=0.1").views["right"]
    assert (other.teacher.kind, other.teacher.ema_rate, other.context.kind) == ("self", 0.1, "peers")


def test_views_that_the_keys_do_not_ask_are_not_there() -> None:
    """c = 1 is plain OPD, a = 1 has no anchor: nobody loads or copies a reference. One that is written is refused."""
    assert recipe("exopd", "method.reward_scale=1.0", teacher=TEACHER).views == {}
    assert recipe("sr_opsd", "method.teacher_exponent=1.0").views == {}
    with pytest.raises(UserError, match=r"views\.reference\] is not used by method\.name"):
        written = {"reference": {"teacher": {"kind": "self", "weights": "initial"}}}
        recipe("exopd", "method.reward_scale=1.0", teacher=TEACHER, views=written)


@pytest.mark.parametrize("written", [3, {"right": 3}, {"right": {"context": 3}}, {"right": {"teacher": 3}}])
def test_what_is_no_view_is_refused(written: Any) -> None:
    with pytest.raises(UserError, match="views"):
        recipe("rlcsd", views=written)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"contxt": {}}, r'views\.right\.contxt is not a key; did you mean "context"'),
        ({"teacher": {"weihts": "ema"}}, r'views\.right\.teacher\.weihts is not a key; did you mean "weights"'),
    ],
)
def test_a_typo_in_a_view_is_told_what_was_meant(view: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe("rlcsd", views={"right": view})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "views" in method.defaults])
def test_resolved_recipes_read_back_and_depart_from_nothing(name: str) -> None:
    teacher = {} if "teacher" in METHODS[name].defaults or name == "rlcsd" else {"teacher": TEACHER}
    first = recipe(name, **teacher)
    assert parse_recipe(tomllib.loads(toml.dumps(first.as_dict()))) == first
    assert departures(first) is None


def test_departures_name_keys_of_views() -> None:
    """One line: the paper's value behind each; of a section of another kind the kind alone."""
    said = departures(recipe("rlcsd", "views.wrong.count=2", "views.right.context.kind=reference_solution"))
    assert said == (
        'not as rlcsd has it by default: views.right.context.kind = "reference_solution" ("peers"), '
        "views.wrong.count = 2 (4)"
    )
