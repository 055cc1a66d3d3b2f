"""`opdkit sample`: answers of a teacher as training data, rejected by named rules, tried again, resumable.

The file it writes is read by `data.train` as it is: one JSON object a line with `id`, `prompt` (chat turns), `answer`
(the gold) and `solution` (the sampled answer). An episode is a conversation in place of the two, with the tools it had:
`messages` and `tools`, as trainers of chats read them, `reward` and `ended`. Beside it stands `<out>.rejected.jsonl`:
what was asked, and every attempt that was rejected with its reason; so a second call goes on where the first one
stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdkit.contexts.transcript import model_turns
from opdkit.data.files.write import file_to_write
from opdkit.data.readers import load_problems
from opdkit.engines.load import model_digest
from opdkit.errors import UserError
from opdkit.evaluation.answering import Answering, answering, stage_of
from opdkit.evaluation.identity import check_options, own_files
from opdkit.evaluation.options import EvaluateOptions
from opdkit.rollouts.episodes import Played, play
from opdkit.rollouts.single_turn import sample_rollouts
from opdkit.rollouts.stage import Stage
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.jsonl import append_lines, open_lines, put_in_order
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import check_identity, clock_of, question_of
from opdkit.tasks.base import Task
from opdkit.tasks.guard import make_task, task_named
from opdkit.tasks.rejection import RULES, Rule, rejected_by
from opdkit.types import Problem, Rollout

PROBLEMS_PER_BATCH = 256  # what a crash can cost


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    model: EvaluateOptions  # whose answers, to what, how sampled: one data set, `num_samples` answers wanted a problem
    reject: tuple[Rule, ...]
    attempts: int  # for each wanted answer


@dataclass(frozen=True, slots=True)
class Done:
    """What a file of answers already holds: per (problem, wanted answer), attempts made and whether one was kept."""

    attempts: Counter[tuple[str, int]]
    kept: set[tuple[str, int]]


def sample(options: SampleOptions, *, out: Path, console: Console) -> dict[str, int]:
    """Fill `out`; returns the counts. Raises UserError for what cannot be sampled, Interrupted after Ctrl-C."""
    asked = options.model
    if options.attempts < 1:
        raise UserError(f"--attempts {options.attempts}: give at least 1")
    check_options(asked, {asked.task})
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: give the name of a .jsonl file, as which data.train will read it")
    with Lock.on_file(file_to_write(out)):
        return _sample(options, out, console)


def _sample(options: SampleOptions, out: Path, console: Console) -> dict[str, int]:
    asked = options.model
    (source,) = asked.data
    chosen = task_named(asked.task, may_be_none=True)
    grades = not chosen.is_none or asked.episode is not None  # an environment may
    if not grades and (graded := {"no_answer", "wrong"}.intersection(options.reject)):
        raise UserError(
            f"--reject {','.join(sorted(graded))} needs a grader, and --task none has none; give "
            "--reject truncated,repetition"
        )
    data = load_problems(
        source,
        task=chosen.main.name,
        limit=asked.limit,
        instruction=asked.instruction,
        require_gold=chosen.needs_gold_or_tests,
        asked=chosen.columns_asked,
    )
    rejected = file_to_write(out.with_name(f"{out.name}.rejected.jsonl"))
    clock = clock_of(next((row.get("identity") for row in open_lines(rejected)), None))
    done = _open(out, rejected, _identity(options, data.fingerprint) | {"clock": clock.isoformat()})
    task, interrupt, counts = make_task(chosen, data.problems[:1]), Interrupt(console), Counter[str]()
    try:
        with (
            interrupt.listening(),
            answering(asked, console, out.parent, clock) as who,
            stage_of(asked, who) as stage,
            Bar(console, f"sampling {source}", len(data.problems) * asked.num_samples) as bar,
        ):
            for attempt in range(options.attempts):
                while wanted := _wanted(data.problems, asked.num_samples, done, attempt)[:PROBLEMS_PER_BATCH]:
                    interrupt.check()
                    _attempt(wanted, attempt, options, who, task, stage, done, counts, (out, rejected), interrupt)
                    for warning in (*task.new_crashes(), *(stage.new_failures() if stage is not None else ())):
                        say(console, warning, mark="warning")
                    bar.update(len(done.kept), note=f"{sum(counts.values()) - counts['kept']} rejected")
    finally:
        task.close()
    order = [(problem.id, number) for problem in data.problems for number in range(asked.num_samples)]
    put_in_order(rejected, order, lambda row: (row["id"], row["number"]), header=True)
    put_in_order(out, order, lambda row: (row["problem_id"], row["number"]), header=False)
    missing = len(order) - len(done.kept)
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    say(console, f"{out}: {len(done.kept)} answers; now {said or 'nothing new'}")
    if missing:
        why = f"every one of {options.attempts} attempts was rejected (reasons in {rejected})"
        say(console, f"{missing} answers are missing: {why}", mark="warning")
    rejections = {f"rejected_{reason}": count for reason, count in counts.items() if reason != "kept"}
    return {"kept": len(done.kept), "missing": missing, **rejections}


def rules_of(text: str) -> tuple[Rule, ...]:
    """ "truncated,wrong" -> the rules. Raises UserError for a name that is none."""
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in RULES:
            raise UserError(f"--reject {name} is not a rule; choose from {', '.join(RULES)}, or none")
    return tuple(rule for rule in RULES if rule in names)


def _attempt(
    wanted: Sequence[tuple[Problem, int]],
    attempt: int,
    options: SampleOptions,
    who: Answering,
    task: Task,
    stage: Stage | None,
    done: Done,
    counts: Counter[str],
    files: tuple[Path, Path],
    interrupt: Interrupt,
) -> None:
    """Both files get the answers as they are finished. Raises Interrupted, between two tokens."""
    asked = options.model
    problems = {problem.id: problem for problem, _ in wanted}
    has_finals = stage is None or not (stage.pool.grades or task_named(asked.task, may_be_none=True).is_none)

    def keep(answers: Sequence[tuple[Rollout, Played | None]]) -> None:
        kept_lines, rejected_lines = [], []
        for rollout, played in answers:
            problem, number = problems[rollout.problem_id], rollout.sample_id
            rows = (rollout,) if played is None else played.rollouts
            turns = [who.renderer.answer_text(ids) for row in rows for ids in model_turns(row)]
            reason = rejected_by(rollout, turns, options.reject, has_finals=has_finals)
            done.attempts[problem.id, number] += 1
            counts[reason or "kept"] += 1
            if reason is None:
                done.kept.add((problem.id, number))
                said = _answer(problem, turns[-1]) if played is None else _conversation(problem, played)
                kept_lines.append(_names(problem, number, asked.num_samples) | said)
            else:
                text = "".join(turns[-1:])
                rejected_lines.append(
                    {"id": problem.id, "number": number, "attempt": attempt, "reason": reason, "text": text}
                )
        append_lines(files[1], rejected_lines)  # first: a lost attempt is made again, a kept answer is not lost
        append_lines(files[0], kept_lines)

    how: dict[str, Any] = {
        "sampler": who.sampler,
        "renderer": who.renderer,
        "task": task,
        "identity": (asked.seed, "sample data", attempt),
        "policy_version": 0,
        "progress": lambda finished, total: interrupt.check(),
    }
    if stage is None:
        sample_rollouts(wanted, **how, params=asked.params, kept=lambda found: keep([(one, None) for one in found]))
        return
    params = replace(asked.params, max_answer_tokens=stage.limits.turn_tokens)
    how |= {"stage": stage, "params": params, "group_size": asked.num_samples}
    play(wanted, **how, kept=lambda found: keep([(one.answer, one) for one in found]))


def _wanted(problems: Sequence[Problem], num: int, done: Done, attempt: int) -> list[tuple[Problem, int]]:
    return [
        (problem, number)
        for problem in problems
        for number in range(num)
        if (problem.id, number) not in done.kept and done.attempts[problem.id, number] == attempt
    ]


def _names(problem: Problem, number: int, num: int) -> dict[str, Any]:
    return {
        "id": problem.id if num == 1 else f"{problem.id}/{number}",
        "problem_id": problem.id,
        "number": number,
    }


def _answer(problem: Problem, text: str) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in problem.messages],
        "answer": problem.gold,
        "solution": text,
    }


def _conversation(problem: Problem, played: Played) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in (*played.messages, *played.said)],
        "tools": [dict(tool) for tool in played.tools],
        "answer": problem.gold,
        "reward": played.answer.reward,
        "ended": played.answer.ended,
    }


def _open(out: Path, rejected: Path, identity: Mapping[str, Any]) -> Done:
    """What is already there. Raises UserError for a file of something else."""
    done = Done(Counter(), set())
    wanted = json.loads(json.dumps(identity))
    rejected_rows, kept_rows = open_lines(rejected), open_lines(out)
    if rejected_rows:
        check_identity(out, rejected_rows[0].get("identity", {}), wanted)
    elif kept_rows:
        raise UserError(f"{out} already exists and was not written by opdkit sample; choose another --out")
    else:
        append_lines(rejected, [{"identity": wanted}])
        append_lines(out, [])
    try:
        done.attempts.update((row["id"], row["number"]) for row in rejected_rows[1:])
        done.kept.update((row["problem_id"], row["number"]) for row in kept_rows)
    except (KeyError, TypeError):
        raise UserError(
            f"{out} or {rejected.name} holds lines that opdkit sample did not write; choose another --out"
        ) from None
    return done


def _identity(options: SampleOptions, fingerprint: str) -> dict[str, Any]:
    task = task_named(options.model.task, may_be_none=True)
    asked = question_of(asdict(options.model)) | {"task": task.text} | own_files(task, options.model.episode)
    digest = model_digest(Path(options.model.model))
    return {**asked, "reject": options.reject, "fingerprint": fingerprint, "model_files": digest}
