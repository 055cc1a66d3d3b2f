"""`opdkit analyse diversity A B C`: how different a model's answers to one problem are, and whether that costs or pays.

All runs are measured on the problems and with the number of answers they have in common, since every measure depends
on both. Saved answers in, numbers out: no model, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.errors import UserError
from opdkit.measure.accuracy import by_problem, is_right, pass_at_k
from opdkit.measure.diversity import (
    Case,
    NGrams,
    Row,
    RunDiversity,
    SetDiversity,
    distinct_words,
    text_distance,
    tokens,
    tree_distance,
    unique_ratio,
)
from opdkit.measure.intervals import estimate_difference, estimate_mean
from opdkit.measure.programs import node_counts
from opdkit.run.answer_sets import path_and_which, read_answers
from opdkit.run.folder import atomic_write
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import AnswerSet, StoredAnswer
from opdkit.tasks.code.text import extract_program

Progress = Callable[[str, int, int], None]

NUM_CASES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityOptions:
    text_distance: bool = False  # the published pairwise distance, by difflib: minutes for long answers
    max_answers: int | None = None  # of each problem; the first ones
    success_at: float = 1.0


def measure_runs(
    named: Sequence[str], *, options: DiversityOptions, progress: Progress | None = None
) -> dict[str, SetDiversity]:
    """Data set -> diversity, of every data set that all runs hold.

    named: paths as `opdkit compare` takes them, or NAME=PATH. Raises UserError for one name twice, a path without
    answers, and where no data set is in all runs.
    """
    read: dict[str, dict[str, AnswerSet]] = {}
    for words in named:
        name, path = _name_and_path(words)
        if name in read:
            raise UserError(f"two runs are called {name}; name them, e.g. first={words}")
        read[name] = read_answers(*path_and_which(path))
    sets = [one for one in next(iter(read.values())) if all(one in found for found in read.values())]
    if not sets:
        held = "; ".join(f"{name}: {', '.join(found)}" for name, found in read.items())
        raise UserError(f"no data set is in all of the runs ({held}); evaluate them on one")
    results = {}
    for one in sets:

        def heard(run: str, done: int, total: int, one: str = one) -> None:
            if progress:
                progress(f"{one}, {run}", done, total)

        results[one] = diversity({name: found[one] for name, found in read.items()}, options=options, progress=heard)
    return results


def write_diversity(out: Path, results: Mapping[str, SetDiversity]) -> list[Path]:
    """diversity.json (the means), per_problem.jsonl, case_studies.jsonl, and a page. Returns their paths."""
    from opdkit.reporting.diversity import diversity_page
    from opdkit.reporting.html.document import write_page

    means: dict[str, Any] = {}
    problems: list[dict[str, Any]] = []
    cases: list[dict[str, Any]] = []
    for name, found in results.items():
        means[name] = {key: value for key, value in found.items() if key not in ("per_problem", "cases")}
        for problem_id, rows in found["per_problem"].items():
            problems += [{"data": name, "problem_id": problem_id, "run": run, **row} for run, row in rows.items()]
        cases += [{"data": name, **case} for case in found["cases"]]
    files = {
        out / "diversity.json": json.dumps(means, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        out / "per_problem.jsonl": "".join(json.dumps(row) + "\n" for row in problems),
        out / "case_studies.jsonl": "".join(json.dumps(row) + "\n" for row in cases),
    }
    with Lock.on_folder(out):
        for path, content in files.items():
            atomic_write(path, content)
        write_page(out / "diversity.html", diversity_page(results))
    return [*files, out / "diversity.html"]


def _name_and_path(words: str) -> tuple[str, str]:
    """NAME=PATH, or a path, whose name is its last part."""
    name, equals, path = words.partition("=")
    if equals and name and path and "/" not in name and not Path(words).exists():
        return name, path
    return Path(words).name or words, words


def diversity(
    runs: Mapping[str, AnswerSet], *, options: DiversityOptions, progress: Progress | None = None
) -> SetDiversity:
    """One data set. runs: name -> saved answers. Raises UserError where no problem has two answers in every run."""
    groups = {name: by_problem(one.answers) for name, one in runs.items()}
    shared = [
        problem_id
        for problem_id in next(iter(groups.values()))
        if all(len(found.get(problem_id, ())) > 1 for found in groups.values())
    ]
    if not shared:
        raise UserError(
            f"no problem has two answers in every one of {', '.join(runs)}, so there is no diversity to measure; "
            "evaluate with -n 2 or more, on one data set"
        )
    is_code = next(iter(runs.values())).task == "code"
    limits = {p: min([*(len(found[p]) for found in groups.values()), options.max_answers or 10**9]) for p in shared}
    chosen = {name: {p: found[p][: limits[p]] for p in shared} for name, found in groups.items()}
    trees = _trees(chosen) if is_code else None
    per_problem: dict[str, dict[str, Row]] = {p: {} for p in shared}
    for name, found in chosen.items():
        for number, problem_id in enumerate(shared):
            per_problem[problem_id][name] = _row(found[problem_id], options, trees)
            if progress and (number + 1 == len(shared) or number % 16 == 0):
                progress(name, number + 1, len(shared))
    first = next(iter(runs))
    return SetDiversity(
        problems=len(shared),
        left_out={name: len(found) - len(shared) for name, found in groups.items()},
        answers_each=max(limits.values()),
        runs={
            name: _summary(name, None if name == first else first, per_problem, _unparsed(chosen[name], trees))
            for name in runs
        },
        per_problem=per_problem,
        cases=_cases(runs, chosen, per_problem),
    )


def view(answer: StoredAnswer, is_code: bool) -> str:
    """What is measured: the program of an answer to a coding problem (its whole text where it has none)."""
    return (extract_program(answer.text) or answer.text) if is_code else answer.text


def _row(group: Sequence[StoredAnswer], options: DiversityOptions, trees: Mapping[str, Any] | None) -> Row:
    texts = [view(answer, trees is not None) for answer in group]
    grams = NGrams([tokens(text) for text in texts])
    right = [i for i, answer in enumerate(group) if is_right(answer, options.success_at)]
    rewards = [answer.reward for answer in group if answer.reward is not None]
    row: Row = {}
    for prefix, members in (("", list(range(len(group)))), ("success_", right)):
        some = [texts[i] for i in members]
        enough = len(members) > 1
        row[f"{prefix}self_bleu"] = grams.self_bleu(members)
        row[f"{prefix}distinct1"] = grams.distinct(1, members) if enough else None
        row[f"{prefix}distinct2"] = grams.distinct(2, members) if enough else None
        row[f"{prefix}distance"] = grams.distance(members)
        row[f"{prefix}unique_ratio"] = unique_ratio(some) if enough else None
        if options.text_distance:
            row[f"{prefix}text_distance"] = text_distance(some)
        if trees is not None:
            row[f"{prefix}tree_distance"] = tree_distance([trees[text] for text in some if trees[text]])
    row["distinct4_words"] = distinct_words([answer.text for answer in group])
    row["success_rate"] = len(right) / len(rewards) if rewards else None
    row["mean_reward"] = sum(rewards) / len(rewards) if rewards else None
    for k in range(1, len(rewards) + 1):
        row[f"pass@{k}"] = pass_at_k(len(rewards), len(right), k)
    return row


def _trees(chosen: Mapping[str, Mapping[str, Sequence[StoredAnswer]]]) -> dict[str, dict[str, int] | None]:
    groups = [group for found in chosen.values() for group in found.values()]
    return node_counts(view(answer, True) for group in groups for answer in group)


def _unparsed(found: Mapping[str, Sequence[StoredAnswer]], trees: Mapping[str, Any] | None) -> int | None:
    if trees is None:
        return None
    return sum(trees[view(answer, True)] is None for group in found.values() for answer in group)


def _summary(
    name: str,
    first: str | None,
    per_problem: Mapping[str, Mapping[str, Row]],
    num_unparsed: int | None,
) -> RunDiversity:
    names = list(dict.fromkeys(key for rows in per_problem.values() for key in rows[name]))
    values_PS = _table(per_problem, name, names)
    measures = {key: estimate_mean(values_PS[:, s]) for s, key in enumerate(names)}
    difference = None
    if first is not None:
        before_PS = _table(per_problem, first, names)
        difference = {key: estimate_difference(before_PS[:, s], values_PS[:, s]) for s, key in enumerate(names)}
    pass_n_P = np.array([_pass_at_n(rows[name]) for rows in per_problem.values()], dtype=np.float64)
    return RunDiversity(
        measures=measures,
        std={key: _std(values_PS[:, s]) for s, key in enumerate(names)},
        difference=difference,
        correlation_with_pass={
            key: _correlation(values_PS[:, names.index(key)], pass_n_P)
            for key in ("self_bleu", "distance", "text_distance", "tree_distance", "success_distance")
            if key in names
        },
        num_unparsed_programs=num_unparsed,
    )


def _table(per_problem: Mapping[str, Mapping[str, Row]], run: str, names: Sequence[str]) -> Any:
    return np.array([[rows[run].get(key) for key in names] for rows in per_problem.values()], dtype=np.float64)


def _pass_at_n(row: Row) -> float | None:
    ks = [int(key.removeprefix("pass@")) for key in row if key.startswith("pass@")]
    return row[f"pass@{max(ks)}"] if ks else None


def _std(column: Any) -> float | None:
    known = column[np.isfinite(column)]
    return float(known.std()) if len(known) else None


def _correlation(first: Any, second: Any) -> float | None:
    """None where it is not defined: fewer than three problems, or one side is constant."""
    both = np.isfinite(first) & np.isfinite(second)
    x, y = first[both], second[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _cases(
    runs: Mapping[str, AnswerSet],
    chosen: Mapping[str, Mapping[str, Sequence[StoredAnswer]]],
    per_problem: Mapping[str, Mapping[str, Row]],
) -> list[Case]:
    found: list[tuple[float, Case]] = []
    for problem_id, rows in per_problem.items():
        distances = {name: value for name, row in rows.items() if (value := row["distance"]) is not None}
        gap = max(distances.values()) - min(distances.values()) if len(runs) > 1 else -distances[next(iter(runs))]
        answers = {
            name: [{"text": a.text, "reward": a.reward} for a in groups[problem_id]] for name, groups in chosen.items()
        }
        question = _question(runs, problem_id)
        case = Case(problem_id=problem_id, question=question, distances=distances, answers=answers)
        found.append((gap, case))
    return [case for _, case in sorted(found, key=lambda entry: (-entry[0], entry[1]["problem_id"]))[:NUM_CASES]]


def _question(runs: Mapping[str, AnswerSet], problem_id: str) -> str | None:
    for one in runs.values():
        if one.problems is not None and problem_id in one.problems:
            return one.problems[problem_id].messages[-1]["content"]
    return None
