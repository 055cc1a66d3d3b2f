"""The answers of a run, of an evaluation's folder or of one file of answers, found by the words a user says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from opdkit.data.files.names import slug
from opdkit.errors import UserError
from opdkit.run.row_answers import row_answers
from opdkit.run.stored_answers import AnswerSet, num_measured, read_answer_file, read_result


def read_answers(path: Path, which: str | None = None, *, unmeasured: bool = False) -> dict[str, AnswerSet]:
    """Data set -> answers, of an evaluation's folder, one of its .jsonl files, or a training run.

    Of a folder, the answers that its result.json measures: a smaller -n left more of them stored, and so does a larger
    one that has not come to its numbers. unmeasured: those too.

    which: for a training run: "after" (its last evaluation, the default), "before", "teacher", a step's evaluation; or
    "rows", the training answers of the last step that saved them, or of another one, "rows-100".
    Raises UserError for a path that holds no answers, with what it does hold.
    """
    if path.is_file():
        found = read_answer_file(path)
    elif not path.is_dir():
        raise UserError(f"there is no file or folder {path}; give an evaluation's folder, or a run folder")
    elif (path / "recipe.toml").exists():
        return _read_run(path, which or "after")
    else:
        found = {}
        most = math.inf if unmeasured else num_measured(read_result(path) or {})
        for file in _answer_files(path):
            for name, one in read_answer_file(file).items():
                found[name] = replace(one, answers=[a for a in one.answers if a.sample_id < most])
        if not found:
            raise UserError(
                f"{path} holds no saved answers: it is neither a run folder (no recipe.toml) nor the folder of an "
                "evaluation (no <data>.jsonl)"
            )
    if which is not None:
        raise UserError(f"{path} is one evaluation, so there is no {which!r} in it; leave `@{which}` out")
    return found


def path_and_which(words: str) -> tuple[Path, str | None]:
    """The arguments of `read_answers`: `runs/x@teacher` is split at its last @, unless a path has that very name."""
    head, at, tail = words.rpartition("@")
    if at and head and not Path(words).exists():
        return Path(head), tail
    return Path(words), None


def _answer_files(folder: Path) -> list[Path]:
    """Those that result.json names, or every one of an evaluation that did not finish."""
    result = read_result(folder)
    if result is not None:
        return [folder / f"{slug(name)}.jsonl" for name in result["eval"]]
    files = sorted(folder.glob("*.jsonl"))
    return [file for file in files if not file.name.endswith(".verifier.jsonl") and ".before_regrade" not in file.name]


def _read_run(run: Path, which: str) -> dict[str, AnswerSet]:
    if which == "rows" or (which.startswith("rows-") and which[5:].isdigit()):
        return row_answers(run, int(which[5:]) if which != "rows" else None)
    folder = run / "eval"
    steps = sorted(int(path.stem[5:]) for path in folder.glob("step_*.jsonl") if path.stem[5:].isdigit())
    names = {f"step_{step:06d}": str(step) for step in steps}
    if steps:
        names |= {"before": str(steps[0]), "after": str(steps[-1])}
    stem = which
    if which in names or which.isdigit():
        stem = f"step_{int(names.get(which, which)):06d}"
    path = folder / f"{stem}.jsonl"
    if not path.exists():
        had = ["teacher"] * (folder / "teacher.jsonl").exists() + list(map(str, steps))
        if not had:
            raise UserError(
                f"{run} holds no evaluation with its answers (eval/*.jsonl), so there is nothing to compare problem by "
                "problem; evaluate its checkpoint with `opdkit evaluate`"
            )
        raise UserError(f"{run} has no evaluation {which!r}; it has {', '.join(had)}, before, after and rows")
    return read_answer_file(path)
