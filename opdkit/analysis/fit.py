"""`opdkit fit`: a few hundred answers of the student, read by the recipe's teacher, before anything is trained.

The facts are made here; what they mean is `measure/fit.py`. Student, teacher, context, sampling and data are those of
the recipe, through the code that trains. Answers are kept as they come (`fit_answers.py`), so Ctrl-C costs one part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkit.analysis.fit_answers import Asker, asked_before
from opdkit.analysis.fit_numbers import MASSES_AT, Answered, facts_of
from opdkit.analysis.fit_page import print_page
from opdkit.analysis.fit_quantized import MOST_ROWS, agreement_with_whole
from opdkit.contexts.text import digest_of
from opdkit.data.readers import Dataset
from opdkit.engines.hf import HFEngine
from opdkit.engines.load import check_model_path, model_digest
from opdkit.errors import UserError
from opdkit.measure.fit import Advice, advise
from opdkit.measure.fit_facts import Facts, Thresholds
from opdkit.measure.overlap import TokenTable, by_bucket, default_k, summary
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe, check_installed
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.folder import atomic_write
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import clock_of
from opdkit.tasks.guard import make_task_for, unknown_rewards
from opdkit.training.beside import engine_beside
from opdkit.training.metrics.agreement import compare_rows, heard_tokens, parts_of, student_side, teacher_side
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.sides import read_sides
from opdkit.training.parts import Parts
from opdkit.training.problems.data import check_readable, fitting, training_data
from opdkit.training.spans import span_shares
from opdkit.training.together import check_same
from opdkit.types import Asked, Example, Group, Problem, seed_from

PREFIX_SHARES = (0.25, 0.5, 0.75)  # of the length nine of ten answers have: where the teacher goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    problems: int = 64
    samples: int | None = None  # of the student, a problem; None: 4, or the recipe's group_size if that is more
    teacher_answers: int = 2  # a problem, from nothing and from each prefix; 0: the teacher is not asked to answer
    k: int | None = None  # of the overlap
    out: Path | None = None
    thresholds: Mapping[str, Any] = field(default_factory=dict)


def fit(recipe: Recipe, options: FitOptions, *, console: Console, ranks: Ranks = ALONE) -> Advice:
    """Measure, advise, print, and write fit.json. Raises UserError for what cannot be measured, Interrupted.

    ranks: each asks for its share of the answers and reads it, and the first one writes.
    """
    if recipe.route is not None:
        raise UserError(
            "opdkit fit measures one teacher, but [route] names one for each domain; measure each in a recipe of its "
            "own: its section as [teacher] and [context], and data.train of its domain"
        )
    if recipe.episode is not None:
        raise UserError(
            "opdkit fit measures answers of one turn, and this recipe has [episode]; `opdkit doctor` plays some of its "
            "episodes, and a short run measures the rest"
        )
    if recipe.teacher.payload in ("topk", "sampled"):
        raise UserError(
            f'opdkit fit compares whole distributions, and teacher.payload = "{recipe.teacher.payload}" gives lists; '
            'use payload = "hidden", or kind = "model"'
        )
    if recipe.teacher.kind == "saved":
        raise UserError(
            'opdkit fit asks a teacher about new answers, but teacher.kind = "saved" only knows those of '
            f"{recipe.teacher.run}; measure the teacher of that run itself"
        )
    if recipe.teacher.kind == "none":
        raise UserError(
            'opdkit fit asks whether a teacher will help, but teacher.kind = "none"; name one in [teacher], e.g. '
            "--set teacher.kind=model --set teacher.path=PATH"
        )
    check_installed(recipe)
    limits = Thresholds().changed(options.thresholds)
    check_model_path(recipe.model.path)
    data = training_data(recipe, None)
    check_readable(recipe, data)
    check_same(ranks, recipe, {"training": data})
    folder = folder_of(recipe, options.out)
    options = replace(options, samples=options.samples or max(4, recipe.sampling.group_size))
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(Lock.on_folder(folder)) and None)
        return _fit(recipe, options, limits, data, folder, console, ranks)


def folder_of(recipe: Recipe, out: Path | None) -> Path:
    """Where fit.json and the answers go."""
    return out or Path("runs") / "fit" / recipe.name


def _fit(
    recipe: Recipe,
    options: FitOptions,
    limits: Thresholds,
    data: Dataset,
    folder: Path,
    console: Console,
    ranks: Ranks,
) -> Advice:
    interrupt = Interrupt(console)
    now = ranks.from_first(lambda: clock_of(asked_before(folder)))
    sides = read_sides(recipe, now=now)
    for sentence in sides.warnings:
        _note(console, sentence)
    parts = Parts(recipe, None, now=now, ranks=ranks)
    k = options.k or default_k(parts.student.num_tokens)
    if k > parts.student.num_tokens:
        raise UserError(f"-k {k}: the models know {parts.student.num_tokens} tokens; choose a shorter list")
    grader = recipe.data.grader
    task = make_task_for(grader, [part.problems for part in data.parts.values() or (data,)])
    asker = Asker(folder=folder, task=task.main, params=recipe.sampling.params, seed=recipe.seed, ranks=ranks)
    try:
        with interrupt.listening():
            problems, limit, share_long = _problems(recipe, data, parts, options.problems)
            if len(problems) < options.problems:
                _note(console, f"{data.source} has {len(problems)} problems that fit, not {options.problems}")
            if unknown := unknown_rewards(grader, problems):
                _note(console, unknown)
            ranks.from_first(lambda: asker.open({**_asked(recipe, options, data), "clock": now.isoformat()}))
            rows, read, went_on = _ask(recipe, options, parts, asker, problems, console, interrupt)
            assert parts.teacher is not None
            read, shares = _heard(parts.teacher, read)
            answered = Answered(problems, limit, share_long, rows, read, went_on, shares)
            table = _compare(recipe, k, parts, answered, console, interrupt, ranks)
            quantized = _beside_whole(recipe, k, parts, read, console, interrupt)
    finally:
        task.close()
    facts = facts_of(recipe, parts, sides, answered, table, k)
    advice = advise(facts, limits)
    written = folder / "fit.json"
    found = _as_json(recipe, options, facts, limits, advice, table) | (
        {"quantized_teacher": quantized} if quantized else {}
    )
    ranks.from_first(lambda: atomic_write(written, json.dumps(found, indent=1) + "\n"))
    print_page(console, recipe, facts, advice, written)
    return advice


def _problems(recipe: Recipe, data: Dataset, parts: Parts, num: int) -> tuple[list[Problem], int, float]:
    """Some problems, drawn by the seed, whose prompts fit; the limit; the share of the data's that are over it."""
    found = fitting(recipe, data, parts.renderer, parts.room)
    return _in_turn(recipe, data, found.problems)[:num], found.limit, len(found.long) / len(data.problems)


def _in_turn(recipe: Recipe, data: Dataset, problems: Sequence[Problem]) -> list[Problem]:
    """The problems in a seeded order, in which the sets of `data.train` take turns by their shares."""
    drawn = sorted(problems, key=lambda p: seed_from(recipe.seed, "fit", p.id))
    shares = {one.domain: one.share for one in recipe.data.sets}
    due: dict[str, float] = {}
    for name, part in data.parts.items() or [(None, data)]:
        own = {problem.id for problem in part.problems}
        ranked = [problem.id for problem in drawn if problem.id in own]
        due |= {id_: (rank + 0.5) / shares[name] for rank, id_ in enumerate(ranked)}
    return sorted(drawn, key=lambda p: due[p.id])


def _asked(recipe: Recipe, options: FitOptions, data: Dataset) -> dict[str, Any]:
    """What identifies the answers: all of it but how many problems there are."""
    resolved = recipe.as_dict()
    teacher = recipe.teacher.path
    return {
        "model": {**resolved["model"], "device": None},
        "model_files": model_digest(Path(recipe.model.path)),
        "teacher": resolved["teacher"],
        "teacher_files": model_digest(Path(teacher)) if teacher else None,
        "context": resolved["context"],
        "sampling": recipe.sampling.params.identity,
        **({} if recipe.sampling.engine == "hf" else {"engine": recipe.sampling.engine}),
        "data": data.fingerprint,
        **({"files": recipe.user_files} if recipe.user_files else {}),
        "max_prompt_tokens": recipe.data.max_prompt_tokens,  # it decides which problems are drawn
        "task": resolved["data"]["task"],
        **({"sets": resolved["data"]["train"]} if data.parts else {}),
        **({"texts": texts} if (texts := {k: digest_of(path) for k, path in recipe.context_files.items()}) else {}),
        "seed": recipe.seed,
        "samples": options.samples,
        "teacher_answers": options.teacher_answers,
    }


def _ask(
    recipe: Recipe,
    options: FitOptions,
    parts: Parts,
    asker: Asker,
    problems: Sequence[Problem],
    console: Console,
    interrupt: Interrupt,
) -> tuple[list[Example], list[Example], dict[int, tuple[Sequence[Example], Sequence[Example]]]]:
    """The student's answers, those that the teacher can read, and the teacher's: the last three of `Answered`."""
    teacher = parts.teacher
    assert teacher is not None and options.samples is not None
    warn = partial(_warn, console)
    with engine_beside(recipe, parts, asker.folder, console, interrupt, warn) as server:
        engine = _here(recipe, parts) if server is None else server.engine(0)
        with Bar(console, "student's answers", len(problems) * options.samples) as bar:
            rows = asker.student(problems, engine, parts.renderer, options.samples, _hears(bar, interrupt, asker.ranks))
    read = [row for row in _with_views(recipe, teacher, problems, rows) if _readable(row, teacher)]
    if not read:
        raise UserError(
            f'the teacher can read none of the {len(rows)} answers: context.kind = "{recipe.context.kind}" has '
            "nothing to show it, or context and answer are longer than its positions"
        )
    went_on: dict[int, tuple[Sequence[Example], Sequence[Example]]] = {}
    if recipe.teacher.weights == "trust_region":
        _note(console, "a trust-region teacher scores and cannot answer: its own answers are not measured")
    elif recipe.teacher.kind == "server":
        _note(console, "a teacher on a server scores and is not asked to answer: its own answers are not measured")
    elif options.teacher_answers:
        lengths = [len(row.rollout.answer_ids) for row in rows]
        graded = any(row.rollout.reward is not None for row in rows)  # else going on from a prefix tells nothing
        shares = PREFIX_SHARES if graded and recipe.teacher.tokens == "same" else ()  # it goes on from token ids
        for prefix in sorted({0, *(int(share * np.percentile(lengths, 90)) for share in shares)}):
            some = [
                row
                for row in read
                if row.rollout.sample_id < options.teacher_answers and len(row.rollout.answer_ids) > prefix
            ]
            label = f"teacher's answers, from token {prefix}" if prefix else "teacher's answers"
            with Bar(console, label, len(some)) as bar, teacher.active():
                gone_on = asker.teacher(
                    problems, some, prefix, teacher.engine(), teacher.renderer, _hears(bar, interrupt, asker.ranks)
                )
            went_on[prefix] = (some, gone_on)
    return rows, read, went_on


def _here(recipe: Recipe, parts: Parts) -> HFEngine:
    with torch.no_grad():
        weights = parts.optimizer.compute_weights()
    return HFEngine(parts.student, max_tokens_per_batch=recipe.sampling.max_tokens_per_batch, weights=weights)


def _warn(console: Console, sentence: str) -> None:
    say(console, sentence, mark="warning")


def _note(console: Console, sentence: str) -> None:
    say(console, sentence, mark="note")


def _hears(bar: Bar, interrupt: Interrupt, ranks: Ranks) -> Any:
    so_far = 0

    def heard(num: int) -> None:
        nonlocal so_far
        so_far += num
        bar.update(so_far)
        interrupt.check(ranks)

    return heard


def _with_views(
    recipe: Recipe, teacher: Teacher, problems: Sequence[Problem], rows: Sequence[Example]
) -> list[Example]:
    num = len(rows) // len(problems)
    groups = [
        Group(problem=problem, rollouts=tuple(row.rollout for row in rows[i * num : (i + 1) * num]))
        for i, problem in enumerate(problems)
    ]
    views = teacher.views(groups, recipe.context, (recipe.seed, 0, "context"), 0, "teacher")
    return [
        row if view is None else replace(row, views={"teacher": view}) for row, view in zip(rows, views, strict=True)
    ]


def _readable(row: Example, teacher: Teacher) -> bool:
    return row.view is not None and teacher.fits(row.view.context_ids, row.rollout.answer_ids)


def _heard(teacher: Teacher, read: Sequence[Example]) -> tuple[list[Example], dict[str, float | None] | None]:
    """The rows with those tokens counted that a teacher with another tokenizer says something of, and their shares."""
    asked = Asked("distribution")
    spans = [
        None if row.view is None else teacher.spans_of(row.view.context_ids, row.rollout.answer_ids, asked)
        for row in read
    ]
    shares = span_shares([(row.rollout, own) for row, own in zip(read, spans, strict=True)])
    rows = heard_tokens(read, spans)
    if not any(row.rollout.answer_mask.any() for row in rows):
        raise UserError(
            "no token of the student's answers is one token in the teacher's tokenizer, so there is nothing to compare"
        )
    return rows, shares


def _compare(
    recipe: Recipe, k: int, parts: Parts, answered: Answered, console: Console, interrupt: Interrupt, ranks: Ranks
) -> TokenTable:
    """Every part of the rows is shared among the ranks: they make their passes together."""
    assert parts.teacher is not None
    engine, rows, tables = _here(recipe, parts), answered.read, list[TokenTable]()
    student = student_side(engine.score, parts.student.head(engine.weights))
    teacher = teacher_side(parts.teacher.score, parts.teacher.head())
    with Bar(console, "both read the answers", len(rows)) as bar:
        for part in parts_of(rows):
            places = ranks.share(range(part.start, part.stop))
            own = [rows[place] for place in places]
            if any(row.rollout.answer_mask.any() for row in own):
                table = compare_rows(
                    own,
                    student,
                    teacher,
                    k=k,
                    temperature=recipe.method.loss_temperature,
                    device=parts.student.device,
                    masses_at=[m for m in MASSES_AT if m < parts.student.num_tokens],
                )
                tables.append(replace(table, row_N=table.row_N + places[0]))
            else:
                student.hidden(own)
                teacher.hidden(own)
            bar.update(part.stop)
            interrupt.check(ranks)
    return TokenTable.joined(sorted(ranks.joined(tables), key=lambda table: int(table.row_N[0])))


def _beside_whole(
    recipe: Recipe, k: int, parts: Parts, read: Sequence[Example], console: Console, interrupt: Interrupt
) -> dict[str, float | None] | None:
    """Of a quantised teacher: how far it is from the whole one. None: it is whole."""
    kind = recipe.teacher.quantization
    if kind is None:
        return None
    with Bar(console, "the whole teacher reads", min(len(read), MOST_ROWS)) as bar:

        def heard(done: int, total: int) -> None:
            bar.update(done)
            interrupt.check()

        found = agreement_with_whole(recipe, parts, read, k, heard)
    _note(
        console,
        f'teacher.quantization = "{kind}": KL from the whole teacher {found["forward_kl"]:.2g} nats a token, the same '
        f"likeliest token at {found['top1_agreement']:.1%} (of {found['num_answers']:.0f} answers)",
    )
    return found


def _as_json(
    recipe: Recipe, options: FitOptions, facts: Facts, limits: Thresholds, advice: Advice, table: TokenTable
) -> dict[str, Any]:
    return {
        "recipe": recipe.as_dict(),
        "options": {**asdict(options), "out": None if options.out is None else str(options.out)},
        "verdict": advice.verdict,
        "sentence": advice.sentence,
        "set": dict(advice.recipe),
        "findings": [asdict(finding) for finding in advice.findings],
        "facts": asdict(facts),
        "by_bucket": [
            {"from": first, "to": end, **summary(part)}
            for (first, end), part in by_bucket(table, recipe.diagnostics.bucket_tokens).items()
        ],
        "thresholds": {
            f.name: {"value": getattr(limits, f.name), "source": f.metadata["source"]} for f in fields(limits)
        },
    }
