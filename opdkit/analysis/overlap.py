"""`opdkit analyse overlap`: the numbers of `measure/overlap.py` from saved answers, with any two models.

    <out>/overlap.json             every number: of all tokens, by bucket of positions, of right and of wrong answers
    <out>/overlap.svg              the main ones along the answer, a line for each source
    <out>/<name>.tokens.parquet    a few numbers of every token: given back to the command, it needs no model

A source is a run folder, a Parquet file of rows (`two_models.py`), or a token table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.analysis.token_tables import is_token_table, load_tokens, save_tokens
from opdkit.analysis.two_models import Models, Reading, Source, read_source
from opdkit.engines.hf import HFEngine
from opdkit.errors import UserError
from opdkit.measure.overlap import Compared, TokenTable, by_bucket, by_relative_position, default_k, summary
from opdkit.measure.published_overlap import parse_published, published_overlap
from opdkit.reporting.figures.overlap import overlap_figure
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.folder import atomic_write
from opdkit.run.lock import Lock
from opdkit.training.metrics.agreement import compare_parts, student_side, teacher_side

MAX_TOKENS_PER_BATCH = 32768
NUM_BINS = 10  # of the relative position


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapOptions:
    sources: tuple[Path, ...]
    reading: Reading
    k: int | None = None
    published: str | None = None  # "only_stu:student_p": also what thunlp/OPD logs of that strategy and weight
    bucket_tokens: int = 1024
    out: Path | None = None


def analyse_overlap(options: OverlapOptions, *, console: Console) -> dict[str, Any]:
    """Compare, write and return what overlap.json holds. Raises UserError for what cannot be compared, Interrupted."""
    if options.published is not None:
        parse_published(options.published)
    names = source_names(options.sources)
    out = options.out or Path("runs") / "overlap" / "+".join(names)
    with Lock.on_folder(out):
        return _analyse_overlap(options, names, out, console)


def _analyse_overlap(options: OverlapOptions, names: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    interrupt, models = Interrupt(console), Models(options.reading.device, options.reading.trust_remote_code)
    results = {}
    with interrupt.listening():
        for name, path in zip(names, options.sources, strict=True):
            if path.suffix == ".parquet" and is_token_table(path):
                _check_cut(path, options)
                table, about = load_tokens(path)
            else:
                table, about = _scored(read_source(path, name, options.reading), options, models, console, interrupt)
                save_tokens(out / f"{name}.tokens.parquet", table, about)
            results[name] = numbers_of(table, about, options.bucket_tokens)
    atomic_write(out / "overlap.json", json.dumps(results, indent=1) + "\n")
    atomic_write(out / "overlap.svg", overlap_figure({name: r["by_bucket"] for name, r in results.items()}))
    say(console, f"wrote {out / 'overlap.json'} and overlap.svg")
    return results


def source_names(paths: Sequence[Path]) -> list[str]:
    """What each source is called. Raises UserError where two would be called the same."""
    names = [path.absolute().name.removesuffix(".parquet").removesuffix(".tokens") for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are called {name}: rename one, or analyse them one after the other")
    return names


def numbers_of(table: TokenTable, about: Mapping[str, Any], bucket_tokens: int) -> dict[str, Any]:
    """Everything overlap.json says of one source. Needs no model."""
    rewards = np.array([np.nan if row["reward"] is None else row["reward"] for row in about["rows"]])
    right_N = rewards[table.row_N] >= 1.0
    wrong_N = rewards[table.row_N] < 1.0
    cuts = {"right": table.where(right_N), "wrong": table.where(wrong_N)}
    return {
        **{key: value for key, value in about.items() if key != "rows"},
        "num_answers": len(about["rows"]),
        "all": summary(table),
        "answers": {name: summary(part) for name, part in cuts.items() if len(part.row_N)},
        "by_bucket": [
            {"from": first, "to": end, **summary(part)}
            for (first, end), part in by_bucket(table, bucket_tokens).items()
        ],
        "by_relative_position": [
            {"from": first, "to": end, **summary(part)}
            for (first, end), part in by_relative_position(table, NUM_BINS).items()
        ],
    }


def _check_cut(path: Path, options: OverlapOptions) -> None:
    """Raises UserError for what a table of tokens cannot be asked any more."""
    reading = options.reading
    asked = {
        "--student": reading.student,
        "--teacher": reading.teacher,
        "--step": reading.step,
        "-k": options.k,
        "--published": options.published,
    }
    for flag, value in asked.items():
        if value is not None:
            raise UserError(f"{flag} {value}: {path} holds numbers, no answers; give the run or its rows instead")


def _scored(
    source: Source, options: OverlapOptions, models: Models, console: Console, interrupt: Interrupt
) -> tuple[TokenTable, dict[str, Any]]:
    pair = models.pair(source, options.reading)
    say(console, f"{source.name}: {pair.told()}")
    student, teacher, rows = pair.student, pair.teacher, pair.rows
    engines = [HFEngine(model, max_tokens_per_batch=MAX_TOKENS_PER_BATCH) for model in (student, teacher)]
    k = options.k or default_k(student.num_tokens)
    if k > student.num_tokens:
        raise UserError(f"-k {k}: the models know {student.num_tokens} tokens; choose a shorter list")
    with Bar(console, f"{source.name}: both read", len(rows)) as bar:

        def heard(done: int, total: int) -> None:
            bar.update(done)
            interrupt.check()

        parts = list(
            compare_parts(
                rows,
                student_side(engines[0].score, student.head()),
                teacher_side(engines[1].score, teacher.head()),
                k=k,
                temperature=source.temperature,
                device=student.device,
                progress=heard,
            )
        )
    about: dict[str, Any] = {
        "student": source.student,
        "teacher": source.teacher,
        "k": k,
        "num_ids": student.num_tokens,
        "temperature": source.temperature,
        "num_left_out": pair.num_left_out,
        "rows": [
            {"problem_id": row.problem.id, "sample_id": row.rollout.sample_id, "reward": row.rollout.reward}
            for row in rows
        ],
    }
    if options.published is not None:
        about["published"] = published_overlap(
            Compared.joined([part.compared for part in parts]), *parse_published(options.published)
        )
    return TokenTable.joined([part.table() for part in parts]), about
