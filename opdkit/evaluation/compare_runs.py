"""`opdkit compare A B`: what two evaluations or training runs hold on the same problems. No model, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from opdkit.errors import UserError
from opdkit.measure.accuracy import Answer, contested
from opdkit.measure.intervals import Estimate, mean_over_sets, side_of
from opdkit.measure.paired import Comparison, Votes, compare
from opdkit.measure.votes import SameAnswer
from opdkit.run.answer_sets import path_and_which, read_answers
from opdkit.run.stored_answers import RESULT, TASKS_WITHOUT_VOTES, AnswerSet
from opdkit.tasks.math.votes import math_votes

# How the answers were sampled. The model, the seed and the data are what may differ.
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "max_answer_tokens", "instruction", "chat_template", "template_kwargs",
    "close_thinking", "system", "stop_tokens",
)  # fmt: skip


class SetComparison(Comparison):
    notes: list[str]  # what a reader must know before believing the numbers


class RunComparison(TypedDict):
    """What `--json` prints."""

    a: str
    b: str
    sets: dict[str, SetComparison]
    mean_over_sets: Estimate | None  # of the difference in avg; None for one data set
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Matched:
    name: str
    a: AnswerSet
    b: AnswerSet


def compare_runs(a: str, b: str) -> RunComparison:
    """a, b: an evaluation's folder, one of its .jsonl files, or a run folder; `RUN@before`, `RUN@teacher`, `RUN@STEP`.

    Raises UserError for a path without answers, and where no problem is in both.
    """
    sets_a, sets_b = (read_answers(*path_and_which(side)) for side in (a, b))
    matched, notes = _match(sets_a, sets_b)
    notes += [
        f"{name} is an evaluation that did not finish" for name, side in (("A", a), ("B", b)) if _unfinished(side)
    ]
    if not matched:
        raise UserError(
            f"{a} and {b} hold answers to different data sets ({', '.join(sets_a)}; {', '.join(sets_b)}), so nothing "
            "can be compared; evaluate both on one"
        )
    sets: dict[str, SetComparison] = {}
    for one in matched:
        result, said = _compare_set(one)
        sets[one.name] = SetComparison(**result, notes=said)
    mean = mean_over_sets([one["metrics"]["avg"] for one in sets.values()]) if len(sets) > 1 else None
    return RunComparison(a=a, b=b, sets=sets, mean_over_sets=mean, notes=notes)


def worse_sets(result: RunComparison) -> list[str]:
    """Data sets, and their mean, on which B's avg is worse: the interval of the difference lies below 0, over enough
    problems to tell."""
    averages: dict[str, Estimate] = {name: one["metrics"]["avg"] for name, one in result["sets"].items()}
    if result["mean_over_sets"] is not None:
        averages["the mean over data sets"] = result["mean_over_sets"]
    return [name for name, difference in averages.items() if side_of(difference) == "below"]


def _unfinished(side: str) -> bool:
    path, _ = path_and_which(side)
    return path.is_dir() and not (path / "recipe.toml").exists() and not (path / RESULT).exists()


def _match(a: Mapping[str, AnswerSet], b: Mapping[str, AnswerSet]) -> tuple[list[_Matched], list[str]]:
    """Data sets of one name, or else of one fingerprint: the same problems under another path."""
    left = dict(b)
    matched, only_a = [], []
    for name, found in a.items():
        other = left.pop(name, None)
        if other is None and found.fingerprint is not None:
            same = [key for key, candidate in left.items() if candidate.fingerprint == found.fingerprint]
            other = left.pop(same[0]) if same else None
        if other is None:
            only_a.append(name)
        else:
            matched.append(_Matched(name, found, other))
    notes = [f"{name} is only in A" for name in only_a] + [f"{name} is only in B" for name in left]
    return matched, notes


def _compare_set(one: _Matched) -> tuple[Comparison, list[str]]:
    notes = []
    answers_a: Sequence[Answer] = one.a.answers
    answers_b: Sequence[Answer] = one.b.answers
    if one.a.fingerprint is None or one.a.fingerprint != one.b.fingerprint:
        changed = _changed(one)
        if changed is None:
            notes.append(
                "the data is not known to be the same (its fingerprints differ, and the problems were not saved): "
                "problems are paired by their ids alone"
            )
        elif changed:
            answers_a = [answer for answer in answers_a if answer.problem_id not in changed]
            notes.append(f"{len(changed)} problems have the same id but another question or gold answer: left out")
    notes += _differing_sampling(one)
    if one.a.asked.get("task") != one.b.asked.get("task"):
        notes.append(f"A was graded by {one.a.asked.get('task')}, B by {one.b.asked.get('task')}")
    try:
        has_votes = one.a.task not in TASKS_WITHOUT_VOTES
        result = compare(answers_a, answers_b, votes=_votes(one), has_votes=has_votes, has_finals=_has_finals(one))
    except UserError as error:
        raise UserError(f"{one.name}: {error}") from None
    for side, count in (("A", result["only_a"]), ("B", result["only_b"])):
        if count:
            notes.append(f"{count} problems are only in {side}: not compared")
    for side, answers in (("A", answers_a), ("B", answers_b)):
        ungraded = sum(answer.reward is None for answer in answers)
        if ungraded:
            notes.append(f"{ungraded} answers of {side} are not graded: in no mean")
    return result, notes


def _changed(one: _Matched) -> set[str] | None:
    """Ids that name another problem on the other side; None where the problems of a side were not saved."""
    if one.a.problems is None or one.b.problems is None:
        return None
    shared = one.a.problems.keys() & one.b.problems.keys()
    pairs = {name: (one.a.problems[name], one.b.problems[name]) for name in shared}
    return {name for name, (a, b) in pairs.items() if (a.messages, a.gold) != (b.messages, b.gold)}


def _differing_sampling(one: _Matched) -> list[str]:
    a, b = one.a.asked, one.b.asked
    differ = [key for key in _SAMPLING if key in a and key in b and a[key] != b[key]]
    said = [f"A was sampled with {key} = {a[key]}, B with {b[key]}" for key in differ]
    if a.get("step") != b.get("step"):
        said.append(
            f"A's answers are those of training step {a.get('step')}, B's of {b.get('step')} (None: evaluation)"
        )
    return said


def _has_finals(one: _Matched) -> tuple[bool, bool]:
    """Whether whoever graded each side reads final answers. An environment need not, and only the answers tell."""
    is_played = [bool(side.asked.get("episode")) for side in (one.a, one.b)]
    played = [side.answers for side, is_one in zip((one.a, one.b), is_played, strict=True) if is_one]
    found = any(answer.parsed is not None for answers in played for answer in answers)
    return found or not is_played[0], found or not is_played[1]


def _votes(one: _Matched) -> Votes | None:
    def votes(answers: Sequence[Answer]) -> SameAnswer:
        return math_votes(contested(answers))

    return votes if one.a.task == "math" else None
