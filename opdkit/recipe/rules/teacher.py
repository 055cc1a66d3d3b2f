"""What a teacher's section says that its kind cannot do, and what its payload cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opdkit.engines.servers.http import Client
from opdkit.errors import UserError
from opdkit.recipe.model_sections import TeacherSection
from opdkit.recipe.sections import Recipe
from opdkit.types import Asked

SERVER_KEYS = ("url", "served_name", "payload", "spool", "at_once", "patience_s", "timeout_s")


def reader_faults(where: str, teacher: TeacherSection, recipe: Recipe, is_adapter: bool) -> Iterator[str]:
    """Of one section. is_adapter: whether the student is, or will be, a LoRA adapter."""
    if teacher.kind == "model" and teacher.path is None:
        yield f'{where}.kind = "model" needs {where}.path: a folder in Hugging Face format, or a hub id'
    yield from server_faults(where, teacher)
    yield from weights_faults(where, teacher)
    if not teacher.is_other_model and teacher.path is not None:
        yield f'{where}.path = "{teacher.path}" is only read with {where}.kind = "model"; set that, or remove the path'
    if teacher.kind == "self" and teacher.weights is None:
        yield (
            f'{where}.kind = "self" needs {where}.weights: "initial", "ema", "live", "trust_region" or "adapter_off" '
            "(LoRA)"
        )
    if teacher.kind != "self" and teacher.weights is not None:
        yield f'{where}.weights = "{teacher.weights}" is only read with {where}.kind = "self"; set that, or remove it'
    if (teacher.kind == "saved") != (teacher.run is not None):
        yield (
            f'{where}.kind = "{teacher.kind}" and {where}.run = {teacher.run!r}: kind = "saved" reads what the '
            "teachers of a run said; set both, or neither"
        )
    if teacher.weights_on == "host" and teacher.weights not in ("initial", "ema", "trust_region"):
        yield (
            f'{where}.weights_on = "host" is read with {where}.weights = "initial", "ema" or "trust_region", which '
            "keep weights of their own; remove it"
        )
    not_of_servers = ("dtype", "device")
    for key in (*not_of_servers, "chat_template", "trust_remote_code"):
        read = teacher.kind == "model" or (teacher.kind == "server" and key not in not_of_servers)
        if getattr(teacher, key) and not read:
            yield f'{where}.{key} = {getattr(teacher, key)!r} is only read with {where}.kind = "model"; remove it'
    for key in ("close_thinking", "system", "template_kwargs") if teacher.kind in ("none", "saved") else ():
        if getattr(teacher, key) is not None:
            kind = f'{where}.kind = "{teacher.kind}"'
            yield f"{where}.{key} = {getattr(teacher, key)!r} is not read with {kind}; remove it"
    if teacher.weights == "adapter_off" and not is_adapter and recipe.model.lora is None:
        yield (
            f'{where}.weights = "adapter_off" needs a LoRA student, whose base model is the teacher; '
            f'add [model] lora = {{}}, or use {where}.weights = "initial"'
        )
    if teacher.weights == "ema" and teacher.ema_rate is None:
        yield f'{where}.weights = "ema" needs {where}.ema_rate, e.g. 0.05 (teacher += rate * (student - teacher))'
    if teacher.weights != "ema" and teacher.ema_rate is not None:
        yield f'{where}.ema_rate = {teacher.ema_rate} is only read with {where}.weights = "ema"; set that, or remove it'
    if (teacher.weights == "trust_region") != (teacher.student_share is not None):
        yield (
            f'{where}.weights = "{teacher.weights}" and {where}.student_share = {teacher.student_share}: '
            'weights = "trust_region" mixes logits, initial * (1 - student_share) + student * student_share; '
            "set both (e.g. 0.05) or neither"
        )


def server_faults(where: str, teacher: TeacherSection) -> Iterator[str]:
    """Of a section alone."""
    fields = type(teacher).model_fields
    if teacher.kind != "server":
        for key in SERVER_KEYS:
            if getattr(teacher, key) != fields[key].default:
                yield f'{where}.{key} = {getattr(teacher, key)!r} is only read with {where}.kind = "server"; remove it'
        return
    if teacher.url is None:
        yield f'{where}.kind = "server" needs {where}.url: http://HOST:PORT, or several in a list'
    for url in teacher.urls:
        try:
            Client(url, key=f"{where}.url")
        except UserError as error:
            yield from error.sentences
    if teacher.path is None:
        yield (
            f'{where}.kind = "server" needs {where}.path: the model that is served, for its tokenizer; a folder in '
            "Hugging Face format, or a hub id"
        )
    if teacher.payload is None:
        yield (
            f'{where}.kind = "server" needs {where}.payload: "hidden" where the server and this machine share a folder '
            '(every loss is exact), else "topk" or "sampled"'
        )
    if teacher.payload == "hidden" and teacher.spool is None:
        yield (
            f'{where}.payload = "hidden" needs {where}.spool: the folder that the server writes its states to; without '
            'a folder that both see use payload = "topk"'
        )
    if teacher.payload not in (None, "hidden") and teacher.spool is not None:
        yield f'{where}.spool = {teacher.spool!r} is only read with {where}.payload = "hidden"; remove it'


def weights_faults(where: str, teacher: TeacherSection) -> Iterator[str]:
    """Of how a model's weights are kept."""
    if teacher.kind != "model":
        for key in ("quantization", "placement"):
            if getattr(teacher, key) != type(teacher).model_fields[key].default:
                yield f'{where}.{key} = "{getattr(teacher, key)}" is only read with {where}.kind = "model"; remove it'
        return
    if teacher.placement != "resident" and teacher.tokens == "align":
        yield (
            f'{where}.placement = "{teacher.placement}" and {where}.tokens = "align": a teacher with another tokenizer '
            'stays where it is; use placement = "resident"'
        )
    if teacher.placement == "sharded" and teacher.quantization is not None:
        yield (
            f'{where}.placement = "sharded" cuts layers into parts, and {where}.quantization = '
            f'"{teacher.quantization}" packs them otherwise; use one of the two'
        )
    if teacher.placement == "cpu" and teacher.quantization is not None:
        yield (
            f'{where}.quantization = "{teacher.quantization}" is bound to the device that it was made on; use '
            f'{where}.placement = "reload" or "resident"'
        )


def payload_faults(recipe: Recipe) -> Iterator[str]:
    """Of what a stage of the recipe asks its servers."""
    for view, asked in recipe.needs.views.items():
        readers = recipe.route.readers if recipe.route and view == "teacher" else (view,)
        for reader in readers:
            section = recipe.all_views.get(reader)
            if section is None or section.teacher.kind != "server" or section.teacher.payload in (None, "hidden"):
                continue
            where = "teacher" if reader == "teacher" else f"views.{reader}.teacher"
            payload = f'{where}.payload = "{section.teacher.payload}"'
            gives = Asked("topk", asked.k) if section.teacher.payload == "topk" else Asked("sampled")
            if not gives.covers(asked):
                yield (
                    f'method.name = "{recipe.method.name}" asks that view for {asked.words}, and {payload} gives '
                    f'{gives.words}; use payload = "hidden", or a '
                    f"method.support that it answers ({_SUPPORTS[section.teacher.payload or 'topk']})"
                )
            if recipe.method.loss_temperature != 1:
                yield (
                    f"method.loss_temperature = {recipe.method.loss_temperature}, but {payload} is always at "
                    'temperature 1; set it to 1.0, or use payload = "hidden"'
                )


_SUPPORTS = {"topk": '"teacher_topk" with k, or "sampled"', "sampled": '"sampled"'}


def writer_faults(recipe: Recipe) -> Iterator[str]:
    """Of a stage whose answers the teacher writes."""
    for name, view in recipe.answering.items() if recipe.method.answer_source == "teacher" else ():
        if view.teacher.kind == "server":
            where = "teacher" if name == "teacher" else f"views.{name}.teacher"
            yield (
                f'{where}.kind = "server" scores answers, and method.answers = "teacher" has it write them; use '
                f'{where}.kind = "model", or write them first with opdkit sample and answers = "dataset"'
            )


def server_warnings(recipe: Recipe) -> Iterator[str]:
    for view, section in recipe.all_views.items():
        where = "teacher" if view == "teacher" else f"views.{view}.teacher"
        spool = section.teacher.spool
        if spool is not None and not Path(spool).expanduser().is_dir():
            yield f"{where}.spool = {spool}: there is no such folder yet"
        if section.teacher.payload in ("topk", "sampled") and "diagnostics" in recipe.model_fields_set:
            yield (
                f'[diagnostics] compares whole distributions, which {where}.payload = "{section.teacher.payload}" does '
                "not give: answers that this teacher reads are not compared"
            )
