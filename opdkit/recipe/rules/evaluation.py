"""What cannot be measured, and what is not measured by whom it might be expected."""

from __future__ import annotations

from collections.abc import Iterator

from opdkit.data.files.names import metric_names
from opdkit.recipe.fields import did_you_mean
from opdkit.recipe.sections import Recipe
from opdkit.recipe.stop_when import condition


def eval_faults(recipe: Recipe) -> Iterator[str]:
    """Of [eval]: sets, their domains and their graders; and what the run decides by them."""
    yield from _choice_faults(recipe)
    yield from _divergence_faults(recipe)
    if recipe.eval.every and not recipe.eval.sources:
        yield f"eval.every = {recipe.eval.every} needs eval.data: what to evaluate on"
    trained = [one.domain for one in recipe.data.sets if one.domain]
    known = list(dict.fromkeys([*trained, *(recipe.route.views if recipe.route else ())]))
    for number, one in enumerate(recipe.eval.sets):
        if one.domain is not None and one.domain not in known:
            near = did_you_mean(one.domain, known, "domains") if known else "; leave it out"
            yield f'eval.data.{number}.domain = "{one.domain}" is of no set of data.train, nor in [route.views]{near}'
    ungraded = [source for source, task in recipe.eval_tasks.items() if task.is_none]
    if ungraded and recipe.episode is None:  # an environment may grade
        yield (
            f"eval.data = {ungraded[0]} is graded by data.task, which names no grader; set it, e.g. data.task = "
            f'"math", or give the set its own, {{ path = "{ungraded[0]}", task = "math" }}'
        )
    try:
        recipe.grader  # noqa: B018  making it refuses what cannot be
    except ValueError as fault:
        yield f"data and eval.data: {fault}"


def _choice_faults(recipe: Recipe) -> Iterator[str]:
    evaluation, train = recipe.eval, recipe.train
    reported = {one.path for one in evaluation.reported}
    if again := [one.path for one in evaluation.sets[len(reported) :] if one.path in reported]:
        yield (
            f"eval.select_on = {again[0]} is in eval.data too; what checkpoints are chosen on must be another set than "
            "what is reported"
        )
    names = metric_names(evaluation.sources)
    for key, name in _chosen_by(recipe):
        known = any(name.startswith(f"eval/{slug}/") for slug in names.values())
        if not known:
            near = did_you_mean(name.split("/")[1], [*names.values()], "sets") if names else "; set eval.data"
            yield f'{key} names "{name}", which is of no set of eval.data or eval.select_on{near}'
        elif name.endswith("_kl") and not evaluation.divergence:
            yield f'{key} names "{name}", which is measured where eval.divergence is set; set it, e.g. to 64'
        elif not evaluation.every:
            yield f"{key} decides by evaluations, and eval.every = 0 makes none before the last step; set it"
        k, samples = name.rpartition("/pass_at_")[2], evaluation.samples
        if k.isdigit() and int(k) not in known_k(samples):
            there = ", ".join(map(str, known_k(samples)))
            yield f'{key} names "{name}", and of eval.samples = {samples} answers pass@k is known for k = {there}'
    if train.average_last is not None:
        if recipe.model.lora is not None:
            yield (
                "train.average_last averages weights, and the mean of LoRA's factors is not the mean of what they add "
                "up to; remove it, or [model.lora]"
            )
        if train.keep_checkpoints < train.average_last:
            yield (
                f"train.average_last = {train.average_last} needs as many checkpoints, and train.keep_checkpoints = "
                f"{train.keep_checkpoints}; raise that"
            )
        if not train.save_every:
            yield f"train.average_last = {train.average_last} needs checkpoints before the last; set train.save_every"


def _divergence_faults(recipe: Recipe) -> Iterator[str]:
    """Of what must be known exactly."""
    if not recipe.eval.divergence:
        return
    where = f"eval.divergence = {recipe.eval.divergence}"
    if not recipe.eval.sources:
        yield f"{where} needs eval.data: whose problems are answered"
    views = {**recipe.answering, **{name: recipe.all_views[name] for name in recipe.views if name in recipe.all_views}}
    if not views:
        yield f'{where} compares with a teacher, and teacher.kind = "none"; set a teacher, or remove it'
    for name, view in views.items():
        teacher, place = view.teacher, "teacher" if name == "teacher" else f"views.{name}.teacher"
        if teacher.kind == "saved":
            yield f'{where} asks teachers about new answers, and {place}.kind = "saved" knows the old ones; remove it'
        if teacher.kind == "server" and teacher.payload != "hidden":
            yield f'{where} is exact, and {place}.payload = "{teacher.payload}" sends lists; use "hidden", or remove it'
        if teacher.tokens == "align":
            yield f'{where} compares all tokens, and {place}.tokens = "align" has only some of them; remove it'
    if recipe.route is not None and (unnamed := [one.path for one in recipe.eval.sets if one.domain is None]):
        yield f"{where} asks the teacher of each domain, and {unnamed[0]} names none; give the set its domain"


def known_k(samples: int) -> list[int]:
    """The k of the pass@k that an evaluation's metrics have."""
    return sorted({2**n for n in range(samples.bit_length()) if 2**n <= samples} | {samples})


def _chosen_by(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(recipe key, metric) of the evaluations that the run decides by."""
    if recipe.train.keep_best is not None:
        yield "train.keep_best", recipe.train.keep_best
    for text in recipe.train.stop_when:
        if (name := condition(text).name).startswith("eval/"):
            yield "train.stop_when", name


def choice_warnings(recipe: Recipe) -> Iterator[str]:
    """Choosing on what is reported."""
    reported = {one.path for one in recipe.eval.reported}
    for source, slug in metric_names(recipe.eval.sources).items():
        keys = [key for key, name in _chosen_by(recipe) if name.startswith(f"eval/{slug}/")]
        if source in reported and keys:
            yield (
                f"{keys[0]} chooses on {source}, which is reported: the best of several numbers flatters; name another "
                "set in eval.select_on, and choose on that"
            )


def eval_warnings(recipe: Recipe) -> Iterator[str]:
    """Sets on which no teacher is measured, where each domain has its own; and choosing on what is reported."""
    yield from choice_warnings(recipe)
    if recipe.route is None or not recipe.eval.teacher:
        return
    domains = recipe.route.views
    for one in recipe.eval.sets:
        if one.domain not in domains:
            yield (
                f"eval.data = {one.path} names no domain of [route.views], so no teacher is measured on it; write "
                f'{{ path = "{one.path}", domain = "{next(iter(domains))}" }}, or set eval.teacher = false'
            )
