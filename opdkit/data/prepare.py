"""A published data set in, one file per split out, and a card that says what was found and what was done.

    rows -> drafts -> splits -> repeats -> chat turns by ONE template for all splits -> Parquet

Files are written beside their place and moved there when complete: a run that is stopped leaves what was there before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.data.files.sources import LocatedRow, every_row_column, files_left_out, rows_of, splits_of
from opdkit.data.files.unusable import Unusable
from opdkit.data.files.write import replace_files, write_parquet
from opdkit.data.prepared import FORMATS
from opdkit.data.readers import UniqueIds, fingerprint
from opdkit.data.repeats import Repeats, find_repeats, without_repeats
from opdkit.data.schemas.draft import Draft
from opdkit.data.schemas.schema import as_asked, question_digest
from opdkit.data.schemas.templates import TEMPLATES, Template, spaceless
from opdkit.data.sets import MAIN, DataSet, Hub, data_set
from opdkit.errors import UserError
from opdkit.types import Problem, seed_from

HUB = "hub"
CARD = "prepared.json"
SPLITS = ("problem", "shared")

Progress = Callable[[int], None]  # is told the number of rows read so far


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """instruction: a template of the set, or "auto" for the one it is published with. split: how a raw benchmark is
    split; "shared" trains on half of the tests of the very problems it evaluates on, as SDPO and MOPD publish it.
    since, until: YYYY-MM-DD, without the second; for sets with dates (None: the published window)."""

    instruction: str = "auto"
    format: str = "opdkit"
    revision: str | None = None
    split: str = "problem"
    test_share: float | None = None
    seed: int = 42
    since: str | None = None
    until: str | None = None
    drop_repeats: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCard:
    """One written file. Places count its drafts before repeats were dropped."""

    path: str
    rows: int
    fingerprint: str
    num_renamed_ids: int
    num_repeated_rows: int
    num_repeated_questions: int
    num_dropped_as_repeats: int
    contradictions: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What `prepared.json` holds."""

    name: str
    task: str
    source: str
    commit: str | None  # of the hub; None: a local source
    template: str
    options: dict[str, Any]
    files_left_out: list[str]  # a sentence each
    num_read: int
    num_left_out: int  # by the published filter: other domains, levels, kinds
    num_outside_dates: int
    num_unfilled_boxes: int  # prompts with a literal \boxed{{}}, mended
    num_shared_questions: int  # of one split that are in another one as well
    dropped: list[tuple[str, str]]  # (where, why)
    splits: dict[str, SplitCard]


@dataclass(slots=True)
class _Seen:
    """What reading found. A draft of None is a row that cannot be used; it keeps its place in the published order."""

    drafts: list[tuple[str | None, Draft | None]]
    dropped: list[tuple[str, str]]
    num_read: int = 0
    num_left_out: int = 0
    num_outside_dates: int = 0


def prepare(
    name: str, *, source: str, out: Path, options: PrepareOptions | None = None, progress: Progress | None = None
) -> Card:
    """Write `out/<split>.parquet` for each split, and `out/prepared.json`.

    source: a file or folder in the published format, or "hub". Raises UserError for an unknown name or option, a broken
    source, a source with no usable row, and files that are already there.
    """
    options = options or PrepareOptions()
    chosen = data_set(name)
    template = _check(chosen, options)
    _check_place(out, options)
    sources, commit = (
        _hub_sources(chosen, options) if source == HUB else (_local_sources(chosen, source, options), None)
    )
    window = _window(chosen, options)
    seen = _Seen([], [])
    for split, where in sources:
        _read(rows_of(where, split=None, keep=every_row_column), split, chosen, window, seen, progress)
    drafts = _splits(chosen, options, seen, source)
    files: dict[str, tuple[list[Problem], list[str]]] = {}
    splits: dict[str, SplitCard] = {}
    for split, members in drafts.items():
        repeats = find_repeats(members, chosen.task)
        kept = without_repeats(members, repeats) if options.drop_repeats else members
        if not kept:
            raise UserError(f"{source}: nothing is left of the split {split!r} without repeated questions")
        ids = UniqueIds()
        problems = list(ids.unique(problem_of(draft, chosen, template) for draft in kept))
        files[split] = (problems, [_question(draft, template) for draft in kept])
        splits[split] = _split_card(out / f"{split}.parquet", problems, ids, repeats, len(members) - len(kept))
    card = Card(
        name=name,
        task=chosen.task,
        source=source if chosen.hub is None or source != HUB else f"{HUB}: {chosen.hub.id}",
        commit=commit,
        template=template.name,
        options=asdict(options),
        files_left_out=[] if source == HUB else files_left_out(source),
        num_read=seen.num_read,
        num_left_out=seen.num_left_out,
        num_outside_dates=seen.num_outside_dates,
        num_unfilled_boxes=sum(draft.was_unfilled for _, draft in seen.drafts if draft is not None),
        num_shared_questions=_num_shared(drafts),
        dropped=seen.dropped,
        splits=splits,
    )
    _write(out, card, files, options)
    return card


def _check(chosen: DataSet, options: PrepareOptions) -> Template:
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format} is not known; choose from {', '.join(FORMATS)}")
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split} is not known; choose from {', '.join(SPLITS)}")
    if options.split == "shared" and chosen.task != "code":
        raise UserError(f"--split shared divides the tests of programs; {chosen.name} has none, leave it out")
    if options.test_share is not None and (chosen.test_share is None or options.split == "shared"):
        why = "is split as published" if chosen.test_share is None else "shares all problems with --split shared"
        raise UserError(f"--test-share does not apply: {chosen.name} {why}; leave it out")
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UserError(f"--test-share {options.test_share} must be above 0 and below 1")
    name = chosen.template if options.instruction == "auto" else options.instruction
    if name not in chosen.templates:
        known = ", ".join(dict.fromkeys(("auto", *chosen.templates)))
        raise UserError(f"--instruction {name} does not fit {chosen.name}; choose from {known}")
    return TEMPLATES[name]


def _check_place(out: Path, options: PrepareOptions) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if (out / CARD).exists():
        if not options.overwrite:
            raise UserError(f"{out} was prepared already; name another --out, or give --overwrite to replace it")
    elif strangers := sorted(path.name for path in out.glob("*.parquet")):
        raise UserError(f"{out} holds {strangers[0]}, which opdkit did not prepare; name another --out")


def _window(chosen: DataSet, options: PrepareOptions) -> tuple[str, str] | None:
    if chosen.dates is None:
        if options.since or options.until:
            raise UserError(f"--since and --until do not apply: {chosen.name} has no dates; leave them out")
        return None
    assert chosen.window is not None
    since, until = options.since or chosen.window[0], options.until or chosen.window[1]
    for flag, day in (("--since", since), ("--until", until)):
        try:
            date.fromisoformat(day)
        except ValueError:
            raise UserError(f"{flag} {day} is not a date; write it as YYYY-MM-DD") from None
    if since >= until:
        raise UserError(f"no day is from {since} on and before {until}: --since must come before --until")
    return since, until


def _local_sources(chosen: DataSet, source: str, options: PrepareOptions) -> list[tuple[str | None, str]]:
    if options.revision is not None:
        raise UserError(f"--revision is for --source hub; {source} is read as it is")
    found = splits_of(source)
    if chosen.hub is None or len(found) != 1:
        return found
    ((split, where),) = found  # a copy of the hub's folder has the hub's names: AIME24's only file is called train
    return [(chosen.hub.splits.get(split, split) if split else None, where)]


def _hub_sources(chosen: DataSet, options: PrepareOptions) -> tuple[list[tuple[str | None, str]], str]:
    hub = chosen.hub
    if hub is None:
        raise UserError(f"{chosen.name} is on no hub that its authors name; give its file or folder as --source")
    commit = hub_commit(hub, options.revision or hub.revision or MAIN)
    config = f":{hub.config}" if hub.config else ""
    return [(ours, f"{hub.id}@{commit}{config}:{theirs}") for theirs, ours in hub.splits.items()], commit


def hub_commit(hub: Hub, revision: str) -> str:
    """The commit a branch, tag or pull request stands at; a commit is returned as it is, without asking."""
    if len(revision) == 40 and not set(revision) - set("0123456789abcdef"):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(hub.id, revision=revision).sha
    except Exception as error:  # the network, a name that is gone, a gate: all are the user's to read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the hub does not say which commit {revision} of {hub.id} is ({reason}); without a connection, copy the "
            "data set here and give it as --source, or give a cached commit with --revision"
        ) from None
    if commit is None:
        raise UserError(f"the hub names no commit for {revision} of {hub.id}; give one with --revision")
    return str(commit)


def _read(
    rows: Iterator[LocatedRow],
    split: str | None,
    chosen: DataSet,
    window: tuple[str, str] | None,
    seen: _Seen,
    progress: Progress | None,
) -> None:
    for where, row in rows:
        seen.num_read += 1
        if progress is not None:
            progress(seen.num_read)
        day = chosen.dates(row) if chosen.dates is not None else None
        if window is not None and day is not None and not window[0] <= day < window[1]:
            seen.num_outside_dates += 1
            continue
        try:
            draft = chosen.read(row)
        except Unusable as error:
            seen.dropped.append((where, str(error)))
            seen.drafts.append((split, None))
            continue
        if draft is None:
            seen.num_left_out += 1
        else:
            seen.drafts.append((split, draft))


def _splits(chosen: DataSet, options: PrepareOptions, seen: _Seen, source: str) -> dict[str, list[Draft]]:
    usable = [draft for _, draft in seen.drafts if draft is not None]
    if not usable:
        raise UserError(_why_nothing(chosen, seen, source))
    num_unsplit = sum(draft.is_unsplit for draft in usable)
    if num_unsplit not in (0, len(usable)):
        raise UserError(
            f"{source} mixes {num_unsplit} rows of the raw benchmark with {len(usable) - num_unsplit} of files that "
            "are split already; prepare them one by one"
        )
    if num_unsplit == 0:
        if options.split == "shared" or options.test_share is not None:
            raise UserError(f"{source} is split already: --split and --test-share are for the raw benchmark")
        found: dict[str, list[Draft]] = {}
        for split, draft in seen.drafts:
            if draft is not None:
                found.setdefault(split or chosen.split, []).append(draft)
        return found
    assert chosen.test_share is not None
    placed = [
        None if draft is None else draft if draft.id is not None else replace(draft, id=str(place))
        for place, (_, draft) in enumerate(seen.drafts)
    ]
    if options.split == "shared":
        everything = [draft for draft in placed if draft is not None]
        return {"train": [_half_of_tests(draft, options.seed) for draft in everything], "test": everything}
    return _by_problem(placed, options.test_share or chosen.test_share, options.seed)


def _by_problem(placed: Sequence[Draft | None], test_share: float, seed: int) -> dict[str, list[Draft]]:
    """The split of `datasets.Dataset.train_test_split(test_size, seed)`, which SDPO and MOPD use, in its order."""
    order = np.random.default_rng(seed).permutation(len(placed))
    num_test = math.ceil(test_share * len(placed))
    parts = {"train": order[num_test:], "test": order[:num_test]}
    found = {name: [draft for place in part if (draft := placed[place]) is not None] for name, part in parts.items()}
    if not all(found.values()):
        raise UserError(
            f"{len(placed)} problems cannot be split with a test share of {test_share}: one side would be empty"
        )
    return found


def _half_of_tests(draft: Draft, seed: int) -> Draft:
    tests = draft.meta["tests"]
    drawn = sorted(range(len(tests)), key=lambda place: seed_from(seed, str(draft.id), place, "tests of train"))
    chosen = sorted(drawn[: max(1, len(tests) // 2)])
    return replace(draft, meta={**draft.meta, "tests": [tests[place] for place in chosen]})


def _why_nothing(chosen: DataSet, seen: _Seen, source: str) -> str:
    if seen.dropped:
        where, why = seen.dropped[0]
        rows = "its only row" if len(seen.dropped) == 1 else f"the first of its {len(seen.dropped)} rows"
        return f"{source} has no row that can be used for {chosen.name}; {rows} ({where}): {why}"
    if seen.num_outside_dates:
        return f"{source}: all {seen.num_outside_dates} rows are outside of the dates; give --since and --until"
    if seen.num_left_out:
        return f"{source}: none of its {seen.num_left_out} rows is of {chosen.name} (another domain, level or kind)"
    return f"{source} holds no rows"


def _question(draft: Draft, template: Template) -> str:
    """To the letter where the template is the one it was published with; 3 % of DAPO's questions end in a new line."""
    return draft.question if draft.template == template.name else draft.question.strip()


def problem_of(draft: Draft, chosen: DataSet, template: Template) -> Problem:
    """As it is written."""
    meta: dict[str, Any] = {**draft.meta, "data_source": chosen.name, "template": template.name}
    if template.answer_style == "answer_line":
        meta["answer_style"] = template.answer_style
    if template.after:
        meta["instruction"] = template.after.strip()
    return Problem(
        id=draft.id or question_digest(TEMPLATES["none"].messages(draft.question.strip())),
        task=chosen.task,
        messages=template.messages(_question(draft, template)),
        gold=draft.gold,
        solution=None if draft.solution is None else as_asked(draft.solution, template.answer_style),
        meta=meta,
    )


def _split_card(
    path: Path, problems: Sequence[Problem], ids: UniqueIds, repeats: Repeats, num_dropped: int
) -> SplitCard:
    return SplitCard(
        path=str(path),
        rows=len(problems),
        fingerprint=fingerprint(problems),
        num_renamed_ids=ids.num_duplicates,
        num_repeated_rows=repeats.num_rows,
        num_repeated_questions=repeats.num_questions,
        num_dropped_as_repeats=num_dropped,
        contradictions=[asdict(found) for found in repeats.contradictions],
    )


def _num_shared(drafts: Mapping[str, Sequence[Draft]]) -> int:
    questions = [{spaceless(draft.question) for draft in members} for members in drafts.values()]
    return sum(map(len, questions)) - len(set().union(*questions))


def _write(
    out: Path, card: Card, files: Mapping[str, tuple[list[Problem], list[str]]], options: PrepareOptions
) -> None:
    text = json.dumps(asdict(card), indent=1, ensure_ascii=False)
    names = [f"{split}.parquet" for split in files]
    with replace_files(out, [*names, CARD], outdated=_outdated(out, names)) as part:
        for split, (problems, questions) in files.items():
            path = part(f"{split}.parquet")
            write_parquet(path, problems, questions, format=options.format, split=split, source=card.name)
        part(CARD).write_text(text + "\n", encoding="utf-8")


def _outdated(out: Path, names: Sequence[str]) -> list[str]:
    """Files of an earlier run that this one does not replace: it had other splits."""
    try:
        splits = json.loads((out / CARD).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f"{split}.parquet" for split in splits if f"{split}.parquet" not in names]
