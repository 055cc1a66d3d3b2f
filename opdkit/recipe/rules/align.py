"""What a teacher with another tokenizer cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from opdkit.losses.names import SupportKind
from opdkit.methods.preference import Preference
from opdkit.recipe.model_sections import TeacherSection
from opdkit.recipe.sections import Recipe

_LISTS = tuple(kind for kind in get_args(SupportKind) if kind not in ("full", "sampled"))


def align_faults(recipe: Recipe) -> Iterator[str]:
    """Of a stage's teachers with `tokens = "align"`, and of the keys that only those read."""
    for name, view in recipe.all_views.items():
        where = "teacher" if name == "teacher" else f"views.{name}.teacher"
        if view.teacher.tokens == "same":
            yield from _unread(where, view.teacher)
        elif view.teacher.kind != "model":
            yield (
                f'{where}.tokens = "align" is only read with {where}.kind = "model": the student\'s own weights have '
                "its tokenizer; remove it"
            )
        else:
            yield from _asked_too_much(recipe, name, where)


def _unread(where: str, teacher: TeacherSection) -> Iterator[str]:
    for key, value in (("span", teacher.span), ("pair_stops", teacher.pair_stops)):
        if value != TeacherSection.model_fields[key].default:
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            yield f'{where}.{key} = {shown} is only read with {where}.tokens = "align"; set that, or remove it'


def _asked_too_much(recipe: Recipe, name: str, where: str) -> Iterator[str]:
    method, span = recipe.method, recipe.all_views[name].teacher.span
    view = "teacher" if name in recipe.answering else name
    asked, compared = recipe.needs.views.get(view), getattr(method, "compared", None)
    of_method, of_weights = (needs.views.get(view) for needs in (method.needs, recipe.weights.needs))
    lists = getattr(method, "support", None) in _LISTS
    aligned = f'{where}.tokens = "align"'
    if of_method is not None and of_method.answer == "distribution" and not lists:
        has = f'method.support = "{method.support}"' if hasattr(method, "support") else f'method.name = "{method.name}"'
        yield (
            f"{has} compares whole vocabularies, and with {aligned} there are two; use a method with method.support = "
            '"student_topk" and k (e.g. 16), or "sampled"'
        )
    if of_weights is not None and of_weights.answer == "distribution":
        yield (
            f"[weights] compares whole vocabularies, and with {aligned} there are two; give it a k where it has one, "
            "or choose other weights"
        )
    if lists and compared is not None and view in compared.views and compared.only is None:
        yield (
            f"{aligned}: a target of several views (method.target, method.mixture) combines whole vocabularies; use "
            'support = "sampled", or this view alone'
        )
    if asked is not None and span != "exact" and (asked.answer != "sampled" or asked.entropy):
        yield (
            f'{where}.span = "{span}" tells of spans what the sum of log-probs tells, but more is asked of this '
            'teacher than the log-prob of the sampled token; use span = "exact", or method.support = "sampled"'
        )
    if isinstance(method, Preference) and asked is not None:
        yield (
            f'method.name = "{method.name}" compares the log-probs of whole answers, and with {aligned} those of some '
            'tokens are not known; use a reference with the student\'s tokenizer (kind = "self", weights = "initial")'
        )
    if getattr(method, "without_context", "leave") == "dilute" and asked is not None:
        yield (
            f'method.without_context = "dilute" counts in the mean what the view does not score, and with {aligned} '
            'that is every token which the two do not share; set without_context = "leave"'
        )
    if recipe.spool is not None and asked is not None:
        yield (
            f"[spool] keeps what teachers say of the student's tokens one by one, and with {aligned} that is not said "
            "of all; remove [spool]"
        )
    if method.answer_source == "teacher" and name in recipe.answering:
        yield (
            f'method.answers = "teacher" would train on the teacher\'s own token ids, and with {aligned} they mean '
            'nothing to the student; write them down (opdkit sample) and use method.answers = "dataset"'
        )
