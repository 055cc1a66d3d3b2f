"""Commands that sample answers to a data set, and those that judge them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from opdkit.cli.base import (
    MANY,
    AsJson,
    Model,
    Ranks,
    Sampling,
    Task,
    app,
    console,
    errors,
    finite,
    on_ranks,
    with_sampling,
)
from opdkit.errors import Interrupted, UserError
from opdkit.run.console import say, say_json

if TYPE_CHECKING:
    from opdkit.evaluation.options import EvaluateOptions
    from opdkit.measure.accuracy import Accuracy

TIMEOUT_MINUTES = 60.0  # how long a rank waits for another one's answers
Published = Annotated[
    bool, typer.Option("--published", help="Also the estimators of published code, under their own names.")
]

Episode = Annotated[
    Path | None, typer.Option(metavar="RECIPE", help="Play episodes, as the [episode] of this recipe has them.")
]


@app.command()
@with_sampling
def evaluate(
    asked: Sampling,
    model: Model,
    data: Annotated[
        list[str] | None, typer.Option(help="A file, folder, hub name or arithmetic:...; may be given again.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Who grades --data: see `opdkit tasks`.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Published data sets: math, science, code or tools; may be given again.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Where a suite's prepared data sets are.")] = Path("data"),
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Go on without what a suite lacks.")] = False,
    n: Annotated[int, typer.Option("-n", min=1, max=MANY, help="Answers per problem.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and the answers.")] = None,
    published: Published = False,
    verifier: Annotated[
        str | None, typer.Option(help="A model that judges answers the rules reject; counted apart.")
    ] = None,
    episode: Episode = None,
    at_least: Annotated[
        float | None,
        typer.Option(callback=finite, help="End with status 1 if avg@n of any data set is below this."),
    ] = None,
    ranks: Ranks = 1,
    as_json: AsJson = False,
) -> None:
    """Sample, grade, count; resumes.

    avg@n, pass@k and maj@n with 95 % intervals over problems. Answers are kept as they come: run the same command
    again to go on.
    """
    from opdkit.data.suites import find_sets

    _check_asked(data, task, suite)
    say_on = errors if as_json else console
    found = find_sets(suite or [], data_dir, lambda line: say(say_on, line))
    if found.missing and not skip_missing:
        raise UserError(*_missing(found.missing, data_dir))
    for sentence in found.missing.values():
        say(say_on, sentence, mark="warning")
    from opdkit.evaluation.eval_sets import sets_of

    sets = sets_of(data or [], task, found.sources)
    from opdkit.evaluation.evaluate import evaluate_model, folder_of
    from opdkit.ranks.join import is_launched, join
    from opdkit.run.stored_answers import RESULT

    tasks = ", ".join(dict.fromkeys(set_.task for set_ in sets))
    options = _options(
        asked, model=model, data=[set_.source for set_ in sets], task=tasks, num_samples=n, episode=episode
    )
    if ranks > 1:
        folder = folder_of(options, out)
        on_ranks(ranks, folder, lambda: any(folder.glob("*.json*")), timeout_minutes=TIMEOUT_MINUTES)
        results = json.loads((folder / RESULT).read_text(encoding="utf-8"))["eval"]
    else:
        group = join(device=options.device, timeout_minutes=TIMEOUT_MINUTES, key="--device")
        say_on.quiet = not group.is_first and not is_launched()
        try:
            with group.hearing():
                results = evaluate_model(
                    options,
                    out=out,
                    console=say_on,
                    sets=sets,
                    missing=found.missing,
                    with_published=published,
                    verifier=verifier,
                    ranks=group,
                )
        except Interrupted:
            raise Interrupted("The answers so far are kept; run the same command to go on.") from None
        if is_launched() or not group.is_first:
            group.wait()
            return  # whoever started it says the rest
    if as_json:
        say_json(console, {"eval": results, "missing": found.missing})
    elif len(results) > 1:
        from opdkit.cli.tables import evaluation_table

        say(console, evaluation_table(results))
    if at_least is not None and (below := _below(results, at_least)):
        say(errors, *below)
        raise typer.Exit(1)


def _check_asked(data: list[str] | None, task: str | None, suite: list[str] | None) -> None:
    if not data and not suite:
        raise UserError("nothing to evaluate on: give --data with --task, or --suite")
    if data and task is None:
        raise UserError("--data needs --task, which says who grades; see `opdkit tasks`")
    if task is not None and not data:
        raise UserError("--task says who grades --data, and a suite knows its own graders: leave --task out")


@app.command()
@with_sampling
def sample(
    asked: Sampling,
    model: Model,
    data: Annotated[str, typer.Option(help="A file, folder, hub name or arithmetic:...")],
    task: Task,
    out: Annotated[Path, typer.Option(help="JSONL to write; `data.train` reads it as it is.")],
    n: Annotated[int, typer.Option("-n", min=1, max=MANY, help="Answers wanted per problem.")] = 1,
    reject: Annotated[str, typer.Option(help="Rules, in commas: truncated,no_answer,wrong,repetition; or none.")] = (
        "truncated,no_answer,repetition"
    ),
    attempts: Annotated[int, typer.Option(min=1, max=MANY, help="For each wanted answer.")] = 3,
    episode: Episode = None,
) -> None:
    """A model's answers as training data; resumes.

    Answers are graded and rejected by named rules, and tried again. Run the same command again to go on.
    """
    from opdkit.evaluation.sample import SampleOptions, rules_of
    from opdkit.evaluation.sample import sample as sample_answers

    options = _options(asked, model=model, data=[data], task=task, num_samples=n, episode=episode)
    try:
        sample_answers(
            SampleOptions(model=options, reject=rules_of(reject), attempts=attempts), out=out, console=console
        )
    except Interrupted:
        raise Interrupted("The answers so far are kept; run the same command to go on.") from None


def _below(results: Mapping[str, Accuracy], at_least: float) -> list[str]:
    """A sentence for each data set whose avg@n is below, or unknown."""
    averages = {name: found["avg_at_n"]["value"] for name, found in results.items()}
    return [
        f"{name}: avg@{results[name]['samples']} {'unknown' if value is None else format(value, '.4f')} is below "
        f"--at-least {at_least:g}"
        for name, value in averages.items()
        if value is None or value < at_least
    ]


def _missing(missing: Mapping[str, str], data_dir: Path) -> tuple[str, ...]:
    """Every data set by name; why, of the first: the others seldom have another reason."""
    first, *others = missing
    why = missing[first]
    if not others:
        return why, "give --skip-missing to evaluate without it"
    return (
        f"{len(missing)} data sets are not in {data_dir}: {', '.join(missing)} (of the first: {why}); or give "
        "--skip-missing to evaluate without them",
    )


def _options(
    asked: Sampling, *, model: str, data: Sequence[str], task: str, num_samples: int, episode: Path | None
) -> EvaluateOptions:
    from opdkit.evaluation.episodes import read_episode
    from opdkit.evaluation.options import EvaluateOptions
    from opdkit.recipe import key_values

    return EvaluateOptions(
        model=model,
        data=tuple(data),
        task=task,
        num_samples=num_samples,
        limit=asked.limit,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_answer_tokens=asked.max_answer_tokens,
        max_tokens_per_batch=asked.max_tokens_per_batch,
        engine=asked.engine,
        url=asked.url,
        seed=asked.seed,
        dtype=asked.dtype,
        device=asked.device,
        chat_template=asked.chat_template,
        template_kwargs=key_values(asked.template or [], flag="--template"),
        close_thinking=asked.close_thinking,
        system=asked.system,
        stop_tokens=tuple(asked.stop_token) if asked.stop_token else None,
        instruction=asked.instruction,
        trust_remote_code=asked.trust_remote_code,
        episode=None if episode is None else read_episode(episode).model_dump(mode="json", exclude_none=True),
    )


@app.command()
def compare(
    run_a: Annotated[
        str,
        typer.Argument(metavar="RUN_A", help="An evaluation's folder, or a run; RUN@before, @teacher, @STEP, @rows."),
    ],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="What is compared with it.")],
    as_json: AsJson = False,
    fail_if: Annotated[
        Literal["worse"] | None,
        typer.Option(
            help="End with status 1 if B's avg is worse than A's: its interval lies below 0, on any data set."
        ),
    ] = None,
) -> None:
    """What B is better at than A, problem by problem.

    Paired differences B - A with 95 % intervals over the problems that both answered. Needs no model.
    """
    from opdkit.cli.tables import comparison_tables
    from opdkit.evaluation.compare_runs import compare_runs, worse_sets

    result = compare_runs(run_a, run_b)
    if as_json:
        say_json(console, result)
    else:
        for part in comparison_tables(result):
            say(console, part)
    if fail_if is not None and (worse := worse_sets(result)):
        say(errors, f"B is worse than A: {', '.join(worse)}")
        raise typer.Exit(1)


@app.command()
def regrade(
    result: Annotated[Path, typer.Argument(help="The folder of an evaluation.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="Take a data set's gold answers from here; default: as saved."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Another task, or other options; default: as it was.")] = None,
    published: Published = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; write nothing.")] = False,
    examples: Annotated[int, typer.Option(min=0, help="Changed verdicts to show, per data set.")] = 3,
) -> None:
    """Grade stored answers again; needs no model.

    After a grader or a gold answer changed: every number is computed anew, the old files stay beside the new ones, and
    every changed verdict is shown. Nothing is written where nothing changed.
    """
    from opdkit.cli.tables import regraded_lines
    from opdkit.evaluation.regrade import regrade as grade_again
    from opdkit.run.console import Bars

    sources = dict(_name_and_source(one) for one in data or [])
    with Bars(console) as bars:
        found, kept = grade_again(
            result, data=sources, task=task, with_published=published, dry_run=dry_run, progress=bars.update
        )
    for line in regraded_lines(found, examples):
        say(console, line)
    for path in kept:
        say(console, f"kept the old {path}")
    done = "nothing was written (--dry-run)" if dry_run else f"wrote {result}" if kept else "nothing to write"
    say(console, done)


def _name_and_source(text: str) -> tuple[str, str]:
    name, equals, source = text.rpartition("=")
    if not (name and equals and source):
        raise UserError(f"--data {text}: write NAME=SOURCE, the data set's name as the evaluation gives it")
    return name, source
