"""The recipe's [schedule]: what changes while a run trains. Every stage is built, and refused, when the recipe is read.

    divergence = [[0.0, "forward_kl"], [0.5, "reverse_kl"]]     from 0 and from half of the steps on
    divergence = "forward_then_reverse"                         the same by name; { name = ..., at = 0.3 } moves it
    sampling.temperature = { points = [[0.0, 1.2], [1.0, 0.8]], shape = "linear" }

    method = [[0.0, { divergence = "jsd", teacher_share = 0.5 }], [0.5, { divergence = "reverse_kl" }]]    keys together

Keys of [method] (a bare key is one; `target.NAME` is the weight of a view), of [weights], of [sampling] how tokens are
drawn and how many, and the numbers of contexts. Before its first point a key is what the recipe's own section says. A
number that must be whole is rounded on its line. The learning rate has `train.schedule` and `train.warmup_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from opdkit.methods.base import Method
from opdkit.methods.weighting import Weights
from opdkit.recipe.build import choice, chosen_weights, sentences
from opdkit.recipe.fields import did_you_mean, kinds_of
from opdkit.recipe.points import Points, first_step
from opdkit.recipe.sections import Recipe, SamplingSection
from opdkit.recipe.user_code import CONTEXT, METHOD, class_of

# Two stages by name. PACED (arXiv:2603.11178) trains the first half of the steps with forward KL on the teacher's
# answers, the second half with reverse KL on the student's.
NAMED: Mapping[str, tuple[str, str]] = {
    "forward_then_reverse": ("forward_kl", "reverse_kl"),
    "teacher_then_student": ("teacher", "student"),
}
NAMED_SWITCH = 0.5

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "max_answer_tokens")
_FORMS = (
    "write [[0.0, VALUE], [0.5, OTHER]], from those fractions of the steps on, or "
    '{ points = [...], shape = "linear" } to move between numbers'
)


def read_schedule(section: Any, faults: list[str]) -> dict[str, Points]:
    """{"method.divergence": Points, ...} of the section as it stands in the file."""
    if not isinstance(section, Mapping):
        faults.append(f"schedule = {section!r} is not a section; {_FORMS} for each key")
        return {}
    schedule: dict[str, Points] = {}
    for written, value in _leaves(section):
        key = _full(written)
        fault = _not_for_schedules(key)
        if fault is None and key in schedule:
            fault = f"schedule.{written} says {key} a second time; keep one of the two"
        found = _points(f"schedule.{written}", value) if fault is None else fault
        if isinstance(found, Points) and _of_context(key) and not all(_is_number(v) for _, v in found.points):
            found = f"schedule.{written}: of a context only numbers can change, not {[v for _, v in found.points]!r}"
        if isinstance(found, str):
            faults.append(found)
        else:
            schedule[key] = found
    faults += _not_together(schedule)
    return schedule


def start_with(
    schedule: Mapping[str, Points],
    sections: MutableMapping[str, Any],
    faults: list[str],
    said_last: Collection[str] = (),
) -> None:
    """Write into `sections` what the schedule says at step 0. Another value there would never be read: a fault.

    said_last: the keys of --set. A schedule among them has the last word over a section that is not.
    """
    settled = [_full(key.removeprefix("schedule.")) for key in said_last if key.startswith("schedule.")]
    for key, points in schedule.items():
        from_set = any(f"{other}.".startswith(f"{key}.") for other in settled)
        if not points.defined_at(0.0):
            continue
        value = points.at(0.0)
        together = {f"method.{name}": v for name, v in value.items()} if key == "method" else {key: value}
        for key, value in together.items():
            own = _get(sections, key)
            if own is not None and own != value and (key in said_last or not from_set):
                faults.append(
                    f"[schedule] has {key} begin with {value!r}, so {key} = {own!r} is never read; remove one of the "
                    "two, set them to the same, or begin the schedule above 0.0"
                )
            _put(sections, key, value)


def _full(written: str) -> str:
    """The dotted key: one without a section is the method's."""
    return written if written.partition(".")[0] in Recipe.model_fields else f"method.{written}"


def stage_starts(recipe: Recipe) -> list[int]:
    """The steps, counted from 0, at which a value of the schedule begins to hold; the first is 0."""
    steps = recipe.train.steps
    fractions = {f for points in recipe.schedule.values() if points.shape == "steps" for f, _ in points.points}
    return sorted({0, *(first_step(fraction, steps) for fraction in fractions)})


def scheduled_at(recipe: Recipe, step: int) -> dict[str, Any]:
    """{key: the value it is scheduled to have} for the step that is taken after `step` others."""
    return _values_at(recipe, step / recipe.train.steps)


def _values_at(recipe: Recipe, progress: float) -> dict[str, Any]:
    values = {key: points.at(progress) for key, points in recipe.schedule.items() if points.defined_at(progress)}
    return {
        key: round(v) if isinstance(v, float) and _is_whole(recipe, key, recipe.schedule[key]) else v
        for key, v in values.items()
    }


def _is_whole(recipe: Recipe, key: str, points: Points) -> bool:
    """Whether it moves between whole numbers, and takes no others."""
    if not all(isinstance(value, int) for _, value in points.points):
        return False
    *path, last = key.split(".")
    section: Any = recipe
    for part in path:
        section = section.get(part) if isinstance(section, Mapping) else getattr(section, part, None)
    field = type(section).model_fields.get(last) if isinstance(section, BaseModel) else None
    return field is not None and kinds_of(field.annotation) == {int}


def recipe_at(recipe: Recipe, step: int) -> Recipe:
    """The recipe, without a schedule, of the step that is taken after `step` others."""
    if not recipe.schedule:
        return recipe
    faults: list[str] = []
    stage = _changed(recipe, scheduled_at(recipe, step), faults)
    assert stage is not None and not faults, "every stage was built when the recipe was read"
    return stage


def stages_of(recipe: Recipe, faults: list[str] | None = None) -> dict[str, Recipe]:
    """{where, in words: recipe of the stage}; also at both ends and in the middle of every line between points.

    Appends to `faults` what is wrong with a stage; without it the recipe is one that was read without faults.
    """
    faults = [] if faults is None else faults
    if not recipe.schedule:
        return {"": recipe}
    faults += _never_reached(recipe)
    places = {0.0}
    for points in recipe.schedule.values():
        fractions = [fraction for fraction, _ in points.points]
        places |= {f for f in fractions if f < 1 or points.shape == "linear"}
        places |= {(a + b) / 2 for a, b in pairwise(fractions)} if points.shape == "linear" else set()
    stages: dict[str, Recipe] = {}
    for place in sorted(places):
        found: list[str] = []
        where = f"[schedule] at {place:g} of the steps: "
        stage = _changed(recipe, _values_at(recipe, place), found)
        faults += [where + fault for fault in found]
        if stage is not None:
            stages[where] = stage
    return stages


def essence(chosen: BaseModel) -> dict[str, Any]:
    """The keys that matter: left alone, they make the same object. What another key brings with it (the `k` of a top-k
    support, the weights of a named schedule) or a default says is not among them, and so goes when that key changes."""
    keys = chosen.model_dump(mode="json", exclude_none=True)
    for key in [key for key in keys if key != "name"]:
        rest = {other: value for other, value in keys.items() if other != key}
        try:
            same = type(chosen).model_validate(rest) == chosen
        except ValidationError:
            same = False
        keys = rest if same else keys
    return keys


def _changed(recipe: Recipe, values: Mapping[str, Any], faults: list[str]) -> Recipe | None:
    weights = {key: part for key in Weights.model_fields if (part := getattr(recipe.weights, key)) is not None}
    sections: dict[str, Any] = {
        "method": essence(recipe.method),
        "weights": {key: essence(part) for key, part in weights.items()},
        "sampling": recipe.sampling.model_dump(),
        "context": recipe.context.model_dump(mode="json", exclude_none=True),
        "views": {
            name: {"context": view.context.model_dump(mode="json", exclude_none=True)}
            for name, view in recipe.views.items()
        },
    }
    for key, value in values.items():
        if key == "method":  # what an earlier point said together, another one takes back together
            told = _told_together(recipe.schedule)
            kept = {name: v for name, v in sections["method"].items() if name not in told}
            sections["method"] = {**kept, **value}
        else:
            _put(sections, key, value)
    method = choice(sections["method"], "method", METHOD, faults)
    chosen = chosen_weights(sections["weights"], faults)
    context = choice(sections["context"], "context", CONTEXT, faults)
    contexts = {
        name: choice(section["context"], f"views.{name}.context", CONTEXT, faults)
        for name, section in sections["views"].items()
    }
    if method is None or context is None or None in [*chosen.values(), *contexts.values()]:
        return None
    assert isinstance(method, Method)
    views = {name: view.model_copy(update={"context": contexts[name]}) for name, view in recipe.views.items()}
    changes: dict[str, Any] = {"method": method, "context": context, "views": views, "schedule": {}}
    for name, section, keys in (("weights", Weights, chosen), ("sampling", SamplingSection, sections["sampling"])):
        try:
            changes[name] = section.model_validate(keys)
        except ValidationError as error:
            faults += sentences(error, section, prefix=f"{name}.")
            return None
    return recipe.model_copy(update=changes)


def _never_reached(recipe: Recipe) -> Iterator[str]:
    steps = recipe.train.steps
    for key, points in recipe.schedule.items():
        if points.shape == "linear":
            continue
        begins = [first_step(fraction, steps) for fraction, _ in points.points] + [steps]
        for (fraction, value), begin, end in zip(points.points, begins[:-1], begins[1:], strict=True):
            if begin >= end:
                yield (
                    f"schedule.{key}: {value!r} from {fraction:g} on is never used: train.steps = {steps} has no step "
                    "there; move the point, or take more steps"
                )


def _told_together(schedule: Mapping[str, Points]) -> set[str]:
    """The keys of [method] that the points of `method` speak of."""
    points = schedule["method"].points if "method" in schedule else ()
    return {name for _, table in points for name in table}


def _not_for_schedules(key: str) -> str | None:
    section, _, rest = key.partition(".")
    if section == "train":
        return f'schedule.{key} cannot change here: the learning rate has train.schedule = "linear" and warmup_steps'
    if key == "method.name":
        return "schedule.method.name: a run has one method; chain several with `opdkit pipeline`"
    if _of_context(key):
        return None
    if section not in ("method", "weights", "sampling") or (section == "sampling" and rest not in SAMPLING_KEYS):
        allowed = f"keys of method and weights, and sampling.{', sampling.'.join(SAMPLING_KEYS)}"
        allowed += ", and the numbers of context and views.NAME.context"
        return f"schedule.{key} cannot change over training; what can: {allowed}"
    if key != "method" and not rest:
        return f"schedule.{key} is a section; name one of its keys"
    return None


def _of_context(key: str) -> bool:
    section, *rest = key.split(".")
    return (section == "context" and bool(rest)) or (section == "views" and rest[1:2] == ["context"] and len(rest) > 2)


def _points(where: str, value: Any) -> Points | str:
    """What is written for a key, or the sentence that refuses it."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and "name" in value:
        return _named(where, value)
    shape: Any = value.get("shape", "steps") if isinstance(value, Mapping) else "steps"
    if isinstance(value, Mapping) and (shape not in ("steps", "linear") or set(value) - {"points", "shape"}):
        return f'{where} = {dict(value)!r}: it has the keys points and shape ("steps" or "linear"); {_FORMS}'
    points = value.get("points") if isinstance(value, Mapping) else value
    if not isinstance(points, list) or not points or not all(isinstance(p, list) and len(p) == 2 for p in points):
        return f"{where} = {points!r}: {_FORMS}"
    fractions = [fraction for fraction, _ in points]
    if not all(_is_number(f) and 0 <= f <= 1 for f in fractions) or any(a >= b for a, b in pairwise(fractions)):
        return f"{where}: the points are at {fractions!r}; give fractions of the steps, 0.0 to 1.0, each above the last"
    if shape == "linear" and (len(points) < 2 or not all(_is_number(number) for _, number in points)):
        return f'{where}: shape = "linear" moves between two or more numbers, not {[v for _, v in points]!r}'
    return Points(points=tuple((float(fraction), value) for fraction, value in points), shape=shape)


def _not_together(schedule: dict[str, Points]) -> list[str]:
    """Whether the points of `method` are tables of keys that have no points of their own; a fault takes them out."""
    points = schedule.get("method")
    if points is None:
        return []
    tables = [value for _, value in points.points]
    if points.shape == "linear" or not all(isinstance(table, Mapping) and "name" not in table for table in tables):
        del schedule["method"]
        return ["schedule.method: its values are tables of the method's keys but its name, { divergence = ... }"]
    twice = sorted(name for name in _told_together(schedule) if f"method.{name}" in schedule)
    return [f"schedule.{name} and the tables of schedule.method both speak of {name}; keep one" for name in twice]


def _named(where: str, value: Mapping[str, Any]) -> Points | str:
    name, switch = value["name"], value.get("at", NAMED_SWITCH)
    if name not in NAMED:
        return f"{where} = {name!r} is no list of points, nor a schedule by name{did_you_mean(name, NAMED)}; {_FORMS}"
    if set(value) - {"name", "at"} or not _is_number(switch) or not 0 < switch < 1:
        return f'{where} = {dict(value)!r}: write {{ name = "{name}", at = 0.5 }}, at between 0 and 1'
    first, second = NAMED[name]
    return Points(points=((0.0, first), (float(switch), second)))


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is written for each dotted key."""
    for key, value in section.items():
        is_leaf = not isinstance(value, Mapping) or not value or "points" in value or isinstance(value.get("name"), str)
        if is_leaf:
            yield prefix + key, value
        else:
            yield from _leaves(value, f"{prefix}{key}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _get(sections: Mapping[str, Any], key: str) -> Any:
    value: Any = sections
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _put(sections: MutableMapping[str, Any], key: str, value: Any) -> None:
    """`_set`; but the weight of a view in a target leaves the others as they are, and is nobody's where it is 0."""
    section, name, *view = key.split(".")[:3] if key.count(".") == 2 else (key, "")
    if section != "method" or name not in ("target", "mixture") or not view:
        return _set(sections, key, value)
    weights = _get(sections, f"method.{name}")
    if weights is None:
        method = None
        with suppress(ValueError):  # who makes the method says it
            method = class_of(_get(sections, "method.name"), METHOD)
        weights = method.model_fields[name].default if method and name in method.model_fields else None
    weights = dict(weights) if isinstance(weights, Mapping) else {}
    weights.pop(view[0], None)
    return _set(sections, f"method.{name}", weights if value == 0 else {**weights, view[0]: value})


def _set(sections: MutableMapping[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    target = sections
    for part in path:
        inner = target.get(part)
        target[part] = dict(inner) if isinstance(inner, Mapping) else {}  # never the caller's own
        target = target[part]
    target[last] = value
