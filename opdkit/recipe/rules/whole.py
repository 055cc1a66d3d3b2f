"""What legal values cannot do together, and what they can do that is probably not meant: a sentence each."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opdkit.contexts import Context
from opdkit.data.files.formats import format_of
from opdkit.engines.quantized import missing_package
from opdkit.errors import UserError
from opdkit.hub import TRUSTED
from opdkit.metrics import is_installed
from opdkit.recipe.build import flat
from opdkit.recipe.fields import MOST, did_you_mean
from opdkit.recipe.rules.align import align_faults
from opdkit.recipe.rules.device import check_optimizer, flash_faults, master_faults, parallel_faults, place_faults
from opdkit.recipe.rules.engine import engine_faults, lag_faults, lag_warnings
from opdkit.recipe.rules.episode import episode_faults, episode_warnings
from opdkit.recipe.rules.evaluation import eval_faults, eval_warnings
from opdkit.recipe.rules.route import context_faults, route_faults, stage_route_faults
from opdkit.recipe.rules.teacher import payload_faults, reader_faults, server_warnings, writer_faults
from opdkit.recipe.saved import saved_faults, saved_warnings
from opdkit.recipe.schedule import stages_of
from opdkit.recipe.secrets import secret_faults
from opdkit.recipe.sections import Recipe
from opdkit.recipe.sentinels import sentinel_faults, sentinel_warnings

_VIEW_NAME = re.compile(r"[A-Za-z]\w*")


def impossible(recipe: Recipe, stages: Mapping[str, Recipe], adapters: Collection[str] = ()) -> list[str]:
    """Every combination of legal values that cannot work, each as a sentence with the way out.

    stages: {where in the schedule, in words: the recipe there}. adapters: paths where LoRA adapters will be.
    """
    path = recipe.model.path
    is_adapter = path in adapters or os.path.exists(Path(path) / "adapter_config.json")
    said = [
        *secret_faults(flat(recipe.as_dict())),
        *_teacher_faults(recipe, is_adapter),
        *route_faults(recipe),
        *_data_faults(recipe),
        *place_faults(recipe),
        *flash_faults(recipe),
        *master_faults(recipe, is_adapter or recipe.model.lora is not None),
        *parallel_faults(recipe),
        *engine_faults(recipe),
        *episode_faults(recipe),
        *sentinel_faults(recipe.sentinels, recipe.train.save_every),
    ]
    if is_adapter and recipe.model.lora:
        said.append(
            f"model.path = {path} is itself an adapter: remove model.lora to go on training that adapter (in a "
            "pipeline, set it in the stage that begins the adapter)"
        )
    found = {
        where: [
            *number_faults(flat(stage.as_dict())),
            *_method_faults(stage),
            *_stage_teacher_faults(stage),
            *saved_faults(stage),
            *payload_faults(stage),
            *writer_faults(stage),
            *stage_route_faults(stage),
            *context_faults(stage),
            *lag_faults(stage),
            *align_faults(stage),
        ]
        for where, stage in stages.items()
    }
    first = {fault: where for where in reversed(found) for fault in found[where]}
    for fault, place in first.items():
        everywhere = all(fault in faults for faults in found.values())
        said.append(fault if everywhere else place + fault)
    unused = [list(_unused_faults(stage)) for stage in stages.values()]  # a fault where no stage uses it
    return said + [fault for fault in (unused[0] if unused else []) if all(fault in others for others in unused)]


def warnings(recipe: Recipe) -> list[str]:
    """What works and is probably not meant, each as a sentence."""
    return [*method_warnings(recipe), *(sentence for _, sentence in missing_paths(paths_of(recipe)))]


def method_warnings(recipe: Recipe) -> list[str]:
    """The method's own, of every stage of a schedule, the task's, and which default gave way."""
    stages = stages_of(recipe)
    said = {sentence: where for where, stage in stages.items() for sentence in stage.method.warnings(stage)}
    said |= {sentence: where for where, stage in stages.items() for sentence in _threshold_warnings(stage)}
    said |= {sentence: where for where, stage in stages.items() for sentence in lag_warnings(stage)}
    told = [where + sentence for sentence, where in said.items()]
    own = [*recipe.data.grader.warnings("data.task"), *eval_warnings(recipe)]
    own += sentinel_warnings(recipe.sentinels, recipe.train.steps)
    return [
        *recipe.yielded,
        *told,
        *own,
        *saved_warnings(recipe),
        *server_warnings(recipe),
        *episode_warnings(recipe),
        *_trusted_code(recipe),
    ]


def _trusted_code(recipe: Recipe) -> list[str]:
    keys = flat(recipe.as_dict())
    return [
        f"{key} = true: {TRUSTED.format(keys.get(key.replace('trust_remote_code', 'path')))}"
        for key, value in keys.items()
        if key.endswith("trust_remote_code") and value
    ]


def needs_rewards(recipe: Recipe) -> bool:
    """Whether any stage of its schedule does, so that its problems need a gold."""
    return any(who for stage in stages_of(recipe).values() for who in _who_needs_rewards(stage))


def check_installed(recipe: Recipe) -> None:
    """Raises UserError for a package that is not on this machine: the run would be refused once it has begun."""
    check_optimizer(recipe.train)
    for name, view in recipe.all_views.items():
        where = "teacher" if name == "teacher" else f"views.{name}.teacher"
        kind = view.teacher.quantization
        if kind is not None and (missing := missing_package(kind)) is not None:
            raise UserError(f"{where}.{missing}")
    if absent := [sink for sink in recipe.log.sinks if not is_installed(sink)]:
        names = ", ".join(absent)
        raise UserError(f"log.sinks: {names} is not installed; pip install 'opdkit[{absent[0]}]', or leave it out")


def paths_of(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, path) of everything a recipe reads."""
    sets = [("data.train", one.path) for one in recipe.data.sets]
    read = [*recipe.model_paths.items(), *recipe.context_files.items(), *sets]
    return [*read, *(("eval.data", source) for source in recipe.eval.sources if source)]


def missing_paths(named: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(path, sentence) of local paths where nothing is. They may be made later; what looks like a hub id may be one."""
    for key, path in named:
        is_local = path.startswith((".", "/", "~")) or format_of(Path(path)) is not None
        if is_local and not os.path.exists(Path(path).expanduser()):
            yield path, f"{key} = {path}: there is no such file or folder yet"


def _threshold_warnings(recipe: Recipe) -> Iterator[str]:
    """Where a reward of several terms does not tell right from wrong at the threshold that somebody reads."""
    readers = {**dict(_contexts(recipe)), "method": recipe.method, "weights.problems": recipe.weights.problems}
    lowest_right, highest_wrong = recipe.data.grader.bounds
    for where, reader in readers.items():
        threshold = getattr(reader, "success_threshold", None)
        if threshold is not None and not highest_wrong < threshold <= lowest_right:
            yield (
                f"{where}.success_threshold = {threshold:g} decides on the whole reward of data.task, where a right "
                f"answer may get {lowest_right:g} and a wrong one {highest_wrong:g}; set it between them, or weigh "
                "the other terms less"
            )


def _teacher_faults(recipe: Recipe, is_adapter: bool) -> Iterator[str]:
    yield from reader_faults("teacher", recipe.teacher, recipe, is_adapter)
    for name, view in recipe.views.items():
        if name == "teacher" or not _VIEW_NAME.fullmatch(name):
            yield (
                f"[views.{name}] cannot be the name of a view; use letters, digits and _, and not teacher: "
                "[teacher] and [context] are that view"
            )
        if view.teacher.kind == "none":
            yield f'views.{name}.teacher is missing: say who reads, e.g. {{ kind = "self", weights = "initial" }}'
        yield from reader_faults(f"views.{name}.teacher", view.teacher, recipe, is_adapter)


def _stage_teacher_faults(recipe: Recipe) -> Iterator[str]:
    writers = recipe.answering if recipe.method.answer_source == "teacher" else {}
    for name, view in writers.items():
        where = "teacher" if name == "teacher" else f"views.{name}.teacher"
        context = "context" if name == "teacher" else f"views.{name}.context"
        if view.teacher.weights == "trust_region":
            yield (
                f'{where}.weights = "trust_region" scores answers and cannot write them, but method.answers = '
                f'"teacher"; use {where}.weights = "initial" or "ema"'
            )
        if view.context.needs_siblings:
            yield (
                f'{context}.kind = "{view.context.kind}" shows the teacher other answers to the same problem, but with '
                'method.answers = "teacher" it would have to read them before there are any; use answers = "student", '
                "or another context"
            )


def _method_faults(recipe: Recipe) -> Iterator[str]:
    method = recipe.method
    asks_teacher = recipe.needs.teacher is not None
    for view in sorted(recipe.needs.views.keys() - {"teacher"} - recipe.views.keys()):
        yield (
            f'method.name = "{method.name}" asks the view "{view}", which is not there; add [views.{view}] with '
            f"teacher and context{did_you_mean(view, [*recipe.views]) if recipe.views else ''}"
        )
    if (asks_teacher or method.answer_source == "teacher") and not recipe.answering and not recipe.route:
        alone = method.needs.teacher is None and method.answer_source != "teacher"
        who = "what [weights] compares" if alone else f'method.name = "{method.name}"'
        yield (
            f'{who} needs a teacher, but teacher.kind = "none"; '
            'set [teacher] kind = "model" and path, or kind = "self" and weights'
        )
    for where, context in _contexts(recipe):
        if context.needs_siblings and recipe.sampling.group_size == 1:
            yield (
                f'{where}.kind = "{context.kind}" shows the teacher other answers to the same problem, but '
                "sampling.group_size = 1 samples no other; use 2 or more (the papers: 8)"
            )
    for name, reader in recipe.answering.items() if asks_teacher else ():
        if reader.teacher.kind == "self" and reader.teacher.weights == "live" and reader.context.kind == "none":
            where = "" if name == "teacher" else f"views.{name}."
            yield (
                f'{where}teacher.weights = "live" with {where}context.kind = "none" compares the student with itself: '
                "the loss is zero; give the teacher a context, or other weights"
            )
    if method.answer_source == "student" and recipe.sampling.temperature == 0 and recipe.sampling.group_size > 1:
        yield (
            f"sampling.group_size = {recipe.sampling.group_size} with sampling.temperature = 0 samples the same greedy "
            "answer every time; raise the temperature, or set group_size = 1"
        )
    if recipe.episode is None and any(recipe.data.task_of(one).is_none for one in recipe.data.sets):
        for who in _who_needs_rewards(recipe):
            yield f'{who} needs rewards, but data.task names no grader; set it, e.g. data.task = "math"'
    yield from method.faults(recipe)
    yield from recipe.weights.faults(recipe)


def _who_needs_rewards(recipe: Recipe) -> Iterator[str]:
    if recipe.method.needs.reward:
        yield f'method.name = "{recipe.method.name}"'
    if recipe.weights.needs.reward:
        yield "[weights]"
    for where, context in _contexts(recipe):
        if context.needs_rewards:
            yield f'{where}.kind = "{context.kind}"'


def _contexts(recipe: Recipe) -> list[tuple[str, Context]]:
    """(where it is written, what is read) of every view that is asked."""
    asked = {name: view.context for name, view in recipe.views.items() if name in recipe.asked_views}
    own = [("context", recipe.context)] if recipe.needs.teacher and not recipe.route else []
    return [*own, *((f"views.{name}.context", context) for name, context in asked.items())]


def _unused_faults(recipe: Recipe) -> Iterator[str]:
    method, teacher = recipe.method, recipe.teacher
    asks_teacher = recipe.needs.teacher is not None
    for name in sorted(recipe.views.keys() - recipe.asked_views):
        yield (
            f'[views.{name}] is not used by method.name = "{method.name}"; remove it, or name it in method.target or '
            "method.mixture"
        )
    if recipe.route and not asks_teacher and method.answer_source != "teacher":
        yield f'[route] chooses who the teacher is, but method.name = "{method.name}" asks no teacher; remove it'
    if not asks_teacher and method.answer_source != "teacher" and teacher.kind != "none":
        yield (
            f'teacher.kind = "{teacher.kind}" would load a teacher that method.name = "{method.name}" never asks; '
            'remove [teacher], or set kind = "none"'
        )
    if recipe.context.kind != "none" and not asks_teacher:
        yield (
            f'context.kind = "{recipe.context.kind}" is what the teacher reads while scoring, but method.name = '
            f'"{method.name}" asks no teacher to score; set context.kind = "none"'
        )


LEAST, LARGEST = 1e-20, 1e20  # well inside a 32-bit float, in which the numbers of a step are
TEMPERATURES = (1e-4, 1e4)  # and 0, where it means the likeliest token


def number_faults(keys: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that no computation could use. keys: dotted key -> value."""
    for key, value in keys.items():
        if not isinstance(value, float | int) or isinstance(value, bool) or value == 0:
            continue
        if key.rpartition(".")[2].removeprefix("loss_").removeprefix("--") == "temperature":
            if not TEMPERATURES[0] <= value <= TEMPERATURES[1]:
                yield f"{key} = {value!r}: give a temperature from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}"
        elif isinstance(value, float) and not LEAST <= abs(value) <= LARGEST:
            yield f"{key} = {value!r}: give 0, or a number from {LEAST:g} to {LARGEST:g}"
        elif isinstance(value, int) and abs(value) > MOST and key != "seed":
            yield f"{key} = {value!r} is more than can be counted here; give at most {MOST}"


def _data_faults(recipe: Recipe) -> Iterator[str]:
    if recipe.train.lr * recipe.train.weight_decay >= 1:
        yield (
            f"train.weight_decay = {recipe.train.weight_decay:g} at train.lr = {recipe.train.lr:g} takes more than all "
            "of a weight away at every step; lower it"
        )
    yield from eval_faults(recipe)
    if recipe.spool and recipe.train.save_rows_every != 1:
        yield (
            f"[spool] keeps what teachers say of every step's rows, but train.save_rows_every = "
            f"{recipe.train.save_rows_every} does not keep the rows; set it to 1, or remove [spool]"
        )
    if recipe.spool and not recipe.needs.views:
        yield f'[spool] keeps what teachers say, but method.name = "{recipe.method.name}" asks none; remove it'
    if recipe.train.updates_per_step > recipe.train.problems_per_step:
        yield (
            f"train.updates_per_step = {recipe.train.updates_per_step} cannot divide train.problems_per_step = "
            f"{recipe.train.problems_per_step} problems: an update needs one at least; lower it"
        )
    if recipe.train.warmup_steps >= recipe.train.steps:
        yield (
            f"train.warmup_steps = {recipe.train.warmup_steps} leaves none of train.steps = {recipe.train.steps} at "
            "the full learning rate; lower it"
        )
