"""The folder of an evaluation: answers as they come, the problems they answer, and the numbers. No model, no torch.

    result.json                 {"options", "sets": {name: {...}}, "eval": {name: Accuracy}, ...}
    <name>.jsonl                a first line {"identity": what was asked}, then one answer a line
    <name>.problems.jsonl.gz    the problems, so that the answers can be graded again anywhere
    <name>.verifier.jsonl       what a verifier model said of rejected answers, where one was asked

A training run keeps its evaluations' answers in eval/<which>.jsonl, all data sets in one file.
"""

from __future__ import annotations

import gzip
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from opdkit.data.files.names import slug
from opdkit.errors import UserError
from opdkit.measure.accuracy import Accuracy, Answer, accuracy, answers_of, contested
from opdkit.measure.intervals import Estimate
from opdkit.measure.published import Published, published
from opdkit.measure.votes import SameAnswer
from opdkit.run.folder import atomic_write
from opdkit.run.jsonl import Pair, append_lines, open_lines, put_in_order
from opdkit.tasks.math.votes import math_votes
from opdkit.types import Finish, Problem, Rollout

RESULT = "result.json"
MOST_PROBLEM_BYTES = 4 << 30  # unpacked; a bomb of a megabyte unpacks to a thousand


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer(Answer):
    """An answer with the text that was graded."""

    text: str


def stored_answer(rollout: Rollout, text: str) -> StoredAnswer:
    (answer,) = answers_of([rollout])
    return StoredAnswer(**asdict(answer), text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSet:
    """The saved answers of one model to one data set."""

    name: str
    asked: Mapping[str, Any]  # what was asked: data, fingerprint, sampling, as far as it was saved
    answers: Sequence[StoredAnswer]
    problems: Mapping[str, Problem] | None  # None: not saved beside the answers

    @property
    def fingerprint(self) -> str | None:
        return self.asked.get("fingerprint")

    @property
    def task(self) -> str:
        """The task's name, without its options. Nothing is imported: the file may be a stranger's."""
        line = str(self.asked.get("task") or "").strip()
        if line.startswith("{"):
            try:
                return str(tomllib.loads(f"task = {line}")["task"]["name"])
            except (tomllib.TOMLDecodeError, KeyError, TypeError):
                return line
        return line.split()[0] if line else ""


class Store:
    """A JSONL file of answers. Its first line says what they are answers to; another file is refused, not mixed in."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._header = {"identity": json.loads(json.dumps(identity))}
        rows = open_lines(path)
        self._is_new = not rows  # the header is written with the first answers: a refused evaluation leaves nothing
        if rows:
            check_identity(path, rows[0].get("identity", {}), self._header["identity"])
        self.answers = [_stored(path, row) for row in rows[1:]]

    def append(self, answers: Sequence[StoredAnswer]) -> None:
        rows = [asdict(answer) for answer in answers]
        append_lines(self.path, [self._header, *rows] if self._is_new else rows)
        self._is_new = False

    def put_in_order(self, pairs: Iterable[Pair]) -> None:
        """Answers come as they end, which depends on their company. pairs: (problem, sample)."""
        put_in_order(self.path, pairs, lambda row: (row["problem_id"], row["sample_id"]), header=True)


def clock_of(identity: Mapping[str, Any] | None) -> datetime:
    """What the date is to chat templates that print it: when the first answers were asked for, so that a later call
    asks in the same words. identity: of answers that are there already."""
    said = (identity or {}).get("clock")
    return datetime.fromisoformat(said) if said else datetime.now().replace(microsecond=0)


def question_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What answers are answers to, without what moves no number of them: where, how fast. Another engine draws others.
    Files from before one of these left the identity still have it."""
    asked = {key: value for key, value in identity.items() if key not in ("device", "max_tokens_per_batch", "url")}
    episode = asked.pop("episode", None)
    if episode is not None:
        asked["episode"] = {key: value for key, value in episode.items() if key != "workers"}
    if asked.get("engine") == "hf":  # as answers from before there were others have it
        del asked["engine"]
    return asked


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless what is in the file and what is to be added answer the same question."""
    found, wanted = question_of(found), question_of(wanted)
    differ = sorted(key for key in {*found, *wanted} - {"clock"} if found.get(key) != wanted.get(key))
    if differ:
        said = ", ".join(f"{key} = {found.get(key)!r} (now {wanted.get(key)!r})" for key in differ)
        raise UserError(f"{path} holds answers to another question: {said}; choose another --out")


def write_run_answers(path: Path, asked: Mapping[str, Any], answers: Mapping[str, Sequence[StoredAnswer]]) -> None:
    """A training run's evaluation, whole or not at all. asked: "sets" is data set -> what is only its own."""
    rows = [{"data": name, **asdict(answer)} for name, found in answers.items() for answer in found]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in [{"identity": asked}, *rows]))


TASKS_WITHOUT_VOTES = ("code",)  # two right programs are seldom the same text


def measure(
    answers: Sequence[Answer], *, task: str, with_published: bool = False, has_finals: bool = True
) -> tuple[Accuracy, Published | None]:
    """Every number of one data set. Equal answers of the math task are one vote of maj@n, however they are spelled;
    programs have none. has_finals: as in `accuracy`; False where an environment grades."""
    same: SameAnswer | None = math_votes(contested(answers)) if task == "math" else None
    other = published(answers, same=same) if with_published else None
    has_votes = task not in TASKS_WITHOUT_VOTES
    return accuracy(answers, same=same, has_votes=has_votes, has_finals=has_finals), other


def sentence(e: Accuracy) -> str:
    """One line a person reads."""
    avg = e["avg_at_n"]
    text = f"avg@{e['samples']} {interval(avg)}"
    if e["samples"] > 1:
        n = e["samples"]
        passes = e["pass_at_k"][str(n)]
        text += f", pass@{n} {interval(passes)}"
        if passes["problems"] < e["problems"]:
            text += f" over the {passes['problems']} with {n} graded answers"
        text += f", maj@{n} {interval(e['maj_at_n'])}"
    text += f" over {e['problems']} problems"
    counts = {"truncated": e["num_truncated"], "without answer": e["num_no_answer"], "ungraded": e["num_ungraded"]}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{text} ({said})" if said else text


def interval(estimate: Estimate) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "unknown"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


# --- problems -------------------------------------------------------------------------------------------------------


def problems_path(folder: Path, name: str) -> Path:
    return folder / f"{slug(name)}.problems.jsonl.gz"


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    lines = [
        json.dumps(
            {
                "id": problem.id,
                "task": problem.task,
                "messages": [dict(turn) for turn in problem.messages],
                "gold": problem.gold,
                "solution": problem.solution,
                "meta": dict(problem.meta),
                **{name: dict(found) for name in ("columns", "row") if (found := getattr(problem, name))},
            }
        )
        for problem in problems
    ]
    # No time stamp inside, so that the same problems are the same bytes.
    atomic_write(path, gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))


def read_problems(path: Path) -> dict[str, Problem] | None:
    """Problem id -> problem; None if the file is not there. Raises UserError if it is damaged."""
    try:
        with gzip.open(path) as file:
            text = file.read(MOST_PROBLEM_BYTES + 1)
        if len(text) > MOST_PROBLEM_BYTES:
            raise OSError(f"unpacks to more than {MOST_PROBLEM_BYTES >> 20} MiB")
        rows = [json.loads(line) for line in text.decode().splitlines()]
        return {row["id"]: Problem(**{**row, "messages": tuple(row["messages"])}) for row in rows}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({_why(error)}); delete it and run the same `opdkit evaluate` again, which "
            "samples nothing that is there"
        ) from None


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- reading --------------------------------------------------------------------------------------------------------


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json; None if there is none. Raises UserError if it is not one."""
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(result, allow_nan=False)  # a number beyond every double comes back as infinity
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the same `opdkit evaluate` again to write it") from None
    if not isinstance(result, dict) or not isinstance(result.get("eval"), dict):
        raise UserError(f'{path} is not the result of an evaluation: it has no "eval"')
    if broken := next(_broken_parts(result), None):
        raise UserError(f"{path} was changed: {broken}; run the same `opdkit evaluate` again to write it")
    return result


def _broken_parts(result: Mapping[str, Any]) -> Iterator[str]:
    for name, found in result["eval"].items():
        average = found.get("avg_at_n") if isinstance(found, dict) else None
        if not isinstance(average, dict) or not isinstance(average.get("value", ""), int | float | None):
            yield f"its numbers of {name!r} have no average"
    if not isinstance(result.get("verifier", {}), dict):
        yield '"verifier" is no table'
    options = result.get("options", {})
    if not isinstance(options, dict) or not isinstance(options.get("num_samples", 1), int):
        yield '"options" does not say how many answers each problem has'


def num_measured(result: Mapping[str, Any]) -> float:
    """How many answers of each problem its numbers are of: those with the first sample ids. inf: all there are."""
    return float(result.get("options", {}).get("num_samples", math.inf))


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    atomic_write(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_answer_file(path: Path) -> dict[str, AnswerSet]:
    rows = read_lines(path)
    asked = rows[0].get("identity") if rows else None
    if not isinstance(asked, dict) or not (_are_sets(asked.get("sets")) or isinstance(_name_of(asked), str)):
        raise UserError(f"{path} is not a file of answers: its first line should say what was asked")
    if "sets" in asked:  # a training run: the data sets of one evaluation share a file
        answers: dict[str, list[StoredAnswer]] = {name: [] for name in asked["sets"]}
        for row in rows[1:]:
            if not isinstance(row.get("data"), str) or row["data"] not in answers:
                raise UserError(
                    f"{path} holds a line of no data set of its first line ({row.get('data')!r}); restore it"
                )
            answers[row["data"]].append(_stored(path, row))
        shared = {key: value for key, value in asked.items() if key != "sets"}
        return {
            name: AnswerSet(name=name, asked={**shared, **asked["sets"][name]}, answers=found, problems=None)
            for name, found in answers.items()
        }
    name = _name_of(asked)
    problems = read_problems(problems_path(path.parent, name))
    stored = [_stored(path, row) for row in rows[1:]]
    return {name: AnswerSet(name=name, asked=asked, answers=stored, problems=problems)}


def _are_sets(sets: Any) -> bool:
    return isinstance(sets, dict) and bool(sets) and all(isinstance(own, dict) for own in sets.values())


def _name_of(asked: Mapping[str, Any]) -> Any:
    """Of the only data set of an evaluation; something else than a string if a stranger wrote it."""
    if "sets" in asked:
        return None
    data = asked.get("data")
    return asked.get("name") or (data[0] if isinstance(data, list) and data else None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last line that a crash cut is left out, and nothing is changed."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no {path}, which {path.parent / RESULT} names; evaluate again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not JSON: the file was changed; restore it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object, so it is no file of answers")
        rows.append(row)
    return rows


_FIELDS = {field.name for field in fields(StoredAnswer)}
_FITS: Mapping[str, Callable[[Any], bool]] = {
    "problem_id": lambda value: isinstance(value, str),
    "sample_id": lambda value: type(value) is int,
    "reward": lambda value: value is None or (type(value) in (int, float) and math.isfinite(value)),
    "parsed": lambda value: isinstance(value, str | None),
    "finish": lambda value: value in get_args(Finish),
    "num_tokens": lambda value: value is None or type(value) is int,
    "text": lambda value: isinstance(value, str),
}


def _stored(path: Path, row: Mapping[str, Any]) -> StoredAnswer:
    try:
        answer = StoredAnswer(**{key: value for key, value in row.items() if key in _FIELDS})
    except TypeError as error:
        raise UserError(f"{path} holds a line that is no answer ({error})") from None
    wrong = [name for name, fits in _FITS.items() if not fits(getattr(answer, name))]
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]} = {getattr(answer, wrong[0])!r} of sample {answer.sample_id!r} to problem "
            f"{answer.problem_id!r} is none; the file was changed: restore it"
        )
    return answer
