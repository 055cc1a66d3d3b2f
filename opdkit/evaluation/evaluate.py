"""Evaluation: sample, grade, write, summarise. What is written is never sampled again.

Every answer goes to a JSONL file soon after its end, graded, under its (problem, sample) key. Its seed is (seed,
"evaluate", problem id, sample id) whatever the model: before, after and teacher are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from opdkit.contexts.render import Renderer
from opdkit.contexts.transcript import last_turn
from opdkit.data.files.names import slug
from opdkit.data.readers import load_problems
from opdkit.engines.base import Sampler, SamplingParams
from opdkit.engines.load import model_digest
from opdkit.errors import Interrupted, UserError
from opdkit.evaluation.answering import Answering, answering, stage_of
from opdkit.evaluation.eval_sets import EvalSet, Loaded, about, say_dropped
from opdkit.evaluation.identity import check_options, identity_of
from opdkit.evaluation.options import EvaluateOptions
from opdkit.evaluation.verifier import check_verifier, verify_sets
from opdkit.measure.accuracy import Accuracy
from opdkit.measure.intervals import mean_over_sets
from opdkit.ranks.base import ALONE, Ranks
from opdkit.ranks.join import check_alike, code_digest
from opdkit.rollouts.single_turn import sample_rollouts
from opdkit.rollouts.stage import Stage
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.jsonl import open_lines
from opdkit.run.lock import Lock
from opdkit.run.stored_answers import (
    RESULT,
    Store,
    StoredAnswer,
    clock_of,
    interval,
    measure,
    problems_path,
    sentence,
    stored_answer,
    write_problems,
    write_result,
)
from opdkit.tasks.base import Task
from opdkit.tasks.guard import GuardedTask, make_task, task_named
from opdkit.types import Problem, Rollout

ANSWERS_PER_BATCH = 512  # that the engine may choose from; what has ended is written while the others go on


def sample_answers(
    problems: Sequence[Problem],
    *,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    num_samples: int,
    seed: int,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    stage: Stage | None = None,
) -> list[StoredAnswer]:
    """`num_samples` graded answers to every problem, in their order; what `store` already holds is not sampled again.

    progress is called after every token with (answers finished, answers), and may raise Interrupted: `store` has what
    was finished then. ranks: each samples its share, and the first one has the store. stage: where answers are
    episodes, of which the last turn is stored.
    """
    kept = ranks.from_first(lambda: {(a.problem_id, a.sample_id): a for a in store.answers} if store else {})
    pairs = [(problem, sample_id) for problem in problems for sample_id in range(num_samples)]
    missing = [(problem, sample_id) for problem, sample_id in pairs if (problem.id, sample_id) not in kept]
    found, at_once = len(pairs) - len(missing), ANSWERS_PER_BATCH * ranks.size
    own: list[StoredAnswer] = []

    def put(answers: Sequence[StoredAnswer]) -> None:
        if store:
            store.append(answers)
        kept.update(((answer.problem_id, answer.sample_id), answer) for answer in answers)

    def keep(rollouts: list[Rollout]) -> None:
        fresh = [stored_answer(rollout, renderer.answer_text(last_turn(rollout))) for rollout in rollouts]
        own.extend(fresh)
        put(fresh)

    for start in range(0, len(missing), at_once):
        before, part = found + start, missing[start : start + at_once]

        def heard(done: int, total: int, before: int = before, most: int = len(part)) -> None:
            if progress:
                progress(before + min(done * ranks.size, most), len(pairs))

        own.clear()
        with _stopping_all(ranks, own, put):
            sample_rollouts(
                ranks.share(part),
                sampler=sampler,
                renderer=renderer,
                task=task,
                params=params,
                identity=(seed, "evaluate"),
                policy_version=0,
                progress=heard,
                kept=keep,
                stage=stage,
            )
    order = [(problem.id, sample_id) for problem, sample_id in pairs]
    if store:
        store.put_in_order(order)
    return [kept[pair] for pair in order]


@contextmanager
def _stopping_all(
    ranks: Ranks, own: Sequence[StoredAnswer], put: Callable[[Sequence[StoredAnswer]], None]
) -> Iterator[None]:
    """Around a share of the answers: what other ranks finished is put beside this one's `own`, and where one of them
    was stopped, all are."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error

    def told() -> list[tuple[int, list[StoredAnswer], bool]]:
        if failed is not None and not isinstance(failed, Interrupted):
            raise failed
        return [(ranks.rank, list(own), failed is not None)]

    shares = ranks.from_all(told)
    for rank, answers, _ in shares:
        if rank != ranks.rank and answers:
            put(answers)
    if any(is_stopped for *_, is_stopped in shares):
        raise Interrupted


def evaluate_model(
    options: EvaluateOptions,
    *,
    out: Path | None,
    console: Console,
    sets: Sequence[EvalSet] | None = None,
    missing: Mapping[str, str] | None = None,
    with_published: bool = False,
    verifier: str | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Accuracy]:
    """`opdkit evaluate`: every data set, resumable; writes result.json. UserError for what cannot be evaluated.

    sets: default, `options.data`, all graded by `options.task`. Nothing is sampled before every one of them stands.
    missing: data sets that were asked for and left out, and why; written beside the numbers. verifier: a model that
    judges what the rules reject; its numbers are written apart, under "verifier". ranks: each samples its share, and
    the first one writes.
    """
    if sets is None:
        sets = [EvalSet(name=source, source=source, task=options.task) for source in options.data]
    check_options(options, {set_.task for set_ in sets})
    if verifier is not None:
        check_verifier(verifier, {task_named(set_.task).main.name for set_ in sets})
    if ranks.size > 1 and (verifier is not None or options.engine != "hf"):
        what = f"--engine {options.engine} answers for all of them" if verifier is None else "--verifier asks one model"
        way = "use --engine hf" if verifier is None else "run the same command without --ranks then: answers are kept"
        raise UserError(f"--ranks {ranks.size} starts so many processes, and {what}; {way}")
    folder = folder_of(options, out)
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(Lock.on_folder(folder)) and None)
        return _evaluate(options, sets, folder, console, missing or {}, with_published, verifier, ranks)


def folder_of(options: EvaluateOptions, out: Path | None) -> Path:
    """Where result.json and the answers go."""
    return out or Path("runs") / "evaluate" / slug(options.model)


def _evaluate(
    options: EvaluateOptions,
    sets: Sequence[EvalSet],
    folder: Path,
    console: Console,
    missing: Mapping[str, str],
    with_published: bool,
    verifier: str | None,
    ranks: Ranks,
) -> dict[str, Accuracy]:
    clock = ranks.from_first(lambda: _clock(sets, folder))
    loaded = _load_all(options, sets, folder, clock, ranks)
    result: dict[str, Any] = {"options": asdict(options), "sets": {}, "eval": {}, "missing": dict(missing)}
    answers: dict[str, list[StoredAnswer]] = {}
    interrupt = Interrupt(console)
    with _tasks({set_.task for set_ in sets}) as tasks, interrupt.listening():
        _sample_all(loaded, options, folder, clock, tasks, result, answers, with_published, console, interrupt, ranks)
        if verifier is not None:
            result["verifier"] = verify_sets(verifier, loaded, answers, options, folder, console, interrupt)
    if len(answers) > 1:
        result["mean_over_sets"] = mean_over_sets([e["avg_at_n"] for e in result["eval"].values()])
        words = f"mean over {len(answers)} data sets: avg@{options.num_samples} {interval(result['mean_over_sets'])}"
        say(console, words)
    ranks.from_first(lambda: write_result(folder, result))
    say(console, f"wrote {folder / RESULT}")
    return dict(result["eval"])


def _sample_all(
    loaded: Sequence[Loaded],
    options: EvaluateOptions,
    folder: Path,
    clock: datetime,
    tasks: Mapping[str, GuardedTask],
    result: dict[str, Any],
    answers: dict[str, list[StoredAnswer]],
    with_published: bool,
    console: Console,
    interrupt: Interrupt,
    ranks: Ranks,
) -> None:
    """Fills `answers` and `result`, one data set after another. The model is let go at the end."""
    with ExitStack() as opened:
        who = opened.enter_context(answering(options, console, folder, clock))
        _check_fit(loaded, who, options)
        for one in loaded:
            tasks[one.set.task].try_out(one.data.problems[0])
        stage = opened.enter_context(stage_of(options, who))
        for one in loaded:
            name, task = one.set.name, tasks[one.set.task]
            answers[name] = _sample_set(one, options, who, task, console, interrupt, ranks, stage)
            for failure in stage.new_failures() if stage is not None else ():
                say(console, failure, mark="warning")
            for crash in task.new_crashes():
                say(console, crash, mark="warning")
            finals = stage is None or not stage.pool.grades
            ours, theirs = measure(answers[name], task=task.name, with_published=with_published, has_finals=finals)
            result["sets"][name] = about(one)
            result["eval"][name] = ours
            if theirs is not None:
                result.setdefault("published", {})[name] = theirs
            say(console, f"{name}: {sentence(ours)}")


def _clock(sets: Sequence[EvalSet], folder: Path) -> datetime:
    """One for all data sets of a folder."""
    begun = (open_lines(folder / f"{slug(set_.name)}.jsonl") for set_ in sets)
    return clock_of(next((rows[0].get("identity") for rows in begun if rows), None))


def _load_all(
    options: EvaluateOptions, sets: Sequence[EvalSet], folder: Path, clock: datetime, ranks: Ranks
) -> list[Loaded]:
    """Raises UserError with a sentence for every data set that cannot be evaluated, and for ranks that differ."""
    loaded: list[Loaded] = []
    faults: list[str] = []
    names = [slug(set_.name) for set_ in sets]
    for set_ in sets:
        if names.count(slug(set_.name)) > 1:
            faults.append(f"two data sets would be written to {slug(set_.name)}.jsonl; give {set_.name} another --out")
            continue
        try:
            loaded.append(_load(options, set_, folder, clock, keeps=ranks.is_first))
        except UserError as error:
            faults += error.sentences
    told = ranks.gather(faults)
    if any(told):
        raise UserError(*next(sentences for sentences in told if sentences))
    facts = {f"data of {one.set.name}": one.data.fingerprint for one in loaded}
    check_alike(ranks, {**facts, "model": str(model_digest(Path(options.model))), "code": code_digest()})
    return loaded


def _load(options: EvaluateOptions, set_: EvalSet, folder: Path, clock: datetime, *, keeps: bool) -> Loaded:
    task = task_named(set_.task).main
    data = load_problems(
        set_.source,
        task=task.name,
        limit=options.limit,
        instruction=options.instruction,
        require_gold=task.needs_gold_or_tests,
        asked=task.columns_asked,
    )
    identity = identity_of(options, set_, data.fingerprint, clock)
    store = Store(folder / f"{slug(set_.name)}.jsonl", identity) if keeps else None
    return Loaded(set=set_, data=data, store=store)


@contextmanager
def _tasks(names: set[str]) -> Iterator[dict[str, GuardedTask]]:
    """One of each, closed at the end; first of all, since a sandbox may refuse to start."""
    tasks: dict[str, GuardedTask] = {}
    try:
        for name in sorted(names):
            tasks[name] = make_task(task_named(name).main)  # of a weighted reward, what is measured
        yield tasks
    finally:
        for task in tasks.values():
            task.close()


def _check_fit(loaded: Sequence[Loaded], who: Answering, options: EvaluateOptions) -> None:
    """Of every data set, so that the last one is not refused after hours."""
    for one in loaded:
        problems = one.data.problems
        lengths = [len(who.renderer.prompt_ids_within(problem.messages, who.room)) for problem in problems]
        limit = options.max_answer_tokens
        what = f"a prompt of {one.set.name} and --max-answer-tokens {limit}"
        who.check_fits([length + limit for length in lengths], what)


def _sample_set(
    one: Loaded,
    options: EvaluateOptions,
    who: Answering,
    task: Task,
    console: Console,
    interrupt: Interrupt,
    ranks: Ranks,
    stage: Stage | None,
) -> list[StoredAnswer]:
    problems, name, params = one.data.problems, one.set.name, options.params
    if stage is not None:
        params = replace(params, max_answer_tokens=stage.limits.turn_tokens)
    say_dropped(one, console)
    if one.store is not None:
        path = problems_path(one.store.path.parent, name)
        if not one.store.answers or not path.exists():
            write_problems(path, problems)
    with Bar(console, name, len(problems) * options.num_samples) as bar:

        def heard(done: int, total: int) -> None:
            bar.update(done)
            interrupt.check()

        return sample_answers(
            problems,
            sampler=who.sampler,
            renderer=who.renderer,
            task=task,
            params=params,
            num_samples=options.num_samples,
            seed=options.seed,
            store=one.store,
            progress=heard,
            ranks=ranks,
            stage=stage,
        )
