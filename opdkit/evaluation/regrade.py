"""`opdkit regrade`: every stored answer graded again, every number computed again. No model, no torch.

The old files stay beside the new ones (`result.before_regrade_1.json`, `<name>.before_regrade_1.jsonl`). Where nothing
changes, nothing is written; so a second call finds nothing to do. An evaluation that did not finish has its answers
graded again, and no result.json until it goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdkit.data.files.names import slug
from opdkit.data.readers import load_problems
from opdkit.errors import UserError
from opdkit.evaluation.verdicts import VerifiedSet, read_verdicts, with_verdicts
from opdkit.measure.accuracy import Accuracy
from opdkit.measure.intervals import mean_over_sets
from opdkit.run.answer_sets import read_answers
from opdkit.run.folder import atomic_write
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import (
    RESULT,
    AnswerSet,
    StoredAnswer,
    measure,
    num_measured,
    problems_path,
    read_result,
    write_problems,
    write_result,
)
from opdkit.tasks import TASKS
from opdkit.tasks.guard import make_task, task_named
from opdkit.tasks.options import TaskOptions
from opdkit.types import Problem

PER_BATCH = 512

Progress = Callable[[str, int, int], None]  # data set, answers graded, answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """One verdict that is another one now."""

    problem: Problem
    old: StoredAnswer
    new: StoredAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Regraded:
    name: str
    num_answers: int
    before: Accuracy | None  # None: the evaluation had not come to its numbers
    after: Accuracy
    changed: Sequence[Changed]  # rewards; the other form of the same final answer is no other verdict
    num_reread: int  # answers with the same reward whose final answer is read differently

    def kinds(self) -> Counter[str]:
        """("wrong -> right", ...) -> how many."""
        return Counter(f"{_word(c.old.reward)} -> {_word(c.new.reward)}" for c in self.changed)


def regrade(
    folder: Path,
    *,
    data: Mapping[str, str] | None = None,
    task: str | None = None,
    with_published: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Regraded], list[Path]]:
    """(what changed per data set, the old files that were kept). folder: of an evaluation.

    data: data set -> a source to take the problems from (their gold answers were corrected) instead of those saved
    beside the answers. task: another task, or other options, as one line; a task of one's own is graded with only when
    it is named here, since the folder may be a stranger's and its task is imported. with_published: also write the
    published estimators; they are kept up where the result has them.
    Raises UserError for a folder without answers, answers whose problems are not known, and an unknown task.
    """
    if dry_run or not folder.is_dir():
        return _regrade(folder, data or {}, task, with_published, dry_run, progress)
    with Lock.on_folder(folder):
        return _regrade(folder, data or {}, task, with_published, dry_run, progress)


def _regrade(
    folder: Path,
    data: Mapping[str, str],
    task: str | None,
    with_published: bool,
    dry_run: bool,
    progress: Progress | None,
) -> tuple[list[Regraded], list[Path]]:
    sets, result = _read(folder, task)
    for name in data.keys() - sets.keys():
        raise UserError(f"--data {name}={data[name]}: {folder} has no answers to {name!r}; it has {', '.join(sets)}")
    with_published = with_published or "published" in result
    problems = {name: _problems(folder, one, data.get(name), task) for name, one in sets.items()}
    found: list[Regraded] = []
    most = num_measured(result)
    new = {**result, "eval": {}, **({"published": {}} if with_published else {})}
    files: dict[Path, str] = {}
    graded: dict[str, list[StoredAnswer]] = {}
    for name, one in sets.items():
        known, asked = problems[name]
        grader = task_named(asked["task"])
        answers = _grade(one, known, grader, progress)
        graded[name] = [answer for answer in answers if answer.sample_id < most]
        ours, theirs = measure(graded[name], task=grader.main.name, with_published=with_published)
        new["eval"][name] = ours
        if theirs is not None:
            new["published"][name] = theirs
        found.append(_changes(one, answers, known, result["eval"].get(name), ours))
        if answers != list(one.answers) or asked != one.asked:
            lines = [{"identity": asked}, *map(asdict, answers)]
            files[folder / f"{slug(name)}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
    if len(graded) > 1 and "mean_over_sets" in result:
        new["mean_over_sets"] = mean_over_sets([e["avg_at_n"] for e in new["eval"].values()])
    if "verifier" in result:
        new["verifier"] = {**result["verifier"], "sets": _verified(folder, problems, graded)}
    is_finished = (folder / RESULT).exists()
    if dry_run or (not files and (new == result or not is_finished)):
        return found, []
    kept = [_keep(path) for path in [*files, *([folder / RESULT] if is_finished else [])]]
    for name in data:
        write_problems(problems_path(folder, name), problems[name][0].values())
    for path, content in files.items():
        atomic_write(path, content)
    if is_finished:  # else the numbers are of a part of what was asked: the evaluation writes them when it goes on
        write_result(folder, new)
    return found, kept


def _read(folder: Path, task: str | None) -> tuple[dict[str, AnswerSet], dict[str, Any]]:
    """The answers, each set with the task it is graded with from now on; and result.json."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of the evaluation, which holds {RESULT}")
    if (folder / "recipe.toml").exists():
        raise UserError(f"{folder} is a training run; `opdkit regrade` takes the folder of an `opdkit evaluate`")
    sets = read_answers(folder, unmeasured=True)
    for name, one in sets.items():
        if not one.answers:
            raise UserError(f"{folder} has no answers to {name} yet; run its `opdkit evaluate` again first")
        if task is None and one.task not in TASKS:
            raise UserError(
                f"{name} was graded by {one.task!r}, which is none of opdkit's own tasks ({', '.join(TASKS)}); name "
                "the task to grade with, --task TASK"
            )
        if task is None and one.asked.get("episode"):
            raise UserError(
                f"{name} was answered in episodes, and what their environment gave (its verdict, rewards of turns) is "
                "not told by the last turns, which are what is stored; name the task to grade those with, --task TASK"
            )
        task_named(task or one.asked["task"])
    return sets, read_result(folder) or {"eval": {}}


def _verified(
    folder: Path,
    problems: Mapping[str, tuple[Mapping[str, Problem], Mapping[str, Any]]],
    graded: Mapping[str, Sequence[StoredAnswer]],
) -> dict[str, VerifiedSet]:
    """The verdicts of then, as far as the rules of now still reject the answers."""
    return {
        name: with_verdicts(graded[name], verdicts, task=task_named(asked["task"]).main.name)
        for name, (_, asked) in problems.items()
        if (verdicts := read_verdicts(folder, name))
    }


def _problems(
    folder: Path, one: AnswerSet, source: str | None, task: str | None
) -> tuple[Mapping[str, Problem], Mapping[str, Any]]:
    """The problems, and what the answers are answers to, and graded by, from now on."""
    asked = one.asked if task is None else {**one.asked, "task": task_named(task).main.text}
    if source is not None:
        limit, instruction = asked.get("limit"), asked.get("instruction", "auto")
        chosen = task_named(asked["task"]).main
        wanted = chosen.columns_asked
        data = load_problems(source, task=chosen.name, limit=limit, instruction=instruction, asked=wanted)
        known: Mapping[str, Problem] = {problem.id: problem for problem in data.problems}
        asked = {**asked, "data": [source], "fingerprint": data.fingerprint, "name": one.name}
        _check_questions(one, known, source)
    elif one.problems is None:
        raise UserError(
            f"{problems_path(folder, one.name)} is missing, and with it the problems of {one.name}; "
            f"give the data with --data {one.name}=PATH"
        )
    else:
        known = one.problems
    missing = sorted({answer.problem_id for answer in one.answers} - known.keys())
    if missing:
        where = source or str(problems_path(folder, one.name))
        raise UserError(f"{where} lacks {len(missing)} of the problems that were answered, e.g. {missing[0]!r}")
    return known, asked


def _check_questions(one: AnswerSet, known: Mapping[str, Problem], source: str) -> None:
    """Another gold answer is what --data is for; another question is not what was answered."""
    old = one.problems or {}
    differ = sorted(name for name in old.keys() & known.keys() if old[name].messages != known[name].messages)
    if differ:
        raise UserError(
            f"{source} asks another question under the id {differ[0]!r} than was answered ({len(differ)} such "
            "problems); give the data the answers were sampled for"
        )


def _grade(
    one: AnswerSet, problems: Mapping[str, Problem], grader: TaskOptions, progress: Progress | None
) -> list[StoredAnswer]:
    graded: list[StoredAnswer] = []
    task = make_task(grader.main)
    try:
        for start in range(0, len(one.answers), PER_BATCH):
            batch = one.answers[start : start + PER_BATCH]
            grades = task.grade([(problems[answer.problem_id], answer.text) for answer in batch])
            graded += [
                replace(answer, reward=grade.score, parsed=grade.parsed)
                for answer, grade in zip(batch, grades, strict=True)
            ]
            if progress:
                progress(one.name, len(graded), len(one.answers))
    finally:
        task.close()
    return graded


def _changes(
    one: AnswerSet,
    answers: Sequence[StoredAnswer],
    problems: Mapping[str, Problem],
    before: Accuracy | None,
    after: Accuracy,
) -> Regraded:
    pairs = list(zip(one.answers, answers, strict=True))
    return Regraded(
        name=one.name,
        num_answers=len(answers),
        before=before,
        after=after,
        changed=[
            Changed(problem=problems[old.problem_id], old=old, new=new)
            for old, new in pairs
            if old.reward != new.reward
        ],
        num_reread=sum(old.reward == new.reward and old.parsed != new.parsed for old, new in pairs),
    )


def _keep(path: Path) -> Path:
    """A copy of the file beside it, under the first free number; an equal copy that is there already is enough."""
    content = path.read_bytes()
    number = 1
    while (copy := path.with_name(f"{path.stem}.before_regrade_{number}{path.suffix}")).exists():
        if copy.read_bytes() == content:
            return copy
        number += 1
    atomic_write(copy, content)
    return copy


def _word(reward: float | None) -> str:
    return "ungraded" if reward is None else "right" if reward >= 1 else "wrong" if reward <= 0 else f"{reward:g}"
