"""The answers an analysis scores, in one form, whoever saved them: rollouts.jsonl, one line an answer.

    a run folder, its rows/, or one step of them     token ids as they were sampled
    a folder or file of `opdkit evaluate`            text, read back into ids by the teacher's tokenizer
    a file of `opdkit sample`                        text; kept and rejected answers alike, graded again
    an analysis folder, or its rollouts.jsonl        the same answers for another teacher

Text that is read back can be other ids than were sampled; where the number of sampled ids is known, the difference is
counted. Answers of several steps are not pooled: of a problem that came again, those of the newest policy are taken.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.contexts.render import Renderer, read_chat_template
from opdkit.contexts.transcript import check_one_turn
from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.run.answer_sets import read_answers
from opdkit.run.folder import RunFolder, teacher_reading_of
from opdkit.run.rows import load_rows
from opdkit.run.stored_answers import read_lines
from opdkit.tasks.base import Grade
from opdkit.tasks.guard import make_task, task_named
from opdkit.tasks.options import TaskOptions
from opdkit.types import Group, Problem, Rollout, seed_from

ROLLOUTS = "rollouts.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How the answers' prompts were written: what a chat template was given while they were sampled or trained on."""

    chat_template: str | None = None  # None: the tokenizer's own; "plain"; or jinja text
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    close_thinking: bool = False
    system: str | None = None
    clock: str | None = None  # what the date was to a template that prints it

    def as_dict(self) -> dict[str, Any]:
        """For a header, without what is not set: as opdkit 0.1 wrote it."""
        said = asdict(self)
        return {key: said[key] for key in said if said[key] or key in ("chat_template", "template_kwargs")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Answers of a source, before they have ids and text both."""

    answers: list[tuple[Problem, Row]]
    origin: Mapping[str, Any]  # what the answers are, for the header
    template: Template | None  # None: not saved with the answers
    context: Mapping[str, Any] = field(default_factory=dict)  # the run's [context], where it shows peers
    vocabulary: str | None = None  # digest, where the answers have ids and their tokenizer is known
    dropped: Counter[str] = field(default_factory=Counter)


def find_answers(path: Path) -> Found:
    """Raises UserError for a path that is none of the four, with what was expected."""
    if not path.exists():
        raise UserError(f"--rollouts {path}: there is no such file or folder")
    if path.is_file() and path.suffix == ".parquet":
        return _of_rows([path], path.parent.parent)
    if path.is_dir() and (path / "rows").is_dir():
        return _of_rows(sorted((path / "rows").glob("*.parquet")), path)
    if path.is_dir() and (files := sorted(path.glob("*.parquet"))):
        return _of_rows(files, path.parent)
    if path.is_dir() and (path / ROLLOUTS).is_file():
        path /= ROLLOUTS
    if path.is_file():
        first = next(iter(read_lines(path)), {})
        if first.get("identity", {}).get("rollouts") is not None:
            return _of_analysis(path)
        if {"solution", "problem_id", "number"} <= first.keys():
            return _of_sample(path)
    return _of_evaluation(path)


def complete(found: Found, renderer: Renderer, stop_ids: Iterable[int]) -> tuple[list[Row], Counter[str]]:
    """One line for every answer, with ids and text, and counts of what was left out or was read back otherwise."""
    counts = Counter(found.dropped)
    stop_id = _stop_id(renderer, stop_ids)
    prompts: dict[str, list[int]] = {}
    lines = []
    for problem, row in found.answers:
        ids, text = row["answer_ids"], row["text"]
        if row.get("prompt_ids") is not None:
            if problem.id not in prompts:
                prompts[problem.id] = list(renderer.prompt_ids(problem.messages))
            counts["answers_whose_prompt_reads_otherwise"] += prompts[problem.id] != row["prompt_ids"]
        if ids is None:
            ids = [*renderer.encode(text), *([stop_id] if row["finish"] == "stop" else [])]
            counts["answers_read_back_from_text"] += 1
            counts["answers_read_back_to_another_length"] += row["num_tokens"] not in (None, len(ids))
        elif text is None:
            text = renderer.answer_text(ids)
        if max(ids, default=0) >= len(renderer.tokenizer):
            raise UserError(
                f"answer {row['sample_id']} to {problem.id!r} has token id {max(ids)}, but the model's tokenizer knows "
                f"{len(renderer.tokenizer)}: the answers are another model family's; choose a teacher of the same one"
            )
        lines.append(line_of(problem, {**row, "answer_ids": ids, "text": text}))
    return lines, counts


def line_of(problem: Problem, row: Mapping[str, Any]) -> Row:
    """A line of rollouts.jsonl."""
    return {
        "problem_id": problem.id,
        "task": problem.task,
        "messages": [dict(message) for message in problem.messages],
        "gold": problem.gold,
        **{key: row[key] for key in ("sample_id", "policy_version", "reward", "parsed", "feedback", "finish")},
        "text": row["text"],
        "answer_ids": list(row["answer_ids"]),
        "not_written": list(row["not_written"]),  # places of ids that the model did not write: tool or environment text
    }


def row_of(rollout: Rollout, text: str | None) -> Row:
    return {
        "sample_id": rollout.sample_id,
        "policy_version": rollout.policy_version,
        "reward": rollout.reward,
        "parsed": rollout.parsed,
        "feedback": rollout.feedback,
        "finish": rollout.finish,
        "num_tokens": len(rollout.answer_ids),
        "text": text,
        "answer_ids": [int(token) for token in rollout.answer_ids],
        "not_written": np.flatnonzero(~rollout.answer_mask).tolist(),
    }


def usable_groups(lines: Sequence[Row]) -> tuple[list[Group], Counter[str]]:
    """The answers by problem, sorted by problem and sample, and counts of what cannot be ranked: answers without a
    grade or without a token of the model's own, and problems with fewer than two others.

    Prompt ids are not kept: a context takes their place. Raises UserError if nothing is left.
    """
    counts = Counter[str]()
    by_problem: dict[str, list[Row]] = {}
    for line in sorted(lines, key=lambda line: (line["problem_id"], line["sample_id"])):
        empty = len(line["answer_ids"]) == len(line["not_written"])
        counts["empty_answers"] += empty
        counts["ungraded_answers"] += not empty and line["reward"] is None
        if not empty and line["reward"] is not None:
            by_problem.setdefault(line["problem_id"], []).append(line)
    counts["problems_with_one_answer"] = sum(len(rows) == 1 for rows in by_problem.values())
    groups = [_group(rows) for rows in by_problem.values() if len(rows) > 1]
    if not groups:
        raise UserError(
            f"no problem has two graded answers among the {len(lines)}, so there is nothing to rank; give rollouts "
            "with several answers to a problem (sampling.group_size, or -n)"
        )
    return groups, counts


def _group(lines: Sequence[Row]) -> Group:
    first = lines[0]
    problem = Problem(id=first["problem_id"], task=first["task"], messages=tuple(first["messages"]), gold=first["gold"])
    return Group(problem=problem, rollouts=tuple(map(_rollout, lines)))


def _rollout(line: Row) -> Rollout:
    mask = np.ones(len(line["answer_ids"]), dtype=np.bool_)
    mask[line["not_written"]] = False
    return Rollout(
        problem_id=line["problem_id"],
        sample_id=line["sample_id"],
        policy_version=line["policy_version"],
        prompt_ids=(),
        answer_ids=tuple(line["answer_ids"]),
        answer_logprobs=None,
        answer_mask=mask,
        finish=line["finish"] or "length",  # unknown: no stop token was added, so its end was not seen
        reward=line["reward"],
        parsed=line["parsed"],
        feedback=line["feedback"],
    )


def limited(found: Found, limit: int | None, seed: int) -> Found:
    """So many problems, drawn by `seed`; a problem's place in the draw depends on its id and the seed only."""
    ids = sorted({problem.id for problem, _ in found.answers}, key=lambda name: seed_from(seed, name, "limit"))
    kept = set(ids[:limit])
    return replace(found, answers=[pair for pair in found.answers if pair[0].id in kept])


def _of_rows(files: Sequence[Path], run: Path) -> Found:
    newest: dict[str, int] = {}
    rows = [row for file in files for row in load_rows(file)]
    if not rows:
        raise UserError(f"--rollouts {run} holds no saved rows; set train.save_rows_every in the recipe")
    check_one_turn((row.rollout for row in rows), "opdkit analyse signal")
    for row in rows:
        newest[row.problem.id] = max(newest.get(row.problem.id, 0), row.rollout.policy_version)
    kept = [row for row in rows if row.rollout.policy_version == newest[row.problem.id]]
    recipe = _recipe(run / "recipe.toml")
    context = recipe.get("context", {}) if recipe.get("context", {}).get("kind") == "peers" else {}
    return Found(
        answers=[
            (row.problem, {**row_of(row.rollout, None), "prompt_ids": [int(token) for token in row.rollout.prompt_ids]})
            for row in kept
        ],
        origin={"rollouts": "rows", "path": str(run), "digest": _digest(files)},
        template=_template_of(recipe, run) if recipe else None,
        context=context,
        vocabulary=_vocabulary(run, recipe),
        dropped=Counter({"answers_of_older_policies": len(rows) - len(kept)}),
    )


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({error}); restore it, or give the rows/ files alone") from None


def _vocabulary(run: Path, recipe: Mapping[str, Any]) -> str | None:
    """Of the student that wrote the rows: its last checkpoint's tokenizer, or that of the model it began as."""
    from tokenizers import Tokenizer

    files = sorted(run.glob("checkpoints/step_*/model/tokenizer.json"), reverse=True)
    files.append(Path(recipe.get("model", {}).get("path", "")) / "tokenizer.json")
    for file in files:
        if file.is_file():
            return vocabulary_digest(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    return None


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Which id means what. A teacher scores ids, so the answers' and its own must be the same."""
    return hashlib.blake2b(json.dumps(sorted(vocabulary.items())).encode(), digest_size=16).hexdigest()


def _template_of(recipe: Mapping[str, Any], run: Path) -> Template:
    """What the run's teacher reads through: another model has its own chat template, and kwargs of its own or the
    student's."""
    model, teacher = recipe.get("model", {}), recipe.get("teacher", {})
    chosen = teacher if teacher.get("kind") == "model" else model
    template = read_chat_template(chosen.get("chat_template"))
    return Template(chat_template=template, **teacher_reading_of(recipe), clock=RunFolder(run).clock().isoformat())


def _of_evaluation(path: Path) -> Found:
    sets = read_answers(path)
    if len(sets) > 1:
        raise UserError(f"--rollouts {path} holds {len(sets)} data sets; give the .jsonl file of one of them")
    ((name, answers),) = sets.items()
    if answers.problems is None:
        raise UserError(
            f"--rollouts {path}: the problems of {name} were not saved beside the answers, so nothing says what the "
            "teacher should read; evaluate again with `opdkit evaluate`, or give a run's rows"
        )
    pairs = []
    dropped = Counter[str]()
    for answer in answers.answers:
        if answer.problem_id not in answers.problems:
            dropped["answers_without_problem"] += 1
            continue
        row = {key: getattr(answer, key) for key in ("sample_id", "reward", "parsed", "finish", "num_tokens", "text")}
        row |= {"policy_version": 0, "feedback": None, "answer_ids": None, "not_written": ()}
        pairs.append((answers.problems[answer.problem_id], row))
    asked = answers.asked
    template = None
    if "template_kwargs" in asked:
        template = Template(chat_template=asked["chat_template"], **_asked_how(asked))
    origin = {
        "rollouts": "evaluate",
        "path": str(path),
        "data": name,
        "digest": _digest_of_rows(row for _, row in pairs),
    }
    return Found(answers=pairs, origin=origin, template=template, dropped=dropped)


def _of_sample(path: Path) -> Found:
    """Kept and rejected attempts: the kept ones alone would be what the rules let through, not what the model says."""
    attempts = path.with_name(f"{path.name}.rejected.jsonl")
    if not attempts.exists():
        raise UserError(f"--rollouts {path}: {attempts.name}, which `opdkit sample` writes beside it, is not there")
    kept = read_lines(path)
    header, *rejected = read_lines(attempts)
    asked = header["identity"]
    task = task_named(asked["task"])
    data = load_problems(
        asked["data"][0],
        task=task.main.name,
        limit=asked["limit"],
        instruction=asked["instruction"],
        require_gold=task.needs_gold_or_tests,
        asked=task.columns_asked,
    )
    if data.fingerprint != asked["fingerprint"]:
        raise UserError(
            f"--rollouts {path}: {asked['data'][0]} is not what it was when these answers were sampled, so they cannot "
            "be graded; restore it"
        )
    problems = {problem.id: problem for problem in data.problems}
    stopped = "stop" if "truncated" in asked["reject"] else None
    texts: dict[str, list[tuple[str, str | None]]] = {}
    for row in kept:
        texts.setdefault(row["problem_id"], []).append((row["solution"], stopped))
    for row in rejected:
        texts.setdefault(row["id"], []).append((row["text"], "length" if row["reason"] == "truncated" else stopped))
    dropped = Counter[str]()
    items = [(problems[name], *answer) for name in problems for answer in texts.get(name, ())]
    grades = _grade(task, [(problem, text) for problem, text, _ in items])
    number = Counter[str]()
    pairs = []
    for (problem, text, finish), grade in zip(items, grades, strict=True):
        row = {"sample_id": number[problem.id], "policy_version": 0, "reward": grade.score, "parsed": grade.parsed}
        row |= {"feedback": grade.feedback, "finish": finish, "num_tokens": None, "text": text}
        pairs.append((problem, {**row, "answer_ids": None, "not_written": ()}))
        number[problem.id] += 1
        dropped["answers_whose_end_is_unknown"] += finish is None
    template = Template(chat_template=read_chat_template(asked["chat_template"]), **_asked_how(asked))
    origin = {"rollouts": "sample", "path": str(path), "digest": _digest_of_rows(row for _, row in pairs)}
    return Found(answers=pairs, origin=origin, template=template, dropped=dropped)


def _grade(task: TaskOptions, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
    grader = make_task(task)
    try:
        return grader.grade(items)
    finally:
        grader.close()


def _of_analysis(path: Path) -> Found:
    header, *lines = read_lines(path)
    pairs = []
    for line in lines:
        problem = Problem(id=line["problem_id"], task=line["task"], messages=tuple(line["messages"]), gold=line["gold"])
        pairs.append((problem, {**line, "num_tokens": len(line["answer_ids"])}))
    return Found(
        answers=pairs,
        origin={"rollouts": "analysis", "path": str(path), "digest": _digest_of_rows(lines)},
        template=Template(**header["template"]) if header["template"] else None,
        context=header["context"],
        vocabulary=header["vocabulary"],
        dropped=Counter(header["counts"]),
    )


def _stop_id(renderer: Renderer, stop_ids: Iterable[int]) -> int:
    """The id that closes an answer read back from text: the chat template's own, the tokenizer's, or the smallest."""
    ids = sorted(stop_ids)
    return next((int(end) for end in (renderer.end_of_turn(), renderer.tokenizer.eos_token_id) if end in ids), ids[0])


def _asked_how(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of an identity that `opdkit evaluate` or `sample` wrote: how its prompts were made, but for the template."""
    keys = ("template_kwargs", "close_thinking", "system", "clock")
    return {key: asked[key] for key in keys if key in asked}


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def _digest_of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
