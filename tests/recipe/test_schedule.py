"""[schedule]: which value holds at which step, what is refused, and that recipe.toml says it again."""

import tomllib
from typing import Any

import pytest

from opdkit import toml
from opdkit.errors import UserError
from opdkit.recipe import Recipe, parse_recipe, recipe_at, scheduled_at, stage_starts
from opdkit.recipe.points import Points, first_step
from opdkit.types import Asked

BASE: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "teacher": {"kind": "model", "path": "t"},
    "data": {"train": "d.jsonl", "task": "math"},
    "method": {"name": "opd"},
    "train": {"steps": 10},
}


def scheduled(schedule: Any, **sections: Any) -> Recipe:
    return parse_recipe({**BASE, **sections, "schedule": schedule})


def refusal(schedule: Any, **sections: Any) -> str:
    with pytest.raises(UserError) as refused:
        scheduled(schedule, **sections)
    return str(refused.value)


def divergences(recipe: Recipe) -> str:
    return "".join(recipe_at(recipe, step).method.divergence[0] for step in range(recipe.train.steps))  # type: ignore


def test_a_value_holds_from_its_point_on() -> None:
    """Ten steps: 0.5 is step 5 (counted from 0), 0.45 is the first step at or after it, also step 5."""
    assert divergences(scheduled({"divergence": [[0.0, "forward_kl"], [0.5, "reverse_kl"]]})) == "fffffrrrrr"
    assert divergences(scheduled({"divergence": [[0.0, "forward_kl"], [0.45, "reverse_kl"]]})) == "fffffrrrrr"
    assert divergences(scheduled({"divergence": [[0.9, "forward_kl"]]})) == "rrrrrrrrrf", "before: the recipe's own"
    assert stage_starts(scheduled({"divergence": [[0.2, "forward_kl"], [0.9, "reverse_kl"]]})) == [0, 2, 9]


def test_fractions_of_steps_fall_on_steps() -> None:
    """0.1 * 30 and 0.7 * 10 are not whole in floating point; the step they mean is."""
    assert (first_step(0.1, 30), first_step(0.7, 10), first_step(0.0, 7), first_step(1 / 3, 3)) == (3, 7, 0, 1)
    for steps in (3, 7, 10, 30, 49, 1000):
        assert all(first_step(step / steps, steps) == step for step in range(steps))


def test_two_stages_by_name() -> None:
    """PACED: half and half unless it is told where."""
    assert divergences(scheduled({"divergence": "forward_then_reverse"})) == "fffffrrrrr"
    assert divergences(scheduled({"divergence": {"name": "forward_then_reverse", "at": 0.2}})) == "ffrrrrrrrr"
    both = scheduled({"divergence": "forward_then_reverse", "answers": "teacher_then_student"})
    assert [recipe_at(both, step).method.answer_source for step in (0, 4, 5, 9)] == ["teacher"] * 2 + ["student"] * 2


def test_numbers_move_on_lines_if_asked() -> None:
    """1.2 at the start, 0.8 at three quarters, and that until the end. A line is no stage."""
    recipe = scheduled(
        {"sampling": {"temperature": {"points": [[0.0, 1.2], [0.75, 0.8]], "shape": "linear"}}}, train={"steps": 8}
    )
    values = [recipe_at(recipe, step).sampling.temperature for step in range(8)]
    assert values[0] == 1.2 and values[3] == pytest.approx(1.0) and values[6:] == [0.8, 0.8]
    assert recipe.sampling.temperature == 1.2 and stage_starts(recipe) == [0]
    assert Points(points=((0.5, 1.0), (1.0, 2.0)), shape="linear").at(0.1) == 1.0


def test_weights_change_and_come_late() -> None:
    recipe = scheduled(
        {"weights": {"tokens": [[0.5, {"name": "soft_or", "keep": 0.3}]]}}, weights={"importance": {"cap": 3.0}}
    )
    before, after = recipe_at(recipe, 4).weights, recipe_at(recipe, 5).weights
    assert before.tokens is None and after.tokens is not None and after.tokens.keep == 0.3  # type: ignore[attr-defined]
    assert before.importance == after.importance and before.needs.teacher is None
    assert after.needs.student and after.needs.teacher == Asked("distribution")


def test_what_a_default_brought_goes_with_it() -> None:
    """SDPO's teacher_share and scale belong to its JSD; `k` belongs to a top-k support. A key that was written stays,
    and is refused where it has no meaning, unless both are changed together."""
    sdpo = {"method": {"name": "sdpo"}, "sampling": {"group_size": 8}, "train": {"steps": 20}, "teacher": {}}
    recipe = scheduled({"divergence": [[0.5, "forward_kl"]]}, **sdpo)
    again = parse_recipe(tomllib.loads(toml.dumps(recipe.as_dict())))
    for r in (recipe, again):
        late: Any = recipe_at(r, 10).method
        assert (late.teacher_share, late.jsd_scale, late.k) == (None, "continuous", 100)
    jsd = {"name": "opd", "divergence": "jsd", "teacher_share": 0.3}
    assert "teacher_share = 0.3 has no meaning for 'reverse_kl'" in refusal(
        {"divergence": [[0.5, "reverse_kl"]]}, method=jsd
    )
    together = [[0.0, {"divergence": "jsd", "teacher_share": 0.3}], [0.5, {"divergence": "reverse_kl"}]]
    assert divergences(scheduled({"method": together})) == "jjjjjrrrrr"


@pytest.mark.parametrize(
    "schedule",
    [
        {"divergence": "forward_then_reverse"},
        {"method": [[0.0, {"divergence": "jsd", "teacher_share": 0.5}], [0.5, {"divergence": "reverse_kl"}]]},
        {"sampling.temperature": {"points": [[0.2, 1.2], [1.0, 0.8]], "shape": "linear"}, "clip_at": [[0.5, 0.1]]},
        {"weights": {"tokens": [[0.5, {"name": "soft_or"}]]}, "support": [[0.5, "student_topk"]], "k": [[0.5, 4]]},
    ],
)
def test_the_resolved_recipe_says_all_of_it(schedule: Any) -> None:
    """Reading recipe.toml back gives the same recipe and the same stages."""
    recipe = scheduled(schedule)
    again = parse_recipe(tomllib.loads(toml.dumps(recipe.as_dict())))
    assert again == recipe
    for step in range(10):
        assert recipe_at(again, step) == recipe_at(recipe, step)
        assert scheduled_at(again, step) == scheduled_at(recipe, step)


def test_set_reaches_the_schedule() -> None:
    recipe = parse_recipe(BASE, ["schedule.divergence=forward_then_reverse", "schedule.method.clip_at=[[0.5, 0.1]]"])
    assert divergences(recipe) == "fffffrrrrr" and recipe_at(recipe, 5).method.clip_at == 0.1  # type: ignore


def test_set_has_the_last_word() -> None:
    """A resolved recipe names every key; a schedule from --set is later. A section from --set is not overruled."""
    resolved = parse_recipe(BASE).as_dict()
    twice = "schedule.divergence={name = 'forward_then_reverse', at = 0.2}"
    again = parse_recipe(resolved, [twice])
    assert divergences(again) == "ffrrrrrrrr"
    together = 'schedule.method=[[0.0, {divergence = "jsd", teacher_share = 0.5}], [0.5, {divergence = "reverse_kl"}]]'
    assert divergences(parse_recipe(resolved, [together])) == "jjjjjrrrrr"
    with pytest.raises(UserError, match=r"method\.divergence = 'forward_kl' is never read"):
        parse_recipe(resolved, ["method.divergence=forward_kl", 'schedule.divergence=[[0.0, "reverse_kl"]]'])
    with pytest.raises(UserError, match=r"method\.divergence = 'jsd' is never read"):
        parse_recipe(again.as_dict(), ["method.divergence=jsd"])


@pytest.mark.parametrize(
    ("schedule", "sections", "words"),
    [
        ({"divergense": "forward_then_reverse"}, {}, 'method.divergense is not a key; did you mean "divergence"?'),
        ({"divergence": "forward_then_revers"}, {}, 'did you mean "forward_then_reverse"?'),
        (
            {"divergence": [[0.0, "forward_kl"], [0.5, "revers_kl"]]},
            {},
            "at 0.5 of the steps: method.divergence = 'rev",
        ),
        ({"divergence": [[0.5, "jsd"]]}, {}, "[schedule] at 0.5 of the steps: divergence 'jsd' needs teacher_share"),
        ({"divergence": [[0.5, "forward_kl"], [0.2, "reverse_kl"]]}, {}, "each above the last"),
        ({"divergence": [[0.0, "forward_kl"], [1.5, "reverse_kl"]]}, {}, "fractions of the steps, 0.0 to 1.0"),
        ({"divergence": [["half", "forward_kl"]]}, {}, "fractions of the steps, 0.0 to 1.0"),
        ({"divergence": 3}, {}, "write [[0.0, VALUE], [0.5, OTHER]]"),
        ({"divergence": {}}, {}, "write [[0.0, VALUE], [0.5, OTHER]]"),
        ({"divergence": []}, {}, "write [[0.0, VALUE], [0.5, OTHER]]"),
        (3, {}, "schedule = 3 is not a section"),
        ({"divergence": {"name": "forward_then_reverse", "at": 1.0}}, {}, "at between 0 and 1"),
        ({"divergence": [[0.0, "forward_kl"], [0.51, "jsd"], [0.55, "reverse_kl"]]}, {}, "'jsd' from 0.51 on is never"),
        ({"divergence": [[0.0, "forward_kl"], [0.95, "reverse_kl"]]}, {}, "train.steps = 10 has no step there"),
        ({"divergence": "forward_then_reverse"}, {"method": {"name": "opd", "divergence": "jsd"}}, "is never read"),
        ({"divergence": "forward_then_reverse", "method.divergence": [[0.5, "jsd"]]}, {}, "a second time"),
        ({"method": [[0.0, {"clip_at": 1.0}]], "clip_at": [[0.5, 2.0]]}, {}, "both speak of clip_at; keep one"),
        ({"method": [[0.5, "reverse_kl"]]}, {}, "its values are tables"),
        ({"method": [[0.5, {"name": "grpo"}]]}, {}, "its values are tables of the method's keys but its name"),
        ({"train": {"lr": [[0.0, 1e-3]]}}, {}, "the learning rate has train.schedule"),
        ({"method": {"name": [[0.5, "grpo"]]}}, {}, "chain several with `opdkit pipeline`"),
        ({"sampling": {"group_size": [[0.5, 2]]}}, {}, "what can: keys of method and weights, and sampling.temp"),
        ({"weights": 3}, {}, "name one of its keys"),
        ({"weights": {"tokens": [[0.5, {"name": "soft_o"}]]}}, {}, 'did you mean "soft_or"?'),
        ({"weights": {"tokens": {"keep": [[0.5, 0.4]]}}}, {}, "weights.tokens.name is missing"),
        ({"sampling": {"temperature": [[0.5, -1.0]]}}, {}, "sampling.temperature = -1.0: input should be greater"),
        ({"clip_at": {"points": [[0.0, 1.0], [1.0, "x"]], "shape": "linear"}}, {}, "moves between two or more numbers"),
        ({"clip_at": {"points": [[0.0, 1.0]], "shape": "cubic"}}, {}, 'shape ("steps" or "linear")'),
        (
            {"support": [[0.0, "student_topk"]], "k": {"points": [[0.0, 1.5], [1.0, 4]], "shape": "linear"}},
            {},
            "integer",
        ),
        ({"support": [[0.5, "sampled"]], "answers": [[0.5, "teacher"]]}, {}, "tokens that the student drew"),
        ({"kl_weight": [[0.5, 0.1]]}, {"method": {"name": "grpo"}, "teacher": {}}, "at 0.5 of the steps: method.name"),
        ({"answers": "teacher_then_student"}, {"weights": {"problems": {"name": "paced"}}}, "set pass_rate = "),
    ],
)
def test_what_is_refused_and_how(schedule: Any, sections: dict[str, Any], words: str) -> None:
    """Every stage is refused when the recipe is read, in a sentence that says which. Not every possible slip."""
    assert words in refusal(schedule, **sections)


def test_a_teacher_that_one_stage_asks_is_not_unused() -> None:
    """GRPO whose distance to a reference comes in half-way; without that stage the teacher is refused as unused."""
    grpo: dict[str, Any] = {"method": {"name": "grpo"}, "train": {"steps": 20}}
    assert recipe_at(scheduled({"kl_weight": [[0.5, 0.1]]}, **grpo), 10).needs.teacher == Asked("sampled")
    assert "never asks" in refusal({"dual_clip": [[0.5, 3.0]]}, **grpo)


def test_a_longer_run_would_be_another_schedule() -> None:
    """Half of the steps is another step then."""
    from opdkit.training.saved.resume import check_same_recipe

    short, long = (scheduled({"divergence": "forward_then_reverse"}, train={"steps": n}).as_dict() for n in (10, 20))
    with pytest.raises(UserError, match=r"train\.steps was 10, is 20"):
        check_same_recipe(short, long, steps_taken=5)


def test_lengths_weights_of_views_and_numbers_of_contexts_change() -> None:
    """Counts stay whole on a line; a view of weight 0 is nobody's; the recipe in the folder says the same."""
    initial = {"teacher": {"kind": "self", "weights": "initial"}}
    sections: dict[str, Any] = {
        "context": {"kind": "text", "text": "know"},
        "views": {"reference": {**initial, "context": {"kind": "text", "text": "no"}}},
    }
    schedule = {
        "sampling": {"max_answer_tokens": {"points": [[0.0, 100], [1.0, 200]], "shape": "linear"}},
        "target": {"reference": {"points": [[0.0, 0], [1.0, -1.0]], "shape": "linear"}},
        "context": {"max_tokens": [[0.5, 7]]},
        "views": {"reference": {"context": {"max_tokens": {"points": [[0.0, 1], [1.0, 2]], "shape": "linear"}}}},
    }
    recipe = scheduled(schedule, **sections)
    assert recipe.longest_answer == 200 and recipe.sampling.max_answer_tokens == 100
    for read in (recipe, parse_recipe(toml_again(recipe))):
        first, later = recipe_at(read, 0), recipe_at(read, 5)
        assert (first.sampling.max_answer_tokens, later.sampling.max_answer_tokens) == (100, 150)
        assert [dict(r.method.target) for r in (first, later)] == [  # type: ignore[attr-defined]
            {"teacher": 1.0},
            {"teacher": 1.0, "reference": -0.5},
        ]
        assert set(first.needs.views) == {"teacher"} and set(later.needs.views) == {"teacher", "reference"}
        assert (first.context.max_tokens, later.context.max_tokens) == (8192, 7)  # type: ignore[attr-defined]
        assert recipe_at(read, 9).views["reference"].context.max_tokens == 2  # type: ignore[attr-defined]


def toml_again(recipe: Recipe) -> Any:
    return tomllib.loads(toml.dumps(recipe.as_dict()))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"context": {"kind": [[0.5, "none"]]}}, "of a context only numbers can change"),
        ({"context": {"max_token": [[0.5, 3]]}}, "context.max_token is not a key"),
        ({"context": {"max_tokens": [[0.5, 0]]}}, "context.max_tokens = 0"),
        ({"views": {"x": {"count": [[0.5, 2]]}}}, "cannot change over training"),
        ({"sampling": {"max_answer_tokens": [[0.5, 1.5]]}}, "sampling.max_answer_tokens = 1.5"),
        ({"mixture": {"teacher": [[0.5, 0.5]]}}, "sum to 1"),
    ],
)
def test_what_of_a_context_cannot_change(schedule: Any, words: str) -> None:
    assert words in refusal(schedule, context={"kind": "text", "text": "know"})
